"""Takes a few steps of AdamW with an average, for a profiler or a sanitizer to watch one."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import fused_ema
from bench.cases import CASES, shrunk

STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profiled", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--clip", action="store_true", help="gradients, by their norm")
    args = parser.parse_args()
    shapes = shrunk(CASES[args.case], args.shrink).shapes
    params = [nn.Parameter(torch.randn(shape, device=args.device)) for shape in shapes]
    opt = fused_ema.FusedScaledAdamW(
        params,
        ema_decay=0.999,
        kappa=2.0,
        backend=args.backend,
        max_grad_norm=1.0 if args.clip else None,
    )
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(STEPS):
        opt.step()
    if args.device != "cpu":
        torch.cuda.synchronize()
    print(f"{STEPS} steps, backend {args.backend}, {len(params)} tensors of {args.case}")


if __name__ == "__main__":
    main()
