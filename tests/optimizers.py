"""The optimizers as tests know them: one record each. Their cases are in cases.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from oracles import OracleConfig
from oracles.adam import Adam, AdamW
from oracles.lamb import Lamb
from oracles.lars import Lars
from oracles.rmsprop import Rmsprop
from oracles.sgd import Sgd

import fused_ema

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Optimizer:
    """One optimizer of fused_ema, and what belongs to it alone.

    ours: its class.
    theirs: the class of torch.optim that does the same, if there is one.
    oracle: its float64 oracle, with torch's names of the states.
    settings: options that theirs takes too. Together they need every state and every kernel of
        the rule. The first is for tests that take one.
    numbers: what gradients reach with differentiable=True; betas one by one.
    numbers_in_torch: those that they reach in theirs.
    settings_in_torch: the settings whose steps theirs differentiates. It detaches SGD's first
        momentum, and writes over what the derivatives of amsgrad's maximum and of RMSprop's
        centered average need.
    formulas: options that change how the numbers enter a step.
    scalars: three rows of its kernels' table, in the order of the rule's record. Flags are off and
        on, decays are none and some, and rates of lerp are on both sides of 1/2.
    folded: numbers from which devices fold their scalars, all with the same states.
    adaptive: whether a step is divided by the root of squares: then a finite gradient moves a
        weight by a finite amount, and the kernels divide.
    draw: random options; those that all optimizers have are drawn elsewhere.
    """

    ours: type[fused_ema.FusedScaledOptimizer]
    theirs: type[torch.optim.Optimizer] | None
    oracle: type[OracleConfig]
    settings: Mapping[str, Options]
    numbers: Mapping[str, float]
    numbers_in_torch: tuple[str, ...]
    settings_in_torch: tuple[str, ...]
    formulas: tuple[Options, ...]
    scalars: tuple[tuple[float, ...], ...]
    folded: tuple[Options, ...]
    adaptive: bool
    draw: Callable[[Random], dict[str, Any]]

    @property
    def name(self) -> str:
        return self.ours.__name__.removeprefix("FusedScaled")

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> Options:
        return next(iter(self.settings.values()))

    def config(self, kwargs: Options) -> OracleConfig:
        """The oracle's view of keyword arguments, with torch's defaults."""
        decay = kwargs.get("ema_decay")
        decays = () if decay is None else decay if isinstance(decay, tuple) else (decay,)
        lr = float(kwargs.get("lr", 1e-3))
        return self.oracle(**{**kwargs, "lr": lr, "ema_decay": decays})

    def states(self, options: Options) -> tuple[str, ...]:
        """Those that a group with these options needs, in the kernels' order."""
        (group,) = self.ours([torch.zeros(1, requires_grad=True)], **options).param_groups
        return self.ours.rule.states(group)


def draw_sgd(rng: Random) -> dict[str, Any]:
    momentum = rng.choice((0.0, 0.9))
    nesterov = momentum > 0 and rng.random() < 0.4
    return {
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": 0.0 if nesterov else rng.choice((0.0, 0.3)),
        "momentum_scaling": rng.choice(("none", "exact")),
    }


def draw_adam(rng: Random) -> dict[str, Any]:
    return {
        "eps": rng.choice((1e-2, 1e-3)),
        "amsgrad": rng.random() < 0.3,
        "betas": rng.choice(((0.9, 0.999), (0.5, 0.9), (0.0, 0.99))),
    }


def draw_rmsprop(rng: Random) -> dict[str, Any]:
    return {
        "alpha": rng.choice((0.99, 0.9)),
        "eps": rng.choice((1e-1, 1e-2)),
        "momentum": rng.choice((0.0, 0.9)),
        "centered": rng.random() < 0.4,
        "momentum_scaling": rng.choice(("none", "exact")),
    }


def draw_lars(rng: Random) -> dict[str, Any]:
    momentum = rng.choice((0.0, 0.9))
    return {
        "momentum": momentum,
        "nesterov": momentum > 0 and rng.random() < 0.4,
        "trust_coefficient": rng.choice((0.1, 0.02)),
        "eps": rng.choice((1e-2, 1e-8)),
        "momentum_scaling": rng.choice(("none", "exact")),
        "adapt": rng.random() < 0.8,
    }


def draw_lamb(rng: Random) -> dict[str, Any]:
    return {
        "eps": rng.choice((1e-2, 1e-3)),
        "betas": rng.choice(((0.9, 0.999), (0.5, 0.9), (0.0, 0.99))),
        "adapt": rng.random() < 0.8,
    }


SGD = Optimizer(
    ours=fused_ema.FusedScaledSGD,
    theirs=torch.optim.SGD,
    oracle=Sgd,
    settings={
        "momentum": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "plain": {"maximize": True},
    },
    numbers={"lr": 0.1, "weight_decay": 0.2, "momentum": 0.7, "dampening": 0.1},
    numbers_in_torch=("lr", "weight_decay"),
    settings_in_torch=("plain",),
    formulas=({}, {"nesterov": True, "dampening": 0.0}, {"momentum_scaling": "exact"}),
    scalars=(
        (1.0, 0.0, 0.9, 0.7, 0.8, 0.0, 0.1),
        (-1.0, 0.2, 0.6, 0.5, 0.4, 1.0, 0.03),
        (0.3, 0.3, 0.9, 0.0, 1.0, 1.0, 0.5),
    ),
    folded=(
        {"lr": 0.125, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 1e-3, "momentum": 0.99},
        {"lr": 0.5, "momentum": 1.0},
    ),
    adaptive=False,
    draw=draw_sgd,
)
ADAM = Optimizer(
    ours=fused_ema.FusedScaledAdam,
    theirs=torch.optim.Adam,
    oracle=Adam,
    settings={
        "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
        "plain": {},
        "l2": {"weight_decay": 0.1, "maximize": True},
    },
    numbers={"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "eps": 0.1},
    numbers_in_torch=("lr", "beta1", "beta2", "weight_decay"),
    settings_in_torch=("plain", "l2"),
    formulas=({"amsgrad": True}, {"beta_scaling": "linear"}),
    scalars=(
        (1.0, 0.2, 0.01, 0.1, 0.001, 0.002, 1e-8),
        (-1.0, 0.0, 0.0, 0.7, 0.6, 0.03, 1e-3),
        (0.3, 0.3, 0.04, 0.5, 0.1, 0.7, 0.0),
    ),
    folded=(
        {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1},
        {"lr": 0.25, "betas": (0.0, 0.98), "eps": 1e-3},
    ),
    adaptive=True,
    draw=draw_adam,
)
ADAMW = Optimizer(
    ours=fused_ema.FusedScaledAdamW,
    theirs=torch.optim.AdamW,
    oracle=AdamW,
    settings={
        "decay": {"weight_decay": 0.1},
        "amsgrad": {"amsgrad": True},
        "maximize": {"maximize": True},
    },
    numbers=ADAM.numbers,
    numbers_in_torch=ADAM.numbers_in_torch,
    settings_in_torch=("decay", "maximize"),
    formulas=(
        {},
        {"weight_decay_scaling": "none", "ema_decay": 0.9},
        {"beta_scaling": "linear"},
    ),
    scalars=ADAM.scalars,
    folded=ADAM.folded,
    adaptive=True,
    draw=draw_adam,
)

RMSPROP = Optimizer(
    ours=fused_ema.FusedScaledRMSprop,
    theirs=torch.optim.RMSprop,
    oracle=Rmsprop,
    settings={
        "centered-momentum": {"centered": True, "momentum": 0.9, "eps": 1e-2},
        "momentum": {"momentum": 0.9, "weight_decay": 0.1},
        "centered": {"centered": True, "eps": 1e-2, "maximize": True},
        "plain": {"alpha": 0.9},
    },
    numbers={
        **{"lr": 0.1, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.2, "momentum": 0.7},
    },
    numbers_in_torch=("eps", "momentum"),
    settings_in_torch=("momentum", "plain"),
    formulas=({"centered": True}, {"maximize": True}, {"momentum_scaling": "exact"}),
    scalars=(
        (1.0, 0.0, 0.1, 1e-8, 0.9, 1.0, 0.1),
        (-1.0, 0.2, 0.7, 1e-3, 0.5, 1.7, 0.03),
        (0.3, 0.3, 0.5, 0.0, 0.0, 0.2, 0.5),
    ),
    folded=(
        {"lr": 0.125, "alpha": 0.99, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 1e-3, "alpha": 0.0, "eps": 1e-3, "momentum": 0.99},
        {"lr": 0.5, "alpha": 1.0, "momentum": 1.0},
    ),
    adaptive=True,
    draw=draw_rmsprop,
)

LARS = Optimizer(
    ours=fused_ema.FusedScaledLARS,
    theirs=None,
    oracle=Lars,
    settings={
        "momentum": {"weight_decay": 0.1, "trust_coefficient": 0.02},
        "nesterov": {"nesterov": True, "momentum": 0.8, "eps": 1e-2},
        "plain": {"momentum": 0.0, "maximize": True, "trust_coefficient": 0.02},
    },
    numbers={
        **{"lr": 0.1, "weight_decay": 0.2, "momentum": 0.7},
        **{"trust_coefficient": 0.5, "eps": 0.1},
    },
    numbers_in_torch=(),
    settings_in_torch=(),
    formulas=({}, {"nesterov": True}, {"momentum_scaling": "exact"}),
    scalars=(
        (1.0, 0.0, 0.9, 0.7, 0.8, 0.0, 0.1, 0.02, 1e-8, 1.0),
        (-1.0, 0.2, 0.6, 0.5, 0.4, 1.0, 0.03, 0.5, 1e-3, 1.0),
        (0.3, 0.3, 0.9, 0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 0.0),
    ),
    folded=(
        {"lr": 0.125, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 1e-3, "momentum": 0.99, "trust_coefficient": 0.02, "eps": 1e-3},
        {"lr": 0.5, "momentum": 1.0, "trust_coefficient": 1.0},
    ),
    adaptive=False,
    draw=draw_lars,
)
LAMB = Optimizer(
    ours=fused_ema.FusedScaledLAMB,
    theirs=None,
    oracle=Lamb,
    settings={
        "decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True, "eps": 1e-3},
        "alone": {"adapt": False},
    },
    numbers={"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "eps": 0.1},
    numbers_in_torch=(),
    settings_in_torch=(),
    formulas=({}, {"maximize": True}, {"beta_scaling": "linear"}, {"adapt": False}),
    scalars=(
        (1.0, 0.2, 0.1, 0.001, 0.6, 1e-6, 0.01, 1.0),
        (-1.0, 0.0, 0.7, 0.6, 1.3, 1e-3, 0.03, 1.0),
        (0.3, 0.3, 0.5, 0.1, 0.9, 0.0, 0.7, 0.0),
    ),
    folded=ADAM.folded,
    adaptive=True,
    draw=draw_lamb,
)

OPTIMIZERS = {o.name: o for o in (SGD, ADAM, ADAMW, RMSPROP, LARS, LAMB)}
# Those that step the parts of parameters that are sharded.
SHARDABLE = {name: o for name, o in OPTIMIZERS.items() if not o.ours.rule.takes_norms}
SETTINGS = {
    f"{optimizer}-{name}": (optimizer, options)
    for optimizer in OPTIMIZERS.values()
    for name, options in optimizer.settings.items()
}
IN_TORCH = {name: pair for name, pair in SETTINGS.items() if pair[0].theirs is not None}

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
each_in_torch = pytest.mark.parametrize(
    "optimizer", [o for o in OPTIMIZERS.values() if o.theirs is not None], ids=str
)
each_setting = pytest.mark.parametrize(("optimizer", "options"), SETTINGS.values(), ids=SETTINGS)
each_setting_in_torch = pytest.mark.parametrize(
    ("optimizer", "options"), IN_TORCH.values(), ids=IN_TORCH
)

# The first of each rule.
OF_RULE = {o.ours.rule.name: o for o in reversed(OPTIMIZERS.values())}
SCALARS = {"frozen": ((), (), ()), **{rule: o.scalars for rule, o in OF_RULE.items()}}
ADAPTIVE_RULES = {o.ours.rule.name for o in OPTIMIZERS.values() if o.adaptive}
STATE_NAMES = tuple(
    dict.fromkeys(name for o in OPTIMIZERS.values() for name in o.oracle.state_names)
)

# What kernels are compiled for, by the names of rule and variant.
RULE_VARIANTS = tuple(
    (name, variant) for name, rule in fused_ema.rules.RULES.items() for variant in rule.variants
)
