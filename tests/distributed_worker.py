"""One of two processes, started by test_distributed.py under torchrun: runs a file of scenarios."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fused_ema.experiments.distributed import processes


def main(group: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with processes(), open(tmp_path / f"passed-{os.environ['RANK']}", "w") as passed:
        for scenario in importlib.import_module(f"distributed_{group}").SCENARIOS:
            scenario(tmp_path)
            print(scenario.__name__, file=passed)
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
