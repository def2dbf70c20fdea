"""Steps and averages of other libraries: any of the optimizers, then any of the averages."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from .provider import NotOfferedError, Provider, Stepper
from .spec import LR, STEP, Group, Groups, Parameters, Spec, flat, max_norm

Part = Callable[[], object]
MakeOptimizer = Callable[[Groups, Spec], torch.optim.Optimizer]

# torch.compile takes half a second for each tensor up to this number, and more above.
MOST_COMPILED = 100


def library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise NotOfferedError(f"{name} cannot be imported: {error}") from error


class Weights:
    """Parameters, and the float32 weights that the optimizer steps: the same, or masters.

    groups: param groups of the weights.
    """

    def __init__(self, groups: Groups, spec: Spec) -> None:
        self.params = flat(groups)
        self.groups = groups
        if spec.scenario.master:
            self.groups = [
                Group([nn.Parameter(p.detach().float()) for p in group.params], group.lr_factor)
                for group in groups
            ]
        self.exact: Parameters = flat(self.groups)

    def gather(self) -> None:
        """Give every master its parameter's gradient."""
        for weight, param in zip(self.exact, self.params, strict=True):
            weight.grad = None if param.grad is None else param.grad.float()

    @torch.no_grad()
    def scatter(self) -> None:
        torch._foreach_copy_(list(self.params), list(self.exact))


@dataclass(frozen=True)
class Average:
    """A running average: the call that moves it, and its tensors."""

    update: Part
    tensors: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Averaging:
    """A way to average, with its name."""

    name: str
    make: Callable[[Weights, float], Average]


def lerp(weights: Weights, decay: float) -> Average:
    emas = [weight.detach().clone() for weight in weights.exact]
    targets: list[Tensor] = list(weights.exact)

    @torch.no_grad()
    def update() -> None:
        torch._foreach_lerp_(emas, targets, 1.0 - decay)

    return Average(update, lambda: emas)


def averaged_model(how: Callable[[float], Mapping[str, Any]]) -> Callable[..., Average]:
    """``AveragedModel``, whose own default is an equally weighted average, not an EMA."""

    def make(weights: Weights, decay: float) -> Average:
        module = nn.ParameterList(weights.exact)
        averaged = AveragedModel(module, **how(decay))
        # the first call only copies, so that later calls average from the same start as the others
        averaged.update_parameters(module)
        return Average(
            partial(averaged.update_parameters, module), lambda: list(averaged.parameters())
        )

    return make


def model_ema_v3(weights: Weights, decay: float) -> Average:
    """timm's average, in the parameters' dtype, with stochastic rounding to bfloat16."""
    module = nn.ParameterList(weights.exact)
    make, dtype = library("timm.utils").ModelEmaV3, weights.params[0].dtype
    # older ones have no such argument, and need none where weights are float32
    averaged = make(module, decay=decay, **({"dtype": dtype} if dtype != torch.float32 else {}))
    return Average(partial(averaged.update, module), lambda: list(averaged.module.parameters()))


def ema_pytorch(weights: Weights, decay: float) -> Average:
    averaged = library("ema_pytorch").EMA(
        nn.ParameterList(weights.exact),
        beta=decay,
        min_value=decay,  # equal to its largest value, so that the decay is constant
        update_after_step=-1,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
    )
    averaged.update()  # the first call only copies
    return Average(averaged.update, lambda: list(averaged.ema_model.parameters()))


LERP = Averaging("lerp", lerp)
MULTI = Averaging(
    "AveragedModel", averaged_model(lambda decay: {"multi_avg_fn": get_ema_multi_avg_fn(decay)})
)
PER_TENSOR = Averaging(
    "AveragedModel (avg_fn)", averaged_model(lambda decay: {"avg_fn": get_ema_avg_fn(decay)})
)
TIMM = Averaging("timm ModelEmaV3", model_ema_v3)
EMA_PYTORCH = Averaging("ema-pytorch", ema_pytorch)


def torch_optimizer(**flags: bool) -> MakeOptimizer:
    def make(groups: Groups, spec: Spec) -> torch.optim.Optimizer:
        if spec.num_measured and (spec.scenario.graphed or any(flags.values())):
            raise NotOfferedError("torch has no such optimizer; a loop over tensors is compared")
        if spec.num_measured:
            return spec.make_torch(groups)
        # torch's SGD has no step count, and can be captured as it is
        counts = spec.scenario.graphed and spec.name != "sgd"
        return spec.make_torch(groups, **flags, **({"capturable": True} if counts else {}))

    return make


def foreign_adamw(module: str, name: str, **flags: object) -> MakeOptimizer:
    """Another library's AdamW with torch's arguments."""

    def make(groups: Groups, spec: Spec) -> torch.optim.Optimizer:
        if spec.name != "adamw":
            raise NotOfferedError("only its AdamW is compared")
        shared = dict(spec.scaled(LR))  # all groups have the same betas, which may not be a field
        own = [
            {"params": group.params, "lr": scaled["lr"], "weight_decay": scaled["weight_decay"]}
            for group in groups
            for scaled in [spec.scaled(LR * group.lr_factor)]
        ]
        opt: torch.optim.Optimizer = getattr(library(module), name)(own, **shared, **flags)
        return opt

    return make


optimi = foreign_adamw("optimi", "AdamW")


def flashoptim(groups: Groups, spec: Spec) -> torch.optim.Optimizer:
    """flashoptim's AdamW without 8-bit states and 24-bit masters, with the others' arithmetic."""
    if flat(groups)[0].device.type != "cuda":
        raise NotOfferedError("its fused step needs a CUDA GPU")
    make = foreign_adamw("flashoptim", "FlashAdamW", quantize=False, master_weight_bits=None)
    return make(groups, spec)


def stepping(weights: Weights, spec: Spec, make: MakeOptimizer) -> list[Part]:
    """The calls by which a training loop steps the weights in the scenario, without averages."""
    opt = make(weights.groups, spec)
    if spec.scenario.master:
        return [weights.gather, opt.step, weights.scatter]
    if not spec.scenario.clip:
        return [opt.step]
    params: list[Tensor] = list(weights.params)
    clip = partial(nn.utils.clip_grad_norm_, params, max_norm(params))
    if not spec.scenario.scaled:
        return [clip, opt.step]
    scaler = running_scaler(torch.amp.GradScaler, params[0].device, spec)
    return [partial(scaler.unscale_, opt), clip, partial(scaler.step, opt), scaler.update]


def running_scaler(kind: type[torch.amp.GradScaler], device: torch.device, spec: Spec) -> Any:
    """A scaler with a constant scale, in the state after ``scale(loss)``."""
    scaler = kind(device.type, init_scale=spec.scenario.loss_scale, growth_interval=1 << 30)
    scaler.scale(torch.zeros((), device=device))
    return scaler


def sequence(weights: Weights, parts: Sequence[Part], averages: Sequence[Average]) -> Stepper:
    own = [*parts, *(average.update for average in averages)]

    def step() -> None:
        for part in own:
            part()

    return Stepper(
        step,
        weights=lambda: weights.exact,
        emas=lambda: [tensor for average in averages for tensor in average.tensors()],
    )


def theirs(name: str, make: MakeOptimizer, averaging: Averaging) -> Provider:
    """A provider of an optimizer's step and then the averages' step."""

    def build(groups: Groups, spec: Spec) -> Stepper:
        weights = Weights(groups, spec)
        averages = [averaging.make(weights, decay) for decay in spec.scenario.decays]
        return sequence(weights, stepping(weights, spec, make), averages)

    return Provider(f"{name} + {averaging.name}", build)


def averaging_alone(averaging: Averaging) -> Provider:
    def build(groups: Groups, spec: Spec) -> Stepper:
        weights = Weights(groups, spec)
        return sequence(weights, [], [averaging.make(weights, d) for d in spec.scenario.decays])

    return Provider(averaging.name, build)


@cache
def fresh_cache() -> TemporaryDirectory[str]:
    """A new compile cache for this process, because an old one would hide the compile time."""
    folder = TemporaryDirectory(prefix="bench-compiled-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    return folder


def compiled() -> Provider:
    """``torch.compile`` of a function that steps and averages."""

    def build(groups: Groups, spec: Spec) -> Stepper:
        if spec.scenario is not STEP:
            raise NotOfferedError("compiling takes too long: timed in step + EMA alone")
        if len(flat(groups)) > MOST_COMPILED:
            raise NotOfferedError(f"compiling more than {MOST_COMPILED} tensors takes minutes")
        weights = Weights(groups, spec)
        averages = [lerp(weights, decay) for decay in spec.scenario.decays]
        fresh_cache()
        torch.compiler.reset()  # after a few compilations torch would run the rest uncompiled
        stepper = sequence(
            weights, stepping(weights, spec, torch_optimizer(foreach=True)), averages
        )
        return Stepper(torch.compile(stepper.step), stepper.weights, stepper.emas)

    return Provider("torch.compile(step + lerp)", build)
