"""Test cases as data; tests cross them with backend, dtype and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from optimizers import OPTIMIZERS, Optimizer

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXACT_DTYPES = (torch.float32, torch.float64)
BACKENDS = ("reference", "foreach", "native", "triton")
DEVICE_BACKENDS = ("triton", "shim")  # whose kernels are meant for a GPU, here on CPU tensors

CHUNK = 32_768
Shape = tuple[int, ...]
VECTOR_EDGES: tuple[Shape, ...] = (
    (0,), (1,), (), (3,), (7,), (8,), (9,), (15,), (16,), (17,), (31,), (33,), (3, 5), (7, 1, 11),
)  # fmt: skip
FEW: tuple[Shape, ...] = ((), (0,), (7,), (5, 3), (33,))
CHANNELS_LAST: tuple[Shape, ...] = ((2, 5, 3, 3), (4, 3, 7, 1))
LARGE: tuple[Shape, ...] = ((1000,), (CHUNK + 7_235,), (9,), CHANNELS_LAST[0])
SHAPE_SETS = {"edges": VECTOR_EDGES, "channels_last": CHANNELS_LAST}


@dataclass(frozen=True)
class Case:
    """One way to use an optimizer.

    torch: the torch.optim class that does the same, if there is one.
    groups: hyper-parameters overridden per param group.
    kappas: the kappa to set before a step, where it changes.
    none_rate: the fraction of steps at which a parameter has no gradient.
    tensor_lr: pass lr as a 0-dim float64 tensor.
    """

    name: str
    optimizer: Optimizer
    kwargs: Mapping[str, Any]
    torch: type[torch.optim.Optimizer] | None = None
    groups: tuple[Mapping[str, Any], ...] = ({},)
    kappas: Mapping[int, float] = field(default_factory=dict)
    none_rate: float = 0.0
    tensor_lr: bool = False

    def __str__(self) -> str:
        return self.name


def warm_up(t: float) -> float:
    return min(0.999, (1 + t) / (10 + t))


def cosine(t: float) -> float:
    return 1 - 0.04 * (1 + math.cos(math.pi * min(t, 60) / 60)) / 2


def like_torch(rule: str, name: str, flags: Mapping[str, Any], **of_case: Any) -> Case:
    """A case without EMA at kappa = 1, with its torch.optim counterpart."""
    optimizer = OPTIMIZERS[rule]
    kwargs = {"lr": 1e-2, **flags}
    return Case(f"{rule}-{name}", optimizer, kwargs, optimizer.theirs, **of_case)


SGD_FLAGS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov-decay-maximize": {
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay": 0.05,
        "maximize": True,
    },
    "dampening-decay-maximize": {
        "momentum": 0.9,
        "dampening": 0.2,
        "weight_decay": 0.05,
        "maximize": True,
    },
}
ADAM_FLAGS = {
    "default": {},
    "eps": {"betas": (0.8, 0.95), "eps": 1e-2},
    "zero-beta1": {"betas": (0.0, 0.99), "eps": 1e-4},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.9)},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "amsgrad-decay-maximize": {
        "amsgrad": True,
        "weight_decay": 0.1,
        "maximize": True,
        "betas": (0.7, 0.9),
        "eps": 1e-3,
    },
}
ADAMW_FLAGS = {name: kwargs for name, kwargs in ADAM_FLAGS.items() if name != "zero-beta1"} | {
    "no-decay": {"weight_decay": 0.0},
    "strong-decay": {"weight_decay": 2.0, "eps": 1e-3},
}
RMSPROP_FLAGS = {
    "default": {},
    "eps": {"alpha": 0.8, "eps": 1e-2},
    "zero-alpha": {"alpha": 0.0, "eps": 1e-2},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True, "eps": 1e-1},
    "all": {
        "momentum": 0.8,
        "centered": True,
        "eps": 1e-1,
        "alpha": 0.9,
        "weight_decay": 0.1,
        "maximize": True,
    },
}
SGD_GROUPS = (
    {"momentum": 0.9, "nesterov": True},
    {"lr": 3e-2, "weight_decay": 0.1},
    {"maximize": True},
)
ADAMW_GROUPS = (
    {"betas": (0.5, 0.9)},
    {"lr": 3e-3, "weight_decay": 0.3, "eps": 1e-2},
    {"amsgrad": True},
)
RMSPROP_GROUPS = (
    {"momentum": 0.9},
    {"centered": True, "lr": 3e-3},
    {"momentum": 0.5, "centered": True, "weight_decay": 0.1},
)
# The flags of torch's optimizers.
FLAGS = {"SGD": SGD_FLAGS, "Adam": ADAM_FLAGS, "AdamW": ADAMW_FLAGS, "RMSprop": RMSPROP_FLAGS}
FLAG_CASES = (
    *(like_torch(rule, name, own) for rule, table in FLAGS.items() for name, own in table.items()),
    like_torch("SGD", "tensor-lr", {"momentum": 0.9}, tensor_lr=True),
    like_torch("AdamW", "tensor-lr", {}, tensor_lr=True),
    like_torch("SGD", "none-gradients", {"momentum": 0.9, "dampening": 0.3}, none_rate=0.3),
    like_torch("AdamW", "none-gradients", {}, none_rate=0.3),
    like_torch("SGD", "groups", {}, groups=SGD_GROUPS),
    like_torch("AdamW", "groups", {}, groups=ADAMW_GROUPS),
    like_torch("RMSprop", "tensor-lr", {}, tensor_lr=True),
    like_torch("RMSprop", "none-gradients", {"momentum": 0.9}, none_rate=0.3),
    like_torch("RMSprop", "groups", {"eps": 1e-1}, groups=RMSPROP_GROUPS),
)

SGD_BASE = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.05, "ema_decay": 0.99}
ADAM_BASE = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-2, "ema_decay": 0.99}
ADAMW_BASE = {"lr": 1e-2, "weight_decay": 0.5, "eps": 1e-2, "ema_decay": 0.99}
RMSPROP_BASE = {
    **{"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-1, "ema_decay": 0.99},
    **{"momentum": 0.9, "centered": True},
}
LARS_BASE = {"lr": 0.5, "weight_decay": 0.05, "trust_coefficient": 0.02, "ema_decay": 0.99}
LAMB_BASE = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-2, "ema_decay": 0.99}
# For every optimizer: what the cases that each rule has start from.
BASES = {
    **{"SGD": SGD_BASE, "Adam": ADAM_BASE, "AdamW": ADAMW_BASE, "RMSprop": RMSPROP_BASE},
    **{"LARS": LARS_BASE, "LAMB": LAMB_BASE},
}
THREE = (0.9, warm_up, 0.9999)


def scaled(name: str, rule: str, **changes: Any) -> Case:
    """A case with EMAs or kappa; `changes` that are fields of Case go there."""
    of_case = {key: changes.pop(key) for key in ("groups", "kappas", "none_rate") if key in changes}
    return Case(f"{rule}-{name}", OPTIMIZERS[rule], {**BASES[rule], **changes}, **of_case)


def per_rule(name: str, **changes: Any) -> tuple[Case, ...]:
    return tuple(scaled(name, rule, **changes) for rule in BASES)


SCALED_SGD_GROUPS = (
    {"kappa": 3.0, "nesterov": True},
    {"ema_decay": None, "lr": 3e-2},
    {"ema_decay": THREE, "momentum": 0.0},
)
SCALED_ADAMW_GROUPS = (
    {"kappa": 3.0, "betas": (0.5, 0.9)},
    {"ema_decay": None, "lr": 3e-3},
    {"ema_decay": (0.5, cosine), "ema_order": "before", "amsgrad": True},
)
SCALED_RMSPROP_GROUPS = (
    {"kappa": 3.0, "alpha": 0.9, "momentum": 0.0},
    {"ema_decay": None, "centered": False},
    {"ema_decay": (0.5, cosine), "ema_order": "before", "momentum": 0.0, "centered": False},
)
CHANGES = {5: 3.0, 17: 0.5, 18: 8.0, 40: 1.0}
SKIPPING = {"ema_decay": (0.9, 0.99), "kappas": {3: 2.5, 25: 0.75}, "none_rate": 0.4}
EXACT = {"momentum_scaling": "exact"}
LINEAR = {"beta_scaling": "linear"}
SCALED_CASES = (
    per_rule("ema")
    + per_rule("ema-before", ema_order="before", kappa=3.0)
    + per_rule("half", kappa=0.5)
    + per_rule("triple", kappa=3.0, ema_decay=THREE)
    + per_rule("eightfold", kappa=8.0)
    + per_rule("no-ema-eightfold", kappa=8.0, ema_decay=None)
    + per_rule("kappa-changes", kappas=CHANGES, ema_decay=THREE)
    + per_rule("schedule", kappa=3.0, ema_decay=cosine, none_rate=0.2)
    + per_rule("ema-none-gradients", **SKIPPING)
    + per_rule("extreme-decays", ema_decay=(0.0, 1.0, 1 - 1e-7), kappa=1.5)
    + (
        scaled("exact", "SGD", **EXACT, kappa=4.0),
        scaled("exact-changes", "SGD", **EXACT, nesterov=True, kappas={4: 6.0, 20: 0.5}),
        scaled("dampening-eightfold", "SGD", dampening=0.3, kappa=8.0),
        scaled("linear", "Adam", **LINEAR, kappa=8.0),
        scaled("linear", "AdamW", **LINEAR, kappa=3.0),
        scaled("unscaled-decay", "AdamW", weight_decay_scaling="none", kappa=8.0),
        scaled("amsgrad-maximize", "AdamW", amsgrad=True, maximize=True, kappa=3.0),
        scaled("exact", "RMSprop", **EXACT, kappa=4.0),
        scaled("exact-changes", "RMSprop", **EXACT, kappas={4: 6.0, 20: 0.5}),
        scaled("scaled-groups", "SGD", groups=SCALED_SGD_GROUPS),
        scaled("scaled-groups", "AdamW", groups=SCALED_ADAMW_GROUPS),
        scaled("scaled-groups", "RMSprop", groups=SCALED_RMSPROP_GROUPS),
        scaled("exact", "LARS", **EXACT, kappa=4.0),
        scaled("exact-changes", "LARS", **EXACT, nesterov=True, kappas={4: 6.0, 20: 0.5}),
        scaled("plain", "LARS", momentum=0.0, eps=1e-2, trust_coefficient=0.1),
        scaled("maximize", "LARS", maximize=True, weight_decay=0.0),
        scaled("adapt", "LARS", groups=({}, {"adapt": False, "lr": 1e-2}, {"kappa": 3.0})),
        scaled("linear", "LAMB", **LINEAR, kappa=8.0),
        scaled("maximize", "LAMB", maximize=True, weight_decay=0.0),
        scaled("zero-beta1", "LAMB", betas=(0.0, 0.99), eps=1e-3),
        scaled("adapt", "LAMB", groups=({}, {"adapt": False, "lr": 3e-3}, {"kappa": 3.0})),
    )
)

ALL_CASES = FLAG_CASES + SCALED_CASES


def by_name(name: str) -> Case:
    return next(case for case in ALL_CASES if case.name == name)


LARGE_CASES = (
    by_name("SGD-triple"),
    by_name("Adam-amsgrad-decay-maximize"),
    by_name("AdamW-triple"),
    by_name("RMSprop-triple"),
    by_name("LARS-triple"),
    by_name("LAMB-triple"),
)
SHAPE_CASES = (
    *LARGE_CASES,
    by_name("SGD-nesterov-decay-maximize"),
    by_name("Adam-ema-none-gradients"),
    by_name("AdamW-default"),
)
