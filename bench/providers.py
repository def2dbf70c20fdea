"""The ways to take a step with an EMA: ours, those of other libraries, and the bandwidth bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_ema
from fused_ema import FusedEMA

from . import streams, theirs
from .cases import Case
from .provider import Bound, NotOfferedError, Provider, Stepper
from .spec import (
    EMA,
    EMA_DECAYS,
    KAPPA,
    LR,
    STEP,
    Group,
    Groups,
    Scenario,
    Spec,
    flat,
    max_norm,
)
from .theirs import averaging_alone, running_scaler, torch_optimizer

# Above these numbers, the slowest providers take a second for a step on a processor.
MANY, MANY_TENSORS = 20_000_000, 1000


def ours(backend: str) -> Provider:
    def make(groups: Groups, spec: Spec) -> Stepper:
        refuse_what_it_cannot(backend, flat(groups)[0], spec)
        return made_by(backend, groups, spec)

    return Provider(f"fused_ema {backend}", make)


def refuse_what_it_cannot(backend: str, like: Tensor, spec: Spec) -> None:
    """Raise NotOfferedError if the backend cannot step one element like the others."""
    probe = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    probe.grad = torch.zeros_like(probe)
    try:
        made_by(backend, [Group([probe])], spec).step()
    except RuntimeError as error:
        if not str(error).startswith("backend="):
            raise
        raise NotOfferedError(str(error)) from error


def made_by(backend: str, groups: Groups, spec: Spec) -> Stepper:
    params, scenario = flat(groups), spec.scenario
    flags = {
        "ema_decay": scenario.base_decays,
        "ema_format": scenario.ema_format,
        "kappa": KAPPA,
        "backend": backend,
        **({"capturable": True} if scenario.graphed else {}),
    }
    if not scenario.rule:
        opt = torch.optim.SGD(params, lr=0.0)
        averages = FusedEMA(opt, **flags)
        opt.step()  # creates averages at the weights, which do not move: the learning rate is 0
        # only the averages' step is timed, not the optimizer's, whose hook calls it
        return stepper(averages, averages.step)
    opt = spec.make_ours(
        groups,
        **flags,
        master_weights=scenario.master,
        max_grad_norm=max_norm(params) if scenario.clip else None,
    )
    return stepper(opt, scaled_step(opt, spec) if scenario.scaled else opt.step)


def scaled_step(opt: torch.optim.Optimizer, spec: Spec) -> Callable[[], object]:
    """The whole chain, with the optimizer's own clipping, whose norm also serves the check."""
    device = opt.param_groups[0]["params"][0].device
    scaler = running_scaler(fused_ema.GradScaler, device, spec)

    def step() -> None:
        scaler.step(opt)
        scaler.update()

    return step


def stepper(opt: torch.optim.Optimizer, step: Callable[[], object]) -> Stepper:
    params = [param for group in opt.param_groups for param in group["params"]]

    def emas() -> list[Tensor]:
        keys = ["ema", *(f"ema_{i}" for i in range(1, len(EMA_DECAYS)))]
        return [opt.state[p][key] for key in keys for p in params if key in opt.state[p]]

    return Stepper(step, lambda: [opt.state[p].get("master", p) for p in params], emas)


def stream() -> Provider:
    """A plain loop over five arrays; the parameters are one flat tensor."""

    def make(groups: Groups, _: Spec) -> Stepper:
        step5 = streams.load()
        (param,) = flat(groups)
        weights = param.detach()
        states = [weights.clone() for _ in range(streams.WRITTEN - 1)]

        def step() -> None:
            step5(weights, param.grad, *states)

        return Stepper(step, list, list)

    return Provider("stream (bound)", make, Bound(streams.READ + streams.WRITTEN))


def copy() -> Provider:
    """torch's copy between two tensors that no cache holds."""
    numel = 2**27

    def make(groups: Groups, _: Spec) -> Stepper:
        (param,) = flat(groups)
        source = torch.rand(numel, device=param.device)
        target = torch.empty_like(source)
        return Stepper(lambda: target.copy_(source), list, list)

    return Provider("copy (bound)", make, Bound(2, numel))


def small_chunks() -> Provider:
    """One program for every 128 elements, as in apex's FusedAdamSWA."""

    def make(groups: Groups, spec: Spec) -> Stepper:
        if spec.name != "adamw" or spec.scenario is not STEP or len(groups) > 1:
            raise NotOfferedError("it is AdamW and one average, with one param group")
        theirs.library("triton")
        from .small_chunks import SmallChunks  # imported here, because nothing else needs Triton

        (group,), (decay,) = groups, spec.scenario.decays
        scaled = spec.scaled(LR * group.lr_factor)
        opt = SmallChunks(group.params, **scaled, ema_rate=1.0 - decay)
        return Stepper(opt.step, lambda: group.params, lambda: opt.emas)

    return Provider("Triton, chunks of 128", make)


NATIVE, TRITON, FOREACH, REFERENCE = map(ours, ("native", "triton", "foreach", "reference"))
# In the order of the default's choice; ratios refer to the first that is correct.
PREFERRED = (NATIVE, TRITON, FOREACH, REFERENCE)

FOR_LOOP, ALL_AT_ONCE, FUSED = (
    ("torch for-loop", torch_optimizer(foreach=False, fused=False)),
    ("torch foreach", torch_optimizer(foreach=True)),
    ("torch fused", torch_optimizer(fused=True)),
)
PEER = theirs.theirs(*FUSED, theirs.LERP)
FOREACH_LERP = theirs.theirs(*ALL_AT_ONCE, theirs.LERP)
# What torch runs by default on a CPU.
PLAIN = theirs.theirs(*FOR_LOOP, theirs.MULTI)
TIMM = theirs.theirs(*FUSED, theirs.TIMM)
EMA_PYTORCH = theirs.theirs(*FUSED, theirs.EMA_PYTORCH)
# The most important first; scenarios other than step + EMA time only these.
LIKELY = (PEER, PLAIN, TIMM, FOREACH_LERP, EMA_PYTORCH)
FEW = 3
STEPS = (
    theirs.theirs(*FOR_LOOP, theirs.LERP),
    FOREACH_LERP,
    PEER,
    PLAIN,
    theirs.theirs(*ALL_AT_ONCE, theirs.MULTI),
    theirs.theirs(*FUSED, theirs.MULTI),
    theirs.theirs(*FOR_LOOP, theirs.PER_TENSOR),
    TIMM,
    EMA_PYTORCH,
    theirs.theirs("optimi", theirs.optimi, theirs.LERP),
    theirs.theirs("flashoptim", theirs.flashoptim, theirs.LERP),
    theirs.compiled(),
)
AVERAGES = tuple(
    averaging_alone(averaging)
    for averaging in (
        theirs.LERP,
        theirs.MULTI,
        theirs.PER_TENSOR,
        theirs.TIMM,
        theirs.EMA_PYTORCH,
    )
)
# Backends that are timed everywhere, by the type of the device.
LEADING = {"cpu": (NATIVE,), "cuda": (NATIVE, TRITON)}
OURS = {"cpu": (NATIVE, FOREACH, REFERENCE), "cuda": (NATIVE, TRITON, FOREACH)}
BOUNDS = {"cpu": stream(), "cuda": copy()}
HOST_PROVIDERS = {"cpu": (NATIVE, FOREACH_LERP, PEER), "cuda": (NATIVE, TRITON, PEER)}
# The providers for training steps of larger models.
FEW_TRAINERS = (NATIVE, PEER, PLAIN)
TRAINERS = (*FEW_TRAINERS, FOREACH_LERP, TIMM)


def providers(scenario: Scenario, case: Case, device: str) -> tuple[Provider, ...]:
    """The providers to time: only the likely ones if all would take minutes."""
    leading, bound = LEADING[device], BOUNDS[device]
    apex_like = (small_chunks(),) if device == "cuda" and scenario is STEP else ()
    if scenario.graphed:
        return (*leading, PEER, FOREACH_LERP, bound)
    if case.numel > MANY or len(case.shapes) > MANY_TENSORS:
        if scenario is EMA:
            return (*leading, *AVERAGES[:2], bound)
        return (*leading, *LIKELY[: None if scenario is STEP else FEW], *apex_like, bound)
    return (*OURS[device], *(AVERAGES if scenario is EMA else STEPS), *apex_like, bound)


def known() -> dict[str, Provider]:
    """Every provider except the bounds, by its name."""
    own = (provider for group in OURS.values() for provider in group)
    return {p.name: p for p in (*own, *STEPS, *AVERAGES, small_chunks())}
