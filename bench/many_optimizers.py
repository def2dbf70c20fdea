"""The host's cost of stepping in the backward pass: an optimizer a parameter, against one for all.

``python -m bench.many_optimizers`` prints medians of the calling thread's CPU time, with tensors
so small that the host's cost is all, and new gradients at every step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_ema import FusedScaledAdamW

from . import machine

Make = Callable[[list[Tensor]], Optimizer]
KINDS: dict[str, Make] = {
    "fused_ema, AdamW + EMA": lambda params: FusedScaledAdamW(params, ema_decay=0.999),
    "torch, AdamW fused, no EMA": lambda params: torch.optim.AdamW(params, fused=True),
}


class Setup:
    """Parameters, and the optimizers that divide them."""

    def __init__(self, make: Make, parameters: int, elements: int, many: bool) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(elements)) for _ in range(parameters)]
        parts = [[param] for param in self.params] if many else [self.params]
        self.optimizers = [make(part) for part in parts]

    def seconds(self) -> float:
        for param in self.params:
            param.grad = torch.ones_like(param)
        start = time.thread_time()
        for optimizer in self.optimizers:
            optimizer.step()
        return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=150)
    parser.add_argument("--elements", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    setups = {
        (kind, many): Setup(make, given.parameters, given.elements, many)
        for kind, make in KINDS.items()
        for many in (False, True)
    }
    rounds = [{key: setup.seconds() for key, setup in setups.items()} for _ in range(given.rounds)]
    print(f"{machine.cpu_model()}, torch {torch.__version__}, commit {machine.commit()}")
    for kind in KINDS:
        one, many = (1e6 * median(r[kind, many] for r in rounds) for many in (False, True))
        print(
            f"{kind}: one optimizer {one:.0f} us, {given.parameters} optimizers {many:.0f} us "
            f"({many / given.parameters:.1f} us each)"
        )


if __name__ == "__main__":
    main()
