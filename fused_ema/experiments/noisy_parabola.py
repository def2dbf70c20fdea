"""Noisy parabola: the EMA of SGD on ``a*theta**2/2``, exactly and with the real optimizer.

Section 3.1 of the paper. The base takes ``theta <- theta - lr*g`` with ``g = a*theta + noise``;
at ``kappa`` times the batch the learning rate is ``kappa*lr`` and the noise's variance is divided
by ``kappa``. Step ``j`` then corresponds to base step ``kappa*j``. The equations of the first two
moments of weights and average are closed, so the errors contain no randomness. Runs of
FusedScaledSGD on many independent parabolas show that the optimizer has these moments.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import FusedScaledSGD
from ..ema.decay import EmaOrder
from ..scaling import ema_rate
from ..step.backends import BackendName
from .config import option, positive
from .distributed import Group
from .folder import Folder

ORDERS: tuple[EmaOrder, ...] = ("before", "after")


@dataclass(frozen=True)
class Config:
    """Options of the noisy parabola; presets differ only in the number of simulated parabolas."""

    kappas: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), "batch sizes in base batches"
    )
    lr: float = option(1e-4, "base learning rate")
    rho: float = option(0.9999, "base decay of the average")
    base_steps: int = option(10_000, "steps of the base run")
    a: float = option(1.0, "curvature of the parabola")
    b: float = option(0.5, "gradient noise: variance b*(a*theta)^2 + c at the base batch")
    c: float = option(0.0, "gradient noise: see b")
    start: float = option(1.0, "start of weights and average (not from the paper)")
    parabolas: int = option(256, "independent parabolas of a simulation")
    groups: int = option(60, "simulations at each kappa, with independent noise")
    seed: int = option(0, "seed of the simulation's noise")
    backend: BackendName = option("auto", "backend of the optimizer", identity=False)

    def __post_init__(self) -> None:
        positive(self, "kappas", "lr", "base_steps", "a", "parabolas", "groups")
        if max(self.kappas) > self.base_steps:
            raise ValueError(
                f"kappas={self.kappas} with base_steps={self.base_steps}; allowed: at least one "
                "step at each kappa"
            )


PRESETS = {"quick": Config(), "cifar10": Config(), "paper": Config(parabolas=4096)}


class Moments(NamedTuple):
    """``E[theta]``, ``E[theta**2]``, ``E[zeta]``, ``E[zeta**2]`` and ``E[theta*zeta]``."""

    theta: float
    theta_sq: float
    ema: float
    ema_sq: float
    cross: float

    @property
    def ema_variance(self) -> float:
        """Variance of the average."""
        return self.ema_sq - self.ema**2


def moments(
    config: Config, kappa: int, weight: float, order: EmaOrder, noise_kappa: float | None = None
) -> Iterator[Moments]:
    """The moments at the start and after each step at ``kappa``.

    Args:
        config: the parabola.
        kappa: batch size / base batch size; the learning rate is ``kappa*lr``.
        weight: the EMA rate, ``1 - rho_hat``.
        order: whether the average takes the weights ``"before"`` or ``"after"`` the step.
        noise_kappa: divisor of the noise's variance; None: ``kappa``.
    """
    a, e, w, r = config.a, kappa * config.lr, weight, 1.0 - weight
    q, noise = 1.0 - e * a, e * e / (noise_kappa or kappa)
    m = Moments(*(config.start**power for power in (1, 2, 1, 2, 2)))
    yield m
    for _ in range(config.base_steps // kappa):
        theta = q * m.theta
        theta_sq = q * q * m.theta_sq + noise * (config.b * a * a * m.theta_sq + config.c)
        if order == "before":
            seen, seen_sq, with_ema = m.theta, m.theta_sq, m.cross
            cross = q * (r * m.cross + w * m.theta_sq)
        else:
            seen, seen_sq, with_ema = theta, theta_sq, q * m.cross
            cross = r * with_ema + w * theta_sq
        ema = r * m.ema + w * seen
        ema_sq = r * r * m.ema_sq + 2 * r * w * with_ema + w * w * seen_sq
        m = Moments(theta, theta_sq, ema, ema_sq, cross)
        yield m


def simulate(config: Config, kappa: int, order: EmaOrder) -> tuple[Tensor, Tensor]:
    """Weights and averages ``[groups, parabolas]`` at the end of a run of the real optimizer."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.groups, config.parabolas)
    theta = torch.full(shape, config.start, dtype=torch.float64)
    optimizer = FusedScaledSGD(
        [theta],
        lr=config.lr,
        ema_decay=config.rho,
        ema_order=order,
        kappa=kappa,
        backend=config.backend,
    )
    for _ in range(config.base_steps // kappa):
        gradient = config.a * theta
        variance = (config.b * gradient**2 + config.c) / kappa
        noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        theta.grad = gradient + variance**0.5 * noise
        optimizer.step()
    return theta, optimizer.state[theta]["ema"]


def error(config: Config, base: list[Moments], kappa: int, weight: float, order: EmaOrder) -> float:
    """Largest difference between the expected gradients at the average and at the base run's."""
    scaled = moments(config, kappa, weight, order)
    pairs = zip(base[::kappa], scaled, strict=True)
    return max(abs(config.a * (theirs.ema - ours.ema)) for theirs, ours in pairs)


def best_weight(config: Config, base: list[Moments], kappa: int, order: EmaOrder) -> float:
    """The EMA rate ``1 - rho_hat`` of least error, by a scalar minimiser within a factor of 2."""
    from scipy.optimize import minimize_scalar

    rule = ema_rate(config.rho, kappa)
    found = minimize_scalar(
        lambda factor: error(config, base, kappa, factor * rule, order),
        bounds=(0.5, min(2.0, 1.0 / rule)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(found.x) * rule


def deviations(config: Config, kappa: int, order: EmaOrder) -> dict[str, list[float]]:
    """Distances of each simulation's mean and variance from the moments, in standard errors.

    They are standard normal if the optimizer has these moments (and there are many parabolas).
    """
    *_, expected = moments(config, kappa, ema_rate(config.rho, kappa), order)
    _, ema = simulate(config, kappa, order)
    root = math.sqrt(config.parabolas)
    mean = (ema.mean(1) - expected.ema) / math.sqrt(expected.ema_variance) * root
    squares = (ema - expected.ema) ** 2
    # one deviation for all simulations, because that of few squares depends on their mean
    variance = (squares.mean(1) - expected.ema_variance) / squares.std() * root
    return {"mean": mean.tolist(), "variance": variance.tolist()}


def spread_of(values: list[float]) -> dict[str, float]:
    """Mean and deviation of numbers, and the largest of their magnitudes."""
    found = torch.tensor(values, dtype=torch.float64)
    deviation = found.std(unbiased=len(values) > 1).item()
    largest = found.abs().max().item()
    return {"mean": found.mean().item(), "deviation": deviation, "largest": largest}


def measure(config: Config, base: dict[EmaOrder, list[Moments]], kappa: int) -> dict[str, Any]:
    """A row of the metrics: all measurements at one ``kappa``."""
    rule = ema_rate(config.rho, kappa)
    row: dict[str, Any] = {"kappa": kappa}
    for order, moments_of_base in base.items():
        best = best_weight(config, moments_of_base, kappa, order)
        weights = {
            "rule": rule,
            "none": ema_rate(config.rho),
            "linear": min(kappa * (1 - config.rho), 1.0),
            "best": best,
        }
        for name, weight in weights.items():
            row[f"error_{name}_{order}"] = error(config, moments_of_base, kappa, weight, order)
        row[f"best_rho_{order}"] = 1.0 - best
        row[f"best_weight_over_rule_{order}"] = best / rule
        found = deviations(config, kappa, order)
        row[f"deviations_{order}"] = {name: spread_of(values) for name, values in found.items()}
    scaled = list(moments(config, kappa, rule, "before"))
    undivided = list(moments(config, kappa, rule, "before", noise_kappa=1.0))
    last = base["before"][(len(scaled) - 1) * kappa].ema_variance
    row["variance_ratio"] = scaled[-1].ema_variance / last
    row["variance_ratio_same_noise"] = undivided[-1].ema_variance / last
    return row


def trajectories(config: Config, base: list[Moments], kappa: int) -> dict[str, Any]:
    """The expected average over base steps: of the base run, with the rule, with rho left alone."""
    curves = {
        "base": base[::kappa],
        "rule": list(moments(config, kappa, ema_rate(config.rho, kappa), "before")),
        "none": list(moments(config, kappa, ema_rate(config.rho), "before")),
    }
    return {
        "kappa": kappa,
        "base_steps": [kappa * j for j in range(len(curves["base"]))],
        **{name: [m.ema for m in curve] for name, curve in curves.items()},
    }


SUMMARY = (
    "kappa",
    *(f"error_{name}_{order}" for order in ORDERS for name in ("rule", "none", "linear", "best")),
    *(f"best_rho_{order}" for order in ORDERS),
    "variance_ratio",
)


def run(config: Config, folder: Folder, group: Group) -> None:
    """Measure every ``kappa``; write the metrics, the summary and the figure."""
    weight = ema_rate(config.rho)
    base = {order: list(moments(config, 1, weight, order)) for order in ORDERS}
    folder.take()
    rows = folder.rows()
    group.any(False)  # all processes have read before the first one writes
    folder.begin(len(rows))
    for kappa in folder.progress(config.kappas[len(rows) :], "noisy_parabola"):
        rows.append(measure(config, base, kappa))
        folder.log(rows[-1])
    folder.write("summary.json", {name: [row[name] for row in rows] for name in SUMMARY})
    shown = max((k for k in config.kappas if k <= 256), default=config.kappas[0])
    curves = trajectories(config, base["before"], shown)
    folder.write_figure({"rows": rows, "trajectories": curves})


if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(["noisy_parabola", *sys.argv[1:]]))
