"""docs/frameworks/torchtitan.md in two processes, on a model that FSDP2 shards."""

from __future__ import annotations

from pathlib import Path

from torchrun import run_two


def test_the_page_torchtitan_md_runs_in_two_processes(tmp_path):
    run_two(str(Path(__file__).parent / "torchtitan_worker.py"), str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
