"""EMACallback in two processes: DDP, and FSDP2 with both kinds of checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrun import run_two

pytest.importorskip("lightning")

# "file" and "dcp" are ModelParallelStrategy's checkpoints.
STRATEGIES = ("ddp", "file", "dcp")


def test_validation_checkpoints_and_resuming(tmp_path):
    """See lightning_worker.py, which stops at the first failure."""
    run_two(str(Path(__file__).parent / "lightning_worker.py"), str(tmp_path), *STRATEGIES)
    passed = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert passed == {f"{name}-{rank}" for name in STRATEGIES for rank in range(2)}
