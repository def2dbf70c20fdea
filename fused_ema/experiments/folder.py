"""The files of an experiment: config, metrics, a checkpoint, results and figures.

``config.json``, ``metrics.jsonl``, ``checkpoint.pt``, ``summary.json``, ``figure.json`` and
``figure.png``, directly in one folder. The same command with the same folder continues where it
stopped. Only the first process of a run writes, and only one run at a time.

The files from which a run continues have a checksum: ``checkpoint.pt`` at its end, and
``metrics.jsonl`` in ``metrics.sha256``, for its complete rows. Rows after those come from a process
that was killed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from . import files, plots
from .config import identity

T = TypeVar("T")


class Folder:
    """A run's folder, new or continued; as a context, it releases the folder on exit.

    Args:
        path: the folder, which is created if it does not exist.
        experiment: the experiment's name.
        config: the experiment's options.
        writes: whether this process writes.

    Raises:
        ValueError: the folder holds a run of another experiment or with other options, or files
            that do not belong to a run.
    """

    def __init__(self, path: Path, experiment: str, config: Any, writes: bool = True) -> None:
        self.path, self.experiment, self.writes = path, experiment, writes
        self.tensorboard = getattr(config, "tensorboard", False)
        self.config = {"experiment": experiment, **identity(config)}
        self._check()

    def _check(self) -> None:
        if (self.path / "config.json").exists():
            _check_same(self.path, self.config)
        elif self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path}: it is no folder; give another")
        elif self.path.is_dir() and not all(map(files.is_own, self.path.iterdir())):
            raise ValueError(
                f"--out {self.path}: it is not empty and holds no config.json of a run"
            )

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            files.unlock(self.path)

    def take(self) -> None:
        """Create the folder if there is none, and lock it against other processes.

        The lock lasts until the context ends, or this process does. Files in the folder are not
        touched.

        Raises:
            ValueError: another process is writing to it, or has begun another run there.
        """
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            files.lock(self.path)
            self._check()

    def progress(self, items: Iterable[T], title: str) -> Iterable[T]:
        """Iterate over the items with a progress bar on standard error."""
        from tqdm import tqdm

        bar: Iterable[T] = tqdm(items, desc=title, disable=not self.writes)
        return bar

    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far, without a line that a killed process did not finish.

        Raises:
            ValueError: they differ from what was written.
        """
        return [json.loads(line) for line in self._whole_lines()]

    def _whole_lines(self) -> list[bytes]:
        """The complete lines of the metrics, with their line ends."""
        path, seal = self.path / "metrics.jsonl", self.path / "metrics.sha256"
        if not path.exists() and not seal.exists():
            return []
        content = path.read_bytes() if path.exists() else b""
        try:
            sealed = seal.read_bytes()
            whole = content[: int(sealed.split()[0])]
        except (FileNotFoundError, IndexError, ValueError) as error:
            raise _unreadable(path, f"its checksum, {seal.name}, is missing or damaged") from error
        if sealed != _seal_of(whole):
            raise _unreadable(path, f"its checksum, {seal.name}, differs")
        return whole.splitlines(keepends=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to the metrics; it is on disk when this returns."""
        if self.writes:
            line = json.dumps(finite(row), ensure_ascii=False) + "\n"
            self._put([*self._whole_lines(), line.encode()])
            if self.tensorboard:
                self._write_scalars(row)

    def _write_scalars(self, row: Mapping[str, Any]) -> None:
        """Write a row for TensorBoard, over the samples seen."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tensorboard=yes: the package is missing; pip install tensorboard"
            ) from error
        if "samples" in row:
            with SummaryWriter(str(self.path / "tensorboard" / row["run"])) as writer:
                for name, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(name, value, row["samples"])

    def begin(self, count: int = 0) -> None:
        """Lock the folder, and remove all rows except the first ``count``.

        The other rows belong to steps that will be taken again. Nothing is written before this
        call.
        """
        self.take()
        if self.writes:
            files.remove_parts(self.path)
            self.write("config.json", self.config)
            kept = self._whole_lines()[:count]
            self._seal(kept)  # first, because the rows that it covers must exist at all times
            self._put(kept)

    def _put(self, kept: list[bytes]) -> None:
        self._replace("metrics.jsonl", b"".join(kept))
        self._seal(kept)

    def _seal(self, kept: list[bytes]) -> None:
        self._replace("metrics.sha256", _seal_of(b"".join(kept)))

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, completely or not at all."""
        if self.writes:
            self._replace(name, lines(finite(value)).encode())

    def read(self, name: str) -> Any:
        """Read a JSON file of the folder."""
        return json.loads((self.path / name).read_text())

    def write_figure(self, data: Mapping[str, Any]) -> None:
        """Write ``figure.json`` and draw it."""
        if self.writes:
            self.write("figure.json", {"experiment": self.experiment, **data})
            with files.replacing(self.path / "figure.png") as part:
                plots.draw(self.read("figure.json"), part)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, completely or not at all; it records the number of rows."""
        if self.writes:
            rows = len(self._whole_lines())
            files.save({**state, "rows": rows}, self.path / "checkpoint.pt")

    def checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, on the CPU; None if there is none.

        Raises:
            ValueError: it cannot be read, or differs from what was written.
        """
        path = self.path / "checkpoint.pt"
        return files.load(path) if path.exists() else None

    def drop_checkpoint(self) -> None:
        """Remove the checkpoint of a finished run."""
        if self.writes:
            (self.path / "checkpoint.pt").unlink(missing_ok=True)
            files.sync(self.path)

    def _replace(self, name: str, content: bytes) -> None:
        with files.replacing(self.path / name) as part:
            part.write_bytes(content)


def _check_same(path: Path, mine: dict[str, Any]) -> None:
    try:
        theirs = json.loads((path / "config.json").read_bytes())
    except ValueError as error:
        raise _unreadable(path / "config.json", str(error)) from error
    if not isinstance(theirs, dict):
        raise _unreadable(path / "config.json", "it holds no options")
    for name in (*mine, *theirs):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"--out {path}: it holds a run with {name}={theirs.get(name)!r}, not "
                f"{mine.get(name)!r}; give another folder, or the same options to continue"
            )


def _seal_of(whole: bytes) -> bytes:
    """The number of bytes in the complete rows, and their digest."""
    return f"{len(whole)} {hashlib.sha256(whole).hexdigest()}\n".encode()


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} cannot be read; delete {path.parent} to start anew, or give another folder as "
        f"--out ({why})"
    )


def finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines(value: Mapping[str, Any]) -> str:
    """JSON text with one line for each top-level key."""
    items = (f"{json.dumps(key)}: {json.dumps(v, ensure_ascii=False)}" for key, v in value.items())
    return "{\n" + ",\n".join(items) + "\n}\n"
