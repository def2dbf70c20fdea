"""Parameters that share memory: in which turn each is stepped, one behind the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]


def turns(spans: Sequence[Span]) -> list[int | None]:
    """The turn of each stretch of memory: 0, or behind all earlier ones that share bytes with it.

    Args:
        spans: first address and the one behind the last, equal where there is no memory.

    Returns:
        One turn a span, ``>= 0``; None where it shares nothing.
    """
    found: list[int | None] = [None] * len(spans)
    for family in _families(spans):
        addresses = sorted({address for i in family for address in spans[i]})
        index = {address: k for k, address in enumerate(addresses)}
        latest = [-1] * len(addresses)  # turn between an address and the next one
        for i in family:
            begin, end = map(index.__getitem__, spans[i])
            turn = max(latest[begin:end]) + 1
            latest[begin:end] = [turn] * (end - begin)
            found[i] = turn
    return found


def _families(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Places of the spans that overlap, in order, as few as can be stepped apart from others."""
    order = sorted((begin, end, i) for i, (begin, end) in enumerate(spans) if begin != end)
    family: list[int] = []
    last = 0
    for begin, end, i in order:
        if begin >= last:
            if len(family) > 1:
                yield sorted(family)
            family = []
        family.append(i)
        last = max(last, end)
    if len(family) > 1:
        yield sorted(family)
