"""The arguments that every optimizer takes: their types, and one text each for ``help()``."""

from __future__ import annotations

import re
from textwrap import indent, wrap
from typing import TypedDict, TypeVar

from torch import nn

from ..ema.buffers import EmaBuffersMode
from ..ema.decay import EmaDecay, EmaOrder
from ..ema.formats import EmaFormat, StateFormat
from ..ema.teacher import Teacher
from ..scaling import KappaScales
from ..step.backends import BackendName

Class = TypeVar("Class", bound=type)


class EmaOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer takes in addition to its torch namesake's."""

    ema_decay: EmaDecay
    teacher: Teacher | None
    ema_order: EmaOrder
    ema_every: int
    ema_format: EmaFormat
    ema_buffers: EmaBuffersMode | None
    kappa: float
    kappa_scales: KappaScales
    model: nn.Module | None
    max_grad_norm: float | None
    master_weights: bool
    state_format: StateFormat
    rounding_seed: int
    backend: BackendName


# The description of each option, for every class that takes it.
EMA = {
    "ema_decay": """``rho`` at the base batch size, in ``[0, 1]``; or a schedule ``t -> rho``
        of the base steps so far; or a tuple of those, one an average; None: no average.
        ``rho = 0.9999`` has a mean age of 10,000 base steps: for a run that is not many times
        longer, choose a smaller ``rho``, or ``WarmUpDecay``.""",
    "teacher": """a teacher that is the (first) average: a module, its parameters or its named
        parameters. Every step modifies it in place; the average starts at its present values.
        None: the optimizer keeps the average, which starts at the weights.""",
    "ema_order": """``"after"``: the average takes in the new weights (the paper's Algorithm
        1); ``"before"``: the old ones (the paper's theory).""",
    "ema_every": """an int ``>= 1``: the averages move at every ``ema_every``-th step, with the
        decay ``rho**(kappa*ema_every)``; the steps between save their traffic. Must be 1 with
        ``"delta"`` and with ``capturable=True``, and the same in all param groups.""",
    "ema_format": """``"full"``: averages in float32 (float64 for float64 parameters);
        ``"bf16"``: half the memory, rounded stochastically; ``"delta"``: half the memory, as
        ``ema - p`` in float16, many times more accurate. docs/numerics.md says up to which
        decay each format works.""",
    "ema_buffers": """the averaged model's buffers. ``"copy"`` (the default with ``model``): the
        student's; ``"average"``: averages of its floating-point ones; ``"leave"``: a
        teacher's own.""",
    "kappa": """batch size / base batch size, a number ``> 0``. It scales learning rate,
        betas, eps, weight decay and ``rho`` together at every step, by the rules of
        :mod:`fused_ema.scaling`.""",
    "kappa_scales": """what ``kappa`` scales: ``"all"``; ``"ema"``: only ``rho``, if learning
        rate, betas and the rest are scaled by hand; ``"optimizer"``: all but ``rho``, as the
        control of an experiment.""",
    "model": """the student module. It names the parameters, which pairs them with teachers and
        checkpoints, and its buffers become part of the averaged model.""",
    "max_grad_norm": """a number ``>= 0``: gradients are scaled down to this norm over all
        parameters if theirs is larger, as by ``torch.nn.utils.clip_grad_norm_``; ``.grad`` is
        not written. None: no clipping. The same in all param groups.""",
    "master_weights": """keep float32 weights of bfloat16 and float16 parameters in
        ``state[p]["master"]``, and float32 moments. The rule steps the masters, the averages
        follow them, and every step writes their rounded copy into the parameter.""",
    "state_format": """``"full"``: the rule's states (momentum, moments) in the weights' dtype,
        as in torch. ``"bf16"``: in bfloat16, rounded stochastically, which saves 4 bytes a
        parameter for Adam; the weights must be float32, or have float32 masters.""",
    "rounding_seed": """seed of the random bits of the 16-bit formats, an int in ``[0,
        2**32)``; the same in every process.""",
    "backend": """``"auto"`` takes the first of ``"native"``, ``"triton"``, ``"foreach"`` and
        ``"reference"`` that can step the parameters; a name takes that backend, which raises
        RuntimeError at the first step if it cannot.""",
}
TORCH = {
    "params": """parameters, named parameters or param groups, as torch takes them. A group may
        set any hyper-parameter for itself, and ``"teacher"``: its own teacher tensors.""",
    "lr": """learning rate at the base batch size, ``>= 0``; a float or a tensor of one
        element.""",
    "adapt": """multiply steps by the trust ratio; False: by 1, as for biases and norms, in a param
        group of their own.""",
    "maximize": """ascend instead of descending.""",
    "foreach": """as in torch; True asks for the ``"foreach"`` backend. An explicit ``backend``
        wins.""",
    "fused": """as in torch; False asks for the ``"foreach"`` backend, and True lets the step
        unscale gradients itself under torch's ``GradScaler``.""",
    "differentiable": """as in torch: gradients flow through the step, by the ``"reference"``
        backend.""",
    "capturable": """fold the scalars on the device, in float64, so that ``step()`` can be
        captured in a CUDA graph. The rule's numbers, ``kappa`` and ``ema_decay`` may then be
        tensors on the device, read at every replay; floats are constants of the graph. A
        schedule gets the base steps so far as a 0-dim tensor on the device, and returns one.""",
}
TEXTS = {**TORCH, **EMA}

_PLACEHOLDER = re.compile(r"^( *)\{([\w, ]+)\}$", re.MULTILINE)


def documented(cls: Class) -> Class:
    """Insert the options' texts where the class docstring names them: ``{lr, options}``."""
    if cls.__doc__ is not None:
        cls.__doc__ = composed(cls.__doc__)
    return cls


def composed(doc: str) -> str:
    """A docstring with the options' texts in place of their names."""
    return _PLACEHOLDER.sub(lambda found: _entries(found[1], found[2]), doc)


def _entries(margin: str, names: str) -> str:
    chosen = [name.strip() for name in names.split(",")]
    entries = [name for n in chosen for name in (EMA if n == "options" else (n,))]
    return "\n".join(indent(_entry(name), margin) for name in entries)


def _entry(name: str) -> str:
    text = " ".join(TEXTS[name].split())
    return "\n".join(wrap(f"{name}: {text}", 88, subsequent_indent="    ", break_on_hyphens=False))
