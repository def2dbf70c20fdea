"""Exchanges weights and averages in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .sharding import local

# Elements exchanged at a time: the scratch memory of a swap, 4 MiB of float32.
BLOCK = 1 << 20


@contextmanager
def swapped(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Hold the second tensor's values in the first while the context is open.

    Tensors of one dtype trade places block by block and trade back on exit: bit-exact, with
    ``BLOCK`` elements of scratch memory. Where the average has more bits than the weight, the
    weight's bits have no room in it: they are kept aside, and the average is rounded into place.

    Args:
        pairs: (weight, average) of equal shapes; weights are modified in place, averages too while
            the context is open.
    """
    with ExitStack() as undo:
        for weight, average in pairs:
            undo.callback(_hold(local(weight), local(average)))
        yield


@_disable_dynamo
@torch.no_grad()
def _hold(weight: Tensor, average: Tensor) -> Callable[[], None]:
    """Put the average into the weight; returns what puts both back."""
    if weight.dtype == average.dtype:
        _exchange(weight, average)
        return partial(_exchange, weight, average)
    kept = weight.detach().clone()
    weight.copy_(average)
    return partial(_restore, weight, kept)


@_disable_dynamo  # Inductor drops one of the copies
@torch.no_grad()
def _exchange(a: Tensor, b: Tensor) -> None:
    for part_a, part_b in zip(_blocks(a, b), _blocks(b, a), strict=True):
        kept = part_a.clone()
        part_a.copy_(part_b)
        part_b.copy_(kept)


def _blocks(tensor: Tensor, other: Tensor) -> Iterable[Tensor]:
    if tensor.is_contiguous() and other.is_contiguous():
        return torch.split(tensor.detach().view(-1), BLOCK)
    return [tensor.detach()]


@_disable_dynamo
@torch.no_grad()
def _restore(weight: Tensor, kept: Tensor) -> None:
    weight.copy_(kept)
