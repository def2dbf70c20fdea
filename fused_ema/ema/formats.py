"""Averages and moments in 16 bits: rounded stochastically, or as differences to the weights.

``"full"``: in the arithmetic's dtype. ``"bf16"``: the average in bfloat16. ``"delta"``: ``ema - p``
times :data:`SCALE` in float16, which keeps 10 bits of the small difference, while bfloat16 keeps 7
of the average. Rounding to nearest would lose every change of less than half a unit. Stochastic
rounding goes up with the probability of the part that is cut off, which is right on average. Its
random bits are a hash of seed, step, tensor and element, the same for every backend, number of
threads and process. The rule's states can be rounded to bfloat16 in the same way.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..rules.blending import lerp, moved
from ..sharding import local

EmaFormat: TypeAlias = Literal["full", "bf16", "delta"]
StateFormat: TypeAlias = Literal["full", "bf16"]
# The hash counts the rule's states as averages from this index on.
FIRST_STATE = 1 << 31
# Distance between the hash keys of two averages, whose elements then meet different hashes.
STREAM = 0x9E3779B1
DTYPES = {"bf16": torch.bfloat16, "delta": torch.float16}
# Differences from 6e-8 to 64 have all bits of a float16, smaller ones lose some down to 6e-11.
SCALE = 1024.0
LARGEST = 65504.0  # largest float16; larger differences are cut off
# Smallest EMA rate of each format: below it, errors of several percent of the distance to the
# weights were measured.
SMALLEST_RATE = {"bf16": 1e-5, "delta": 1e-4}
LARGEST_BFLOAT16 = 0x7F7F0000  # its largest number, as the bits of a float32
MASK = 0xFFFFFFFF
# Number of elements converted at a time, so that temporaries take a few MiB.
BLOCK = 1 << 18

# A function from tensors to a tensor.
Compute: TypeAlias = Callable[..., Tensor]


def mix(x: Any) -> Any:
    """Hash 32 bits to 32 bits, each of which depends on all: MurmurHash3's finalizer.

    ``x`` is an int or an int64 tensor; its products may overflow, but the low bits stay right.
    """
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def step_seed(seed: Any, base_steps: Any) -> Any:
    """Seed of one step, 32 bits: a hash of ``seed`` and the base steps (a float or a tensor)."""
    if isinstance(base_steps, Tensor):
        bits = base_steps.view(torch.int64)
    else:
        (bits,) = struct.unpack("<q", struct.pack("<d", base_steps))
    return mix(mix(seed & MASK ^ bits & MASK) ^ bits >> 32)


def element_bits(seed: int, tensor: int, average: int, like: Tensor) -> Tensor:
    """16 random bits (int64) for every element, from its offset in memory.

    Two neighbours share a hash; the one at an even offset takes its lower half.

    Args:
        seed: the step's, see :func:`step_seed`.
        tensor: index of the parameter in the optimizer.
        average: index of the average, or :data:`FIRST_STATE` plus the index of the state.
        like: a tensor in the parameter's order.
    """
    key = mix(seed ^ mix(tensor)) ^ average * STREAM & MASK
    index = torch.arange(like.numel(), device=like.device)
    # memory with gaps: the logical order, because torch makes a tensor like it without gaps
    dense = like.numel() > 0 and torch.empty_like(like).stride() == like.stride()
    index = index.as_strided(like.shape, like.stride()) if dense else index.view(like.shape)
    hashed = mix(key ^ mix(index >> 32) ^ (index & MASK) >> 1)
    return torch.where(index % 2 == 0, hashed & 0xFFFF, hashed >> 16)


def round_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability of the part cut off; NaN stays NaN.

    No finite number becomes infinite.
    """
    pattern = value.view(torch.int32).to(torch.int64) & MASK
    low = torch.where(pattern & 0x7FFFFFFF < LARGEST_BFLOAT16, bits, 0)
    rounded = (pattern + low) >> 16
    return _as(torch.bfloat16, torch.where(value.isnan(), 0x7FC0, rounded))


def round_float16(value: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to float16 likewise, by the lower 13 bits; clamp to its largest number."""
    pattern = value.view(torch.int32).to(torch.int64) & MASK
    magnitude = value.abs().clamp(max=LARGEST)
    low = bits & 0x1FFF
    normal = ((magnitude.view(torch.int32).to(torch.int64)) - (112 << 23) + low) >> 13
    subnormal = (magnitude * 2.0**24 + low * 2.0**-13).nan_to_num(0.0).to(torch.int64)
    result = torch.where(magnitude < 2.0**-14, subnormal, normal) | (pattern >> 16 & 0x8000)
    return _as(torch.float16, torch.where(value.isnan(), 0x7E00, result))


def _as(dtype: torch.dtype, pattern: Tensor) -> Tensor:
    signed = torch.where(pattern >= 0x8000, pattern - 0x10000, pattern)
    return signed.to(torch.int16).view(dtype)


def follow(ema: Tensor, param: Tensor, rate: float, bits: Tensor) -> None:
    """Move a bfloat16 average in place: ``ema + rate*(param - ema)``, computed in float32."""
    ema.copy_(round_bfloat16(lerp(ema.float(), param, rate), bits))


def follow_delta(delta: Tensor, change: Tensor, rate: float, bits: Tensor, before: bool) -> None:
    """Move a difference in place, for parameters that have moved by ``change``, in float32.

    ``d <- (1 - rate)*(d - change)``; if the average takes the old parameters (``before``),
    ``d <- (1 - rate)*d - change``.
    """
    old, away = delta.float(), change * SCALE
    rest = old if before else old - away
    new = lerp(rest, torch.zeros_like(rest), rate)
    delta.copy_(round_float16(new - away if before else new, bits))


def average(stored: Tensor, param: Tensor) -> Tensor:
    """The average that ``stored`` represents: itself, or its difference plus ``param``."""
    if stored.dtype != torch.float16:
        return stored
    return param.float() + stored.to(param.device).float() * (1.0 / SCALE)


def is_too_slow(form: str, ema_rates: Sequence[float] | None) -> bool:
    """Whether an EMA rate is too small for the format: rounding would lose too much."""
    smallest = 0.99 * SMALLEST_RATE.get(form, 0.0)
    return any(0.0 < rate < smallest for rate in ema_rates or ())


def warn_of_rounding(form: str, ema_rates: Sequence[float]) -> None:
    """Warn about averages for which :func:`is_too_slow` is true."""
    smallest = min(filter(None, ema_rates))
    warnings.warn(
        f"ema_format={form!r} with 1 - ema_decay**kappa = {smallest:.3g}: below "
        f"{SMALLEST_RATE[form]:g} rounding builds up errors of several percent of the average's "
        "distance to the weights (docs/numerics.md); use ema_format='full', a smaller ema_decay "
        "or a larger kappa",
        stacklevel=2,
    )


def check_distance(what: str, value: Tensor, param: Tensor) -> None:
    """Raise ValueError if a difference to ``param`` would be cut off, or is NaN."""
    largest = torch.zeros((), device=param.device)
    for part, weight in blocks(value, param):
        away = moved(weight.float(), part.to(weight.device).float()).abs()
        if away.numel() > 0:
            largest = torch.maximum(largest, away.max())
    if not float(largest) <= LARGEST / SCALE:
        raise ValueError(
            f"{what} is up to {float(largest):.3g} from the weights; allowed: "
            f"{LARGEST / SCALE:.3g} with ema_format='delta'"
        )


def stored(value: Tensor, param: Tensor, form: str) -> Tensor:
    """An average as the format stores it, rounded to nearest; finite values stay finite."""
    if form == "delta":
        scaled = moved(param.float(), value.float()) * SCALE
        return scaled.clamp(-LARGEST, LARGEST).to(torch.float16)
    dtype = DTYPES.get(form, value.dtype)
    if dtype == value.dtype:
        return value
    value = value.float()
    largest = torch.finfo(dtype).max
    return torch.where(value.isinf(), value, value.clamp(-largest, largest)).to(dtype)


def write(target: Tensor, compute: Compute, *given: Tensor) -> Tensor:
    """Fill ``target`` in place with the elementwise ``compute(*given)``, and return it.

    It works in blocks, so that no temporary has the size of a parameter. All tensors have one
    shape, DTensors one placement; ``target`` may be one of ``given``.
    """
    for part, *parts in blocks(target, *given):
        part.copy_(compute(*parts))
    return target


def blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Views of the same elements of all tensors, at most :data:`BLOCK` at a time.

    Raises:
        ValueError: their local parts have different shapes.
    """
    parts = [local(tensor.detach()) for tensor in tensors]
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"tensors have the shapes {sorted(shapes)}; allowed: one shape")
    yield from _split(parts)


def _split(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    shape, count = tensors[0].shape, tensors[0].numel()
    if count <= BLOCK:
        yield tensors
        return
    dim = max(range(len(shape)), key=shape.__getitem__)
    size = max(1, BLOCK // (count // shape[dim]))
    for parts in zip(*(tensor.split(size, dim) for tensor in tensors), strict=True):
        yield from _split(list(parts))
