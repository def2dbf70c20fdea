"""Summarises the rows of the metrics: curves over seeds, final scores, gaps between curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def curves(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """A quantity over the samples seen in all runs of a kind: ``seeds[seed][point]``."""
    runs: dict[str, dict[int, float | None]] = {}
    for row in rows:
        if name in row and row["run"].rsplit(", seed ", 1)[0] == kind:
            runs.setdefault(row["run"], {})[row["samples"]] = row[name]
    samples = sorted(next(iter(runs.values())))
    values = [[run[s] for s in samples] for run in runs.values()]
    return {"samples": samples, "seeds": values}


def last(curve: Mapping[str, Any]) -> dict[str, float | None]:
    """Mean and range over the seeds at the end; None if a run diverged."""
    return spread([values[-1] for values in curve["seeds"]])


def first(curve: Mapping[str, Any]) -> dict[str, float | None]:
    """Mean and range over the seeds before any step."""
    return spread([values[0] for values in curve["seeds"]])


def gaps(curve: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Largest distances to the base run of the same seed, over all samples and the last half."""
    result: dict[str, Any] = {}
    for name, share in (("all", 0.0), ("late", 0.5)):
        first = round(share * (len(base["samples"]) - 1))
        found = [
            largest(mine[first:], theirs[first:])
            for mine, theirs in zip(curve["seeds"], base["seeds"], strict=True)
        ]
        result[name] = spread(found)
    return result


def largest(mine: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """Largest distance between two curves; None if one of them has a gap."""
    distances = []
    for a, b in zip(mine, theirs, strict=True):
        if a is None or b is None:
            return None
        distances.append(abs(a - b))
    return max(distances)


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, least and greatest; None if a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "min": None, "max": None}
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}
