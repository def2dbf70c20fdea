"""Results as aligned text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .harness import Result
from .host import Fit
from .providers import BASELINE, BOUND

GIGA, MILLI, MICRO = 1e9, 1e-3, 1e-6

OURS = BASELINE.name
HEADER = ("provider", "median ms", "p10", "p90", "GB/s", "of bound", "time / ours", "torch ops")
HOST_HEADER = ("provider", "gradients", "n", "median us", "p10", "p90", "time / ours", "torch ops")


def step_table(results: Sequence[Result]) -> str:
    """One case; the ratio is the time over that of our default backend, above 1 where we win."""
    first = results[0]
    counted = max(result.bytes_per_param for result in results if result.provider != BOUND.name)
    heading = f"{first.case.title}; {first.spec.name}, {counted} B a parameter"
    timed = [result for result in results if result.seconds]
    rows = [HEADER, *map(step_row, timed)]
    return "\n".join([heading, aligned(rows), *remarks(results)])


def step_row(result: Result) -> tuple[str, ...]:
    times = (f"{t / MILLI:.3f}" for t in (result.median, result.p10, result.p90))
    bound = median_of(result.against_bound)
    return (
        result.provider,
        *times,
        f"{result.bandwidth / GIGA:.1f}",
        "" if bound is None else f"{bound:.0%}",
        *ratio_and_operators(result),
    )


def host_table(results: Sequence[Result], fits: Sequence[Fit]) -> str:
    """Steps over tensors without elements, and the fitted lines."""
    timed = [result for result in results if result.seconds]
    rows = [HOST_HEADER, *map(host_row, timed)]
    lines = [
        f"{fit.provider}, {gradients(fit.hot)} gradients: "
        f"{fit.per_step / MICRO:.1f} us + {fit.per_tensor / MICRO:.3f} us * n"
        for fit in fits
    ]
    heading = f"host: n tensors of 0 elements; {results[0].spec.name}"
    return "\n".join([heading, aligned(rows), *lines, *remarks(results)])


def host_row(result: Result) -> tuple[str, ...]:
    times = (f"{t / MICRO:.1f}" for t in (result.median, result.p10, result.p90))
    tensors = str(len(result.case.shapes))
    return (
        result.provider,
        gradients(result.case.hot),
        tensors,
        *times,
        *ratio_and_operators(result),
    )


def gradients(hot: bool) -> str:
    return "same" if hot else "new"


def ratio_and_operators(result: Result) -> tuple[str, str]:
    ratio = median_of(result.against_baseline)
    return "" if ratio is None else f"{ratio:.2f}x", str(result.num_operators)


def remarks(results: Sequence[Result]) -> list[str]:
    """Who beat us, and who got no time and why."""
    beaten_by = [
        f"{result.provider} on {result.case.name} ({ratio:.2f}x)"
        for result in results
        if (ratio := median_of(result.against_baseline)) is not None
        and ratio < 1.0
        and result.provider != BOUND.name
    ]
    failed = [f"no time for {r.provider} on {r.case.name}: {r.error}" for r in results if r.error]
    return [f"faster than {OURS}: {', '.join(beaten_by) or 'none'}", *failed]


def median_of(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first one to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        text.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(text)
