"""Ways to make one optimizer step with an EMA: ours, torch's, and the bandwidth bound.

Every provider gets the same hyper-parameters: ours as base values and ``KAPPA``, torch's as the
values that those scale to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from fused_ema import FusedScaledAdamW, FusedScaledSGD, scaling

from . import streams

# Large enough that leaving any one of them out shows in the check after a few steps; the time of
# a step does not depend on them.
KAPPA = 2.0
EMA_DECAY = 0.9
LR, BETAS, EPS, MOMENTUM, WEIGHT_DECAY = 1e-2, (0.9, 0.99), 1e-2, 0.9, 0.1

Parameters = list[nn.Parameter]


@dataclass(frozen=True)
class Group:
    """Parameters whose learning rate is ``LR`` times a factor."""

    params: Parameters
    lr_factor: float = 1.0


Groups = Sequence[Group]


@dataclass(frozen=True)
class Spec:
    """One optimizer, ours and torch's.

    base: arguments of ours, at the base batch size.
    scaled: arguments of torch's at ``KAPPA`` times that, for a base learning rate.
    num_states: state tensors that a step reads and writes.
    """

    name: str
    ours: Callable[..., torch.optim.Optimizer]
    torch: Callable[..., torch.optim.Optimizer]
    base: Mapping[str, Any]
    scaled: Callable[[float], Mapping[str, Any]]
    num_states: int

    @property
    def num_arrays(self) -> int:
        """Arrays that a step reads: weights, gradients, states, average. It writes all but one."""
        return 3 + self.num_states

    def make_ours(self, groups: Groups, **flags: Any) -> torch.optim.Optimizer:
        own = [{"params": g.params, "lr": LR * g.lr_factor} for g in groups]
        return self.ours(own, **self.base, **flags)

    def make_torch(self, groups: Groups, **flags: Any) -> torch.optim.Optimizer:
        own = [{"params": g.params, **self.scaled(LR * g.lr_factor)} for g in groups]
        return self.torch(own, **flags)


def scaled_adamw(base_lr: float) -> Mapping[str, Any]:
    lr = scaling.adaptive_lr(base_lr, KAPPA)
    decay = scaling.decoupled_decay(base_lr, lr, WEIGHT_DECAY, KAPPA, "exact")
    return {
        "lr": lr,
        "betas": tuple(1.0 - scaling.beta_weight(beta, KAPPA) for beta in BETAS),
        "eps": scaling.adaptive_eps(EPS, KAPPA),
        "weight_decay": decay / lr,
    }


def scaled_sgd(base_lr: float) -> Mapping[str, Any]:
    return {**SGD, "lr": scaling.sgd_lr(base_lr, KAPPA)}


ADAMW = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
SGD = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
OPTIMIZERS = {
    "adamw": Spec("adamw", FusedScaledAdamW, torch.optim.AdamW, ADAMW, scaled_adamw, num_states=2),
    "sgd": Spec("sgd", FusedScaledSGD, torch.optim.SGD, SGD, scaled_sgd, num_states=1),
}


@dataclass(frozen=True)
class Stepper:
    """What a provider makes of parameters: a step, and where its averages are."""

    step: Callable[[], object]
    emas: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Bound:
    """What moves bytes without arithmetic: it has no result to check.

    arrays: reads and writes of an array that it makes.
    numel: of its arrays, None for as many elements as the case has.
    """

    arrays: int
    numel: int | None = None


class NotOfferedError(Exception):
    """A provider leaves a case out by design; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A way to step, made for one optimizer's hyper-parameters."""

    name: str
    make: Callable[[Groups, Spec], Stepper]
    bound: Bound | None = None


def flat(groups: Groups) -> Parameters:
    return [param for group in groups for param in group.params]


def ours(backend: str) -> Provider:
    def make(groups: Groups, spec: Spec) -> Stepper:
        opt = spec.make_ours(groups, ema_decay=EMA_DECAY, kappa=KAPPA, backend=backend)
        return Stepper(opt.step, lambda: [opt.state[param]["ema"] for param in flat(groups)])

    return Provider(f"fused_ema {backend}", make)


def torch_lerp(implementation: str, **flags: bool) -> Provider:
    """torch's step, then one call that moves all averages."""

    def make(groups: Groups, spec: Spec) -> Stepper:
        opt = spec.make_torch(groups, **flags)
        weights: list[Tensor] = list(flat(groups))
        emas = [weight.detach().clone() for weight in weights]
        new_weight = scaling.ema_weight(EMA_DECAY, KAPPA)

        def step() -> None:
            opt.step()
            with torch.no_grad():
                torch._foreach_lerp_(emas, weights, new_weight)

        return Stepper(step, lambda: emas)

    return Provider(f"torch {implementation} + lerp", make)


def torch_averaged(
    implementation: str, form: str, average: Mapping[str, Any], **flags: bool
) -> Provider:
    """torch's step, then ``AveragedModel.update_parameters``."""

    def make(groups: Groups, spec: Spec) -> Stepper:
        opt = spec.make_torch(groups, **flags)
        module = nn.ParameterList(flat(groups))
        averaged = AveragedModel(module, **average)
        # the first call only copies: from here on it averages, from the same start as the others
        averaged.update_parameters(module)

        def step() -> None:
            opt.step()
            averaged.update_parameters(module)

        return Stepper(step, lambda: list(averaged.parameters()))

    return Provider(f"torch {implementation} + AveragedModel {form}", make)


def stream() -> Provider:
    """A plain loop over five arrays; its parameters come as one flat tensor."""

    def make(groups: Groups, _: Spec) -> Stepper:
        step5 = streams.load()
        (param,) = flat(groups)
        weights = param.detach()
        states = [weights.clone() for _ in range(streams.WRITTEN - 1)]

        def step() -> None:
            step5(weights, param.grad, *states)

        return Stepper(step, list)

    return Provider("stream (bound)", make, Bound(streams.READ + streams.WRITTEN))


def copy() -> Provider:
    """torch's copy between two tensors that no cache holds."""
    numel = 2**27

    def make(groups: Groups, _: Spec) -> Stepper:
        (param,) = flat(groups)
        source = torch.rand(numel, device=param.device)
        target = torch.empty_like(source)
        return Stepper(lambda: target.copy_(source), list)

    return Provider("copy (bound)", make, Bound(2, numel))


def small_chunks() -> Provider:
    """A program for every 128 elements, as in apex's FusedAdamSWA."""

    def make(groups: Groups, spec: Spec) -> Stepper:
        from .small_chunks import SmallChunks  # here, because nothing else needs Triton

        if spec.name != "adamw" or len(groups) > 1:
            raise NotOfferedError("it is AdamW with one param group")
        scaled = spec.scaled(LR * groups[0].lr_factor)
        ema_weight = scaling.ema_weight(EMA_DECAY, KAPPA)
        opt = SmallChunks(groups[0].params, **scaled, ema_weight=ema_weight)
        return Stepper(opt.step, lambda: opt.emas)

    return Provider("Triton, chunks of 128", make)


NATIVE, TRITON, FOREACH, REFERENCE = map(ours, ("native", "triton", "foreach", "reference"))
# As the default chooses between them: ratios are against the first that is right.
PREFERRED = (NATIVE, TRITON, FOREACH, REFERENCE)
PEER = torch_lerp("fused", fused=True)

# "default" leaves every choice to torch. AveragedModel's own default is an equally weighted
# average, no EMA: on a CPU it runs the form of avg_fn, which is given an EMA's weights here.
_DECAY = EMA_DECAY**KAPPA
MULTI = {"multi_avg_fn": get_ema_multi_avg_fn(_DECAY)}
PER_TENSOR = {"avg_fn": get_ema_avg_fn(_DECAY)}
DEFAULT = torch_averaged("default", "(multi_avg_fn)", MULTI)

THEIRS = (
    torch_lerp("for-loop", foreach=False, fused=False),
    torch_lerp("foreach", foreach=True),
    PEER,
    torch_averaged("fused", "(multi_avg_fn)", MULTI, fused=True),
    DEFAULT,
    torch_averaged("default", "(avg_fn)", PER_TENSOR),
)
OURS = (NATIVE, FOREACH, REFERENCE)
BOUND = stream()

# By the type of the device.
PROVIDERS = {
    "cpu": (*OURS, *THEIRS, BOUND),
    "cuda": (NATIVE, TRITON, FOREACH, *THEIRS, small_chunks(), copy()),
}
HOST_PROVIDERS = {"cpu": (NATIVE, PEER), "cuda": (NATIVE, TRITON, PEER)}

# Where time or memory is short: what the default backend is held against.
FEW_PROVIDERS = (NATIVE, PEER, DEFAULT, BOUND)
