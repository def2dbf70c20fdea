"""What an experiment keeps on disk: config, metrics while it runs, a checkpoint, results, figures.

``config.json``, ``metrics.jsonl``, ``checkpoint.pt``, ``summary.json``, ``figure.json`` and
``figure.png``, directly in one folder. The same command with the same folder goes on where it
stopped. Of several processes the first one writes.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import plots
from .config import identity

T = TypeVar("T")


class Folder:
    """A run's folder, new or gone on with.

    Args:
        path: the folder; it is made where it is not there.
        experiment: its name.
        config: its options.
        writes: whether this process is the one that writes.

    Raises:
        ValueError: the folder holds a run of another experiment or of other options, or files that
            are no run's.
    """

    def __init__(self, path: Path, experiment: str, config: Any, writes: bool = True) -> None:
        self.path, self.experiment, self.writes = path, experiment, writes
        self.config = {"experiment": experiment, **identity(config)}
        if (path / "config.json").exists():
            _check_same(path, self.config)
        elif path.is_dir() and any(path.iterdir()):
            raise ValueError(f"--out {path}: it is not empty and holds no config.json of a run")

    def progress(self, items: Iterable[T], title: str) -> Iterable[T]:
        """The items, with a progress bar on standard error."""
        from tqdm import tqdm

        bar: Iterable[T] = tqdm(items, desc=title, disable=not self.writes)
        return bar

    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far; a line that a killed process did not end is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to the metrics, on disk when this returns."""
        if self.writes:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(finite(row), ensure_ascii=False) + "\n")

    def begin(self, count: int = 0) -> None:
        """Make the folder where there is none, and forget all rows but the first ``count``.

        The others are of steps that will be taken again. Nothing is written before this.
        """
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("config.json", self.config)
            kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows()[:count]]
            self._replace("metrics.jsonl", "".join(kept).encode())

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, at once or not at all."""
        if self.writes:
            self._replace(name, lines(finite(value)).encode())

    def read(self, name: str) -> Any:
        """A JSON file of the folder."""
        return json.loads((self.path / name).read_text())

    def write_figure(self, data: Mapping[str, Any]) -> None:
        """Write ``figure.json`` and draw it."""
        if self.writes:
            self.write("figure.json", {"experiment": self.experiment, **data})
            plots.draw(self.read("figure.json"), self.path / "figure.png")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, at once or not at all; it remembers how many rows there are."""
        if self.writes:
            path = self.path / "checkpoint.part"
            torch.save({**state, "rows": len(self.rows())}, path)
            os.replace(path, self.path / "checkpoint.pt")

    def checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, on the CPU; None where there is none.

        Raises:
            ValueError: it cannot be read.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read; delete it to start that run anew") from error
        return state

    def drop_checkpoint(self) -> None:
        """Remove the checkpoint of a run that is finished."""
        if self.writes:
            (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def _replace(self, name: str, content: bytes) -> None:
        part = self.path / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, self.path / name)


def _check_same(path: Path, mine: dict[str, Any]) -> None:
    theirs = json.loads((path / "config.json").read_text())
    for name in (*mine, *theirs):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"--out {path}: it holds a run with {name}={theirs.get(name)!r}, not "
                f"{mine.get(name)!r}; give another folder, or the same options to go on"
            )


def finite(value: Any) -> Any:
    """The value with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines(value: Mapping[str, Any]) -> str:
    """JSON with a line for each key at the top."""
    items = (f"{json.dumps(key)}: {json.dumps(v, ensure_ascii=False)}" for key, v in value.items())
    return "{\n" + ",\n".join(items) + "\n}\n"
