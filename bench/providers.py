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


@dataclass(frozen=True)
class Spec:
    """One optimizer, ours and torch's.

    base: arguments of ours, at the base batch size.
    scaled: arguments of torch's, at ``KAPPA`` times that.
    num_states: state tensors that a step reads and writes.
    """

    name: str
    ours: Callable[..., torch.optim.Optimizer]
    torch: Callable[..., torch.optim.Optimizer]
    base: Mapping[str, Any]
    scaled: Mapping[str, Any]
    num_states: int

    @property
    def num_arrays(self) -> int:
        """Arrays that a step reads: weights, gradients, states, average. It writes all but one."""
        return 3 + self.num_states


def adamw() -> Spec:
    lr = scaling.adaptive_lr(LR, KAPPA)
    decay = scaling.decoupled_decay(LR, lr, WEIGHT_DECAY, KAPPA, "exact")
    scaled = {
        "lr": lr,
        "betas": tuple(1.0 - scaling.beta_weight(beta, KAPPA) for beta in BETAS),
        "eps": scaling.adaptive_eps(EPS, KAPPA),
        "weight_decay": decay / lr,
    }
    base = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    return Spec("adamw", FusedScaledAdamW, torch.optim.AdamW, base, scaled, num_states=2)


def sgd() -> Spec:
    base = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    scaled = {**base, "lr": scaling.sgd_lr(LR, KAPPA)}
    return Spec("sgd", FusedScaledSGD, torch.optim.SGD, base, scaled, num_states=1)


OPTIMIZERS = {spec.name: spec for spec in (adamw(), sgd())}


@dataclass(frozen=True)
class Stepper:
    """What a provider makes of parameters: a step, and where its averages are."""

    step: Callable[[], object]
    emas: Callable[[], Sequence[Tensor]]


Parameters = list[nn.Parameter]


@dataclass(frozen=True)
class Provider:
    """A way to step, made for one optimizer's hyper-parameters.

    is_bound: moves the bytes without the arithmetic, so there is no result to check.
    """

    name: str
    make: Callable[[Parameters, Spec], Stepper]
    is_bound: bool = False


def ours(backend: str) -> Provider:
    def make(params: Parameters, spec: Spec) -> Stepper:
        opt = spec.ours(params, **spec.base, ema_decay=EMA_DECAY, kappa=KAPPA, backend=backend)
        return Stepper(opt.step, lambda: [opt.state[param]["ema"] for param in params])

    return Provider(f"fused_ema {backend}", make)


def torch_lerp(implementation: str, **flags: bool) -> Provider:
    """torch's step, then one call that moves all averages."""

    def make(params: Parameters, spec: Spec) -> Stepper:
        opt = spec.torch(params, **spec.scaled, **flags)
        weights: list[Tensor] = list(params)
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

    def make(params: Parameters, spec: Spec) -> Stepper:
        opt = spec.torch(params, **spec.scaled, **flags)
        module = nn.ParameterList(params)
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

    def make(params: Parameters, _: Spec) -> Stepper:
        step5 = streams.load()
        (param,) = params
        weights = param.detach()
        states = [weights.clone() for _ in range(streams.WRITTEN - 1)]

        def step() -> None:
            step5(weights, param.grad, *states)

        return Stepper(step, list)

    return Provider("stream (bound)", make, is_bound=True)


BASELINE = ours("native")
OURS = (BASELINE, ours("foreach"), ours("reference"))
PEER = torch_lerp("fused", fused=True)
BOUND = stream()

# "default" leaves every choice to torch. AveragedModel's own default is an equally weighted
# average, no EMA: on a CPU it runs the form of avg_fn, which is given an EMA's weights here.
_DECAY = EMA_DECAY**KAPPA
MULTI = {"multi_avg_fn": get_ema_multi_avg_fn(_DECAY)}
PER_TENSOR = {"avg_fn": get_ema_avg_fn(_DECAY)}
DEFAULT = torch_averaged("default", "(multi_avg_fn)", MULTI)

PROVIDERS = (
    *OURS,
    torch_lerp("for-loop", foreach=False, fused=False),
    torch_lerp("foreach", foreach=True),
    PEER,
    torch_averaged("fused", "(multi_avg_fn)", MULTI, fused=True),
    DEFAULT,
    torch_averaged("default", "(avg_fn)", PER_TENSOR),
    BOUND,
)
HOST_PROVIDERS = (BASELINE, PEER)

# Where time or memory is short: what the default backend is held against.
FEW_PROVIDERS = (BASELINE, PEER, DEFAULT, BOUND)
