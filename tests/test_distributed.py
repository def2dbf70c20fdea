"""Two processes under torchrun: DDP, FSDP2 and torch.distributed.checkpoint."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = ("torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")


@pytest.mark.parametrize("group", ["training", "averages", "checkpoints"])
def test_two_processes(group, tmp_path):
    """See distributed_training.py and so on: they stop at the first failure."""
    env = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",  # is there without any network
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    worker = (str(Path(__file__).parent / "distributed_worker.py"), group, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH, *worker],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    scenarios = importlib.import_module(f"distributed_{group}").SCENARIOS
    names = [scenario.__name__ for scenario in scenarios]
    for rank in range(2):
        assert (tmp_path / f"passed-{rank}").read_text().split() == names
