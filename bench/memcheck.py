"""Takes a few steps with every backend on awkward tensors, for a sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m bench.memcheck --device cuda

The variable gives every tensor its own memory. In torch's cache, an access past the end of one
tensor hits another, which no sanitizer sees. The tests check whether results are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import nn

import fused_ema

BACKENDS = ("native", "triton", "foreach", "reference")
KERNELS = ("native", "triton")  # backends with their own kernels; the others launch torch's
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STEPS = 4

# Shapes without elements, with less than a vector, and with more than a chunk and a tail.
SHAPES = ((), (0,), (1,), (7,), (33,), (300, 41), (4, 3, 7, 5), (70_001,))
OFFSETS = (0, 1)  # in elements from an aligned address

RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FusedScaledSGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "ema_order": "before"}),
    ("FusedScaledAdam", {"amsgrad": True, "weight_decay": 0.1, "max_grad_norm": 1.0}),
    ("FusedScaledAdamW", {"ema_decay": (0.9, 0.99, 0.999), "kappa": 2.0}),
    ("FusedScaledAdamW", {"master_weights": True, "max_grad_norm": 1.0}),
    ("FusedScaledSGD", {"momentum": 0.9, "ema_decay": (0.9, 0.99), "ema_format": "bf16"}),
    ("FusedScaledAdam", {"amsgrad": True, "ema_decay": (0.9, 0.99), "ema_format": "delta"}),
    ("FusedScaledAdamW", {"master_weights": True, "state_format": "bf16", "ema_format": "delta"}),
)


def tensors(dtype: torch.dtype, device: torch.device) -> Iterator[torch.Tensor]:
    for shape in SHAPES:
        for offset in OFFSETS:
            flat = torch.rand(prod(shape) + offset, dtype=dtype, device=device)
            yield flat[offset:].view(shape)


def take_steps(
    backend: str, rule: str, flags: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    params = [nn.Parameter(tensor) for tensor in tensors(dtype, device)]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 1e-3}]
    opt = getattr(fused_ema, rule)(groups, backend=backend, **{"ema_decay": 0.9, **flags})
    for step in range(STEPS):
        for k, (param, grad) in enumerate(zip(params, tensors(dtype, device), strict=True)):
            param.grad = None if (step + k) % 5 == 4 else grad
        opt.step()
    if not all(param.isfinite().all() for param in params):
        raise FloatingPointError(f"{backend}, {rule}, {dtype}: weights are not finite")


def runs(backends: Sequence[str], device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The combinations of backend, rule, flags and dtype."""
    for backend in backends:
        own = backend in KERNELS
        places = (False, True) if own and device.type != "cpu" else (False,)
        for (rule, flags), capturable in product(RULES, places):
            for dtype in DTYPES if own else DTYPES[:1]:
                if dtype == torch.float64 and "ema_format" in flags:
                    continue  # 16-bit averages need float32 arithmetic
                yield backend, rule, {**flags, "capturable": capturable}, dtype


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memcheck", description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    args = parser.parse_args(argv)
    for run in runs(args.backends, args.device):
        print(*run, flush=True)
        take_steps(*run, args.device)


if __name__ == "__main__":
    main()
