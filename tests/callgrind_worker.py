"""Steps tensors without elements, for callgrind to count the instructions of the host's part.

``valgrind --tool=callgrind --instr-atstart=no python callgrind_worker.py COUNT...`` leaves one dump
for each number of tensors, of one step with new gradients.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from fused_ema import FusedScaledAdamW

# Valgrind is told by instructions that do nothing elsewhere, which its header holds.
SOURCE = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(void) { CALLGRIND_STOP_INSTRUMENTATION; CALLGRIND_DUMP_STATS; }
"""


def marks(folder: Path) -> ctypes.CDLL:
    source, library = folder / "marks.c", folder / "marks.so"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def main(counts: list[int]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        calls = marks(Path(folder))
    for count in counts:
        params = [nn.Parameter(torch.empty(0)) for _ in range(count)]
        opt = FusedScaledAdamW(params, lr=0.1, ema_decay=0.9, kappa=2.0, backend="native")
        for step in range(3):
            grads = [torch.empty(0) for _ in params]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            if step < 2:
                opt.step()
        calls.start()
        opt.step()
        calls.stop()


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
