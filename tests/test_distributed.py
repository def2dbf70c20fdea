"""Two processes under torchrun: DDP, FSDP2 and torch.distributed.checkpoint."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from torchrun import run_two


@pytest.mark.parametrize("group", ["training", "averages", "checkpoints"])
def test_two_processes(group, tmp_path):
    """See distributed_training.py and so on: they stop at the first failure."""
    worker = (str(Path(__file__).parent / "distributed_worker.py"), group, str(tmp_path))
    run_two(*worker)
    scenarios = importlib.import_module(f"distributed_{group}").SCENARIOS
    names = [scenario.__name__ for scenario in scenarios]
    for rank in range(2):
        assert (tmp_path / f"passed-{rank}").read_text().split() == names
