"""Measures the error of 16-bit averages; prints tables in Markdown.

``python -m bench.ema_error`` measures it on weights that travel to an independent target, and in
the training of a small network on scikit-learn's digits. Then it measures how the error of long
averages adds up on weights that never rest. It takes about two and a half minutes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_ema import FusedScaledAdamW, FusedScaledSGD
from fused_ema.ema import formats
from fused_ema.ema.decay import ema_keys

RHOS = (0.99, 0.999, 0.9999)
STEPS = 10_000
LONG_RHOS = (0.9999, 0.99999, 0.999999)
LONG_STEPS = 100_000
KINDS = ("full", "nearest", "bf16", "delta")
NAMES = {
    "full": "float32",
    "nearest": "bfloat16, to nearest",
    "bf16": '`"bf16"`',
    "delta": '`"delta"`',
}
Run = Iterator[tuple[Sequence[Tensor], list[list[Tensor]]]]


def travelling(form: str) -> Run:
    """SGD whose gradients lead evenly from random weights to other ones."""
    generator = torch.Generator().manual_seed(0)
    start, target = (torch.randn(20_000, generator=generator) for _ in "ab")
    p = nn.Parameter(start.clone())
    opt = FusedScaledSGD([p], lr=1.0, ema_decay=RHOS, ema_format=form)
    for _ in range(STEPS):
        p.grad = (start - target) / STEPS
        opt.step()
        yield [p], averages(opt, [p])


def training(form: str) -> Run:
    """AdamW on a network of 64-128-10 and random batches of 128 digits."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16.0, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    params = list(model.parameters())
    opt = FusedScaledAdamW(params, lr=1e-3, weight_decay=0.05, ema_decay=RHOS, ema_format=form)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (128,))
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        opt.step()
        yield params, averages(opt, params)


def unresting(form: str) -> Run:
    """SGD on a parabola whose gradients are noisy: weights around 1 that move by 1 % a step."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.ones(256))
    opt = FusedScaledSGD([p], lr=0.01, ema_decay=LONG_RHOS, ema_format=form)
    for step in range(LONG_STEPS):
        p.grad = p.detach() - 2.0 * step / LONG_STEPS + torch.randn(256, generator=generator)
        opt.step()
        yield [p], averages(opt, [p])


def averages(opt: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[list[Tensor]]:
    """The values of the optimizer's averages, by decay."""
    keys = ema_keys(len(opt.param_groups[0]["ema_decay"]))
    return [[formats.average(opt.state[p][key], p.detach()) for p in params] for key in keys]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().ravel() for tensor in tensors])


def errors(
    run: Callable[[str], Run], kind: str, rhos: Sequence[float] = RHOS
) -> list[tuple[float, float]]:
    """For each decay, the error relative to the weights, and to the average's distance to them."""
    exact: list[Tensor] = []
    nearest: list[Tensor] = []
    for params, held in run("full" if kind == "nearest" else kind):
        weights = flat(params)
        if not exact:
            # the optimizer's averages start before the first step; these start from theirs after it
            exact = [flat(average) for average in held]
            nearest = [average.float().bfloat16() for average in exact]
            continue
        exact = [rho * old + (1.0 - rho) * weights for rho, old in zip(rhos, exact, strict=True)]
        nearest = [
            old.float().lerp(weights.float(), 1.0 - rho).bfloat16()
            for rho, old in zip(rhos, nearest, strict=True)
        ]
    found = [n.double() for n in nearest] if kind == "nearest" else [flat(h) for h in held]
    return [
        (float((f - e).norm() / weights.norm()), float((f - e).norm() / (e - weights).norm()))
        for f, e in zip(found, exact, strict=True)
    ]


def percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value >= 1e-5 else "< 0.001 %"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ema_error", description=__doc__)
    parser.add_argument("--long", action="store_true", help="run only the last part")
    long = parser.parse_args(argv).long
    warnings.simplefilter("ignore")  # the warning is about long averages, which are measured here
    tables = (
        ("travelling weights", travelling, RHOS),
        ("digits, AdamW", training, RHOS),
        ("weights that never rest, 100,000 steps", unresting, LONG_RHOS),
    )
    for title, run, rhos in tables[2 if long else 0 :]:
        print(f"| {title} | " + " | ".join(f"ρ = {rho}" for rho in rhos) + " |")
        print("|---|" + "---|" * len(rhos))
        for kind in KINDS:
            cells = [f"{percent(a)}, {percent(b)}" for a, b in errors(run, kind, rhos)]
            print(f"| {NAMES[kind]} | " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
