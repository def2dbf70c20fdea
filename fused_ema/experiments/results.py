"""Summarises the rows of the metrics: curves over seeds, final scores, gaps between curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

# Where a distance is taken: the share of the samples before it.
PARTS = {"all": 0.0, "late": 0.5}


def curves(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """A quantity over the samples seen in all runs of a kind: ``seeds[seed][point]``."""
    runs: dict[int, dict[int, float | None]] = {}
    for row in rows:
        of, _, seed = row["run"].rpartition(", seed ")
        if name in row and of == kind:
            runs.setdefault(int(seed), {})[row["samples"]] = row[name]
    samples = sorted(next(iter(runs.values())))
    return {"samples": samples, "seeds": [[runs[k][s] for s in samples] for k in sorted(runs)]}


def compared(
    rows: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Several quantities in the runs of every kind.

    Args:
        rows: the metrics.
        kinds: what the results tell of each kind.
        names: the quantities.

    Returns:
        The summary, with the values at random weights and at the end of each kind, and the curves.
    """
    runs, figure = [], []
    for kind, about in kinds.items():
        found = {name: curves(rows, kind, name) for name in names}
        runs.append({**about, **{name: last(curve) for name, curve in found.items()}})
        figure.append({**about, **found})
    start = {name: first(curve) for name, curve in found.items()}
    return {"random_weights": start, "runs": runs}, figure


def last(curve: Mapping[str, Any]) -> dict[str, float | None]:
    """Mean and range over the seeds at the end; None if a run diverged."""
    return spread([values[-1] for values in curve["seeds"]])


def first(curve: Mapping[str, Any]) -> dict[str, float | None]:
    """Mean and range over the seeds before any step."""
    return spread([values[0] for values in curve["seeds"]])


def gaps(curve: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Largest distances to the base run of the same seed, over all samples and the last half."""
    result: dict[str, Any] = {}
    for name, share in PARTS.items():
        first = round(share * (len(base["samples"]) - 1))
        found = [
            largest(mine[first:], theirs[first:])
            for mine, theirs in zip(curve["seeds"], base["seeds"], strict=True)
        ]
        result[name] = spread(found)
    return result


def seed_spread(curve: Mapping[str, Any]) -> dict[str, float | None]:
    """Largest distance between two seeds, over all samples and the last half."""
    result = {}
    for name, share in PARTS.items():
        first = round(share * (len(curve["samples"]) - 1))
        seeds = curve["seeds"]
        distances = [largest(a[first:], b[first:]) for a, b in combinations(seeds, 2)]
        known = [distance for distance in distances if distance is not None]
        result[name] = max(known, default=None) if len(known) == len(distances) else None
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
