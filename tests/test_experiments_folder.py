"""A run's folder: one run at a time, files that are whole, and none that is read unchecked."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for module in ("jiwer", "matplotlib", "scipy", "sklearn", "timm", "torchvision", "tqdm"):
    pytest.importorskip(module)

from fused_ema.experiments import __main__ as command  # noqa: E402
from fused_ema.experiments import files, polyak  # noqa: E402
from fused_ema.experiments.distributed import Group  # noqa: E402
from fused_ema.experiments.folder import Folder  # noqa: E402
from fused_ema.experiments.noisy_parabola import PRESETS  # noqa: E402

TESTS = Path(__file__).parent
CONFIG = PRESETS["quick"]
HOLD = """
import sys, time
from pathlib import Path
from fused_ema.experiments import files
files.lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def make(path: Path) -> Folder:
    """The folder of a run with two rows and a checkpoint."""
    folder = Folder(path, "noisy_parabola", CONFIG)
    folder.begin()
    folder.log({"kappa": 1, "loss": 0.5})
    folder.save_checkpoint({"run": "a", "weights": torch.arange(40.0), "epoch": 3})
    folder.log({"kappa": 2, "loss": 0.25})
    return folder


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def error_of(arguments: list[str]) -> str:
    """What the command line says instead of running."""
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    text = str(stop.value.code)
    assert text.startswith("error: ")
    assert "\n" not in text
    return text


def test_any_flipped_bit_of_a_checkpoint_is_told(tmp_path):
    folder = make(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    bits = random.Random(0).sample(range(8 * len(whole)), 60)
    last = 8 * len(whole)
    for bit in [*bits, 0, last - 1, last - 8 * files.DIGEST - 1]:
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(ValueError, match=r"checkpoint.pt cannot be read; delete it to start"):
            folder.checkpoint()
    path.write_bytes(whole)
    state = folder.checkpoint()
    assert state["rows"] == 1
    assert torch.equal(state["weights"], torch.arange(40.0))


def test_a_checkpoint_that_is_cut_off_or_foreign_is_told(tmp_path):
    folder = make(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for content in (b"", whole[:10], whole[:-1], whole[: -files.DIGEST], whole + b"x", b"hello"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.pt cannot be read; delete it to start"):
            folder.checkpoint()
    torch.save({"run": "a"}, path)
    with pytest.raises(ValueError, match="or not a checkpoint of this version"):
        folder.checkpoint()


def test_nothing_of_a_damaged_checkpoint_is_interpreted(tmp_path, monkeypatch):
    folder = make(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(flipped(path.read_bytes(), 4000))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="its checksum differs"):
        folder.checkpoint()


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.sha256"])
def test_any_flipped_bit_of_the_metrics_is_told(name, tmp_path):
    folder = make(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    damaged = [flipped(whole, bit) for bit in range(0, 8 * len(whole), 3)]
    for content in (*damaged, b"", whole[:-2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics.jsonl cannot be read; delete"):
            folder.rows()
    path.unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl cannot be read; delete"):
        folder.rows()
    path.write_bytes(whole)
    assert [row["loss"] for row in folder.rows()] == [0.5, 0.25]


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null"])
def test_a_damaged_config_is_told_by_the_command_line(content, tmp_path):
    make(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    text = error_of(["noisy_parabola", "--out", str(tmp_path)])
    assert f"{tmp_path}/config.json cannot be read; delete {tmp_path} to start anew" in text


def test_damaged_metrics_are_told_by_the_command_line(tmp_path):
    make(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.35"))
    text = error_of(["noisy_parabola", "--out", str(tmp_path)])
    assert f"{path} cannot be read" in text
    assert "--out" in text


def test_what_is_no_folder_is_told_by_the_command_line(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    text = error_of(["noisy_parabola", "--out", str(path)])
    assert text == f"error: --out {path}: it is no folder; give another"
    text = error_of(["noisy_parabola", "--out", str(path / "below")])
    assert str(path / "below") in text


@pytest.mark.parametrize("part", ["half a line", '{"kappa": 3}\n{"ka'])
def test_rows_that_a_killed_process_did_not_end_are_left_out(part, tmp_path):
    """And do not come back, or run into the next row."""
    folder = make(tmp_path)
    rows = folder.rows()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(part)
    assert folder.rows() == rows
    folder.log({"kappa": 4})
    assert folder.rows() == [*rows, {"kappa": 4}]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    folder = make(tmp_path)
    calls = []

    def record(owner, name, describe):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: (calls.append(describe(*a)), call(*a))[1])

    record(os, "fsync", lambda number: ("fsync", Path(os.readlink(f"/proc/self/fd/{number}"))))
    record(os, "replace", lambda a, b: ("replace", Path(a), Path(b)))
    for _ in range(2):
        folder.save_checkpoint({"run": "b"})
        folder.write("summary.json", {})
    names = 2 * [tmp_path / name for name in ("checkpoint.pt", "summary.json")]
    parts = [call[1] for call in calls[::3]]
    assert calls == [
        call
        for part, name in zip(parts, names, strict=True)
        for call in (("fsync", part), ("replace", part, name), ("fsync", tmp_path))
    ]
    assert len({*parts, *names}) == 4 + 2  # no two parts have one name
    assert all(part.parent == tmp_path for part in parts)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for write in (folder.save_checkpoint, folder.log, lambda row: folder.write("config.json", row)):
        with pytest.raises(OSError, match="no space"):
            write({"run": "b"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_parts_of_killed_processes_are_removed_and_no_other_files(tmp_path):
    (tmp_path / f"{files.PART}0123-checkpoint.pt").write_text("")
    (tmp_path / files.LOCK).write_text("process 1 on a machine of old")
    with Folder(tmp_path, "noisy_parabola", CONFIG) as folder:
        folder.begin()
        (tmp_path / "notes.part").write_text("")
        (tmp_path / f"{files.PART}4567-figure.png").write_text("")
        folder.begin()
    names = {"config.json", "metrics.jsonl", "metrics.sha256", "notes.part"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_run_that_is_interrupted_without_a_word_says_that_it_stopped(
    tmp_path, monkeypatch, capsys
):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "rows", stop)
    assert command.main(["noisy_parabola", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "Stopped.\n"
    assert not (tmp_path / "out" / files.LOCK).exists()


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    """A killed one is none; what the second one was told, it did not touch."""
    before = make(tmp_path).rows()
    files.unlock(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            text = error_of(["noisy_parabola", "--out", str(tmp_path)])
            assert f"error: --out {tmp_path}: process {holder.pid} on " in text
            assert "stop that run or let it end, or give another folder" in text
            assert Folder(tmp_path, "noisy_parabola", CONFIG).rows() == before
            # only the process that writes asks for it
            Folder(tmp_path, "noisy_parabola", CONFIG, writes=False).begin()
        finally:
            holder.send_signal(signal.SIGKILL)
    with Folder(tmp_path, "noisy_parabola", CONFIG) as folder:
        folder.begin(2)
        assert folder.rows() == before
        assert (tmp_path / files.LOCK).exists()
    assert not (tmp_path / files.LOCK).exists()


def test_a_lock_belongs_to_the_process(tmp_path):
    """Taking it twice is taking it once, and a folder made anew is another one."""
    files.lock(tmp_path)
    files.lock(tmp_path)
    (tmp_path / files.LOCK).unlink()
    files.lock(tmp_path)
    assert (tmp_path / files.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    files.unlock(tmp_path)
    files.unlock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_processes_or_versions_is_told(tmp_path, monkeypatch):
    config = dataclasses.replace(
        polyak.PRESETS["quick"], train_size=64, base_batch=16, epochs=2, seeds=1, kappas=(1.0,),
        optimizers=("SGD",),
    )  # fmt: skip
    state = {"run": "SGD, kappa 1, seed 0", "generators": [None, None], "rows": 0}
    for found, why in ((state, "it is of 2 processes, not 1"), ({**state, "generators": [0]}, "")):
        folder = Folder(tmp_path, "polyak", config)
        folder.begin()
        files.save(found, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=f"checkpoint.pt does not fit the run; delete .*{why}"):
            polyak.run(config, folder, Group())


def test_runs_that_were_killed_or_interrupted_at_any_moment_go_on_bit_by_bit(tmp_path):
    """Also where the second Ctrl-C comes within a step or a write: all files are the same."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "experiments_worker.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    *stopped, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("killed", "interrupted", "whole")
    )
    assert len(whole) == 6
    rows = [json.loads(line) for line in whole["metrics.jsonl"].splitlines()]
    assert [row.get("samples") for row in rows] == [0, 64, 128, None]
    for files_of_it in stopped:
        assert files_of_it == whole
