"""Formats results as aligned text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .check import Counts, Verdict
from .device import MILLI
from .harness import Result, median_of
from .host import Fit
from .provider import Provider
from .train import Training

GIGA, MEGA, MICRO = 1e9, 1e6, 1e-6


Columns = Mapping[str, Callable[[Result], str]]


def number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def ratio(result: Result) -> str:
    value = median_of(result.against_baseline)
    return "" if value is None else f"{value:.2f}x"


def share(result: Result) -> str:
    value = median_of(result.against_bound)
    return "" if value is None else f"{value:.0%}"


def launches(counts: Counts) -> str:
    made = counts.launches
    return "" if made is None else f"{made.kernels} + {made.copies}"


def counted(show: Callable[[Counts], str]) -> Callable[[Result], str]:
    return lambda result: "" if result.verdict.counts is None else show(result.verdict.counts)


def gradients(hot: bool) -> str:
    return "same" if hot else "new"


STEP: Columns = {
    "provider": lambda result: result.provider.name,
    "median ms": lambda result: number(result.median, MILLI, 3),
    "p10": lambda result: number(result.p10, MILLI, 3),
    "p90": lambda result: number(result.p90, MILLI, 3),
    "device ms": lambda result: number(result.device, MILLI, 3),
    "host us": lambda result: number(result.host, MICRO, 1),
    "GB/s": lambda result: number(result.bandwidth, GIGA, 1),
    "of bound": share,
    "time / ours": ratio,
    "launches": counted(launches),
    "torch ops": counted(lambda counts: str(counts.num_operators)),
    "extra MB": counted(lambda counts: number(counts.peak_bytes, MEGA, 1)),
    "first ms": counted(lambda counts: number(counts.first_step, MILLI, 0)),
}
HOST: Columns = {
    "provider": lambda result: result.provider.name,
    "gradients": lambda result: gradients(result.case.hot),
    "n": lambda result: str(len(result.case.shapes)),
    "median us": lambda result: number(result.median, MICRO, 1),
    "p10": lambda result: number(result.p10, MICRO, 1),
    "p90": lambda result: number(result.p90, MICRO, 1),
    "time / ours": ratio,
    "launches": counted(launches),
    "torch ops": counted(lambda counts: str(counts.num_operators)),
}


def step_table(results: Sequence[Result]) -> str:
    """One case; the ratio is the time over our default backend's, above 1 if ours is faster."""
    first = results[0]
    heading = (
        f"{first.case.title}; {first.spec.name}, {first.spec.scenario.title}, "
        f"{first.spec.bytes_per_param} B a parameter"
    )
    return "\n".join([heading, *rows(STEP, results), *remarks(results)])


def host_table(results: Sequence[Result], fits: Sequence[Fit]) -> str:
    """Steps over tensors with hardly any elements, and the fitted lines."""
    first = results[0]
    lines = [
        f"{fit.provider}, {gradients(fit.hot)} gradients: "
        f"{fit.per_step / MICRO:.1f} us + {fit.per_tensor / MICRO:.3f} us * n"
        for fit in fits
    ]
    elements = first.case.numel // len(first.case.shapes)
    heading = f"host: n tensors of {elements} elements; {first.spec.name}"
    return "\n".join([heading, *rows(HOST, results), *lines, *remarks(results)])


def training_table(results: Sequence[Training]) -> str:
    """Whole training steps, and their ratios."""
    heading = ("model, images", "provider", "median ms", "p10", "p90", "of it step", "time / ours")
    lines = [
        (
            f"{result.model}, {result.batch}",
            result.provider.name,
            number(median_of(result.totals), MILLI, 1),
            number(result.p10, MILLI, 1),
            number(result.p90, MILLI, 1),
            f"{result.share:.1%}",
            f"{median_of(result.against_ours) or 0.0:.2f}x",
        )
        for result in results
        if result.steps
    ]
    untimed = [without_time(r.provider, r.model, r.verdict) for r in results if r.verdict.reason]
    return "\n".join(["training", *aligned([heading, *lines]), *untimed])


def rows(columns: Columns, results: Sequence[Result]) -> list[str]:
    """The results with a time, without empty columns."""
    timed = [result for result in results if result.seconds]
    cells = {name: [cell(result) for result in timed] for name, cell in columns.items()}
    filled = [(name, *column) for name, column in cells.items() if any(column)]
    return aligned(list(zip(*filled, strict=True)))


def without_time(provider: Provider, case: str, verdict: Verdict) -> str:
    return f"no time for {provider.name} on {case}: {verdict.reason}"


def remarks(results: Sequence[Result]) -> list[str]:
    """The providers that were faster, and those that got no time and why."""
    beaten_by = [
        f"{result.provider.name} on {result.case.name} ({times:.2f}x)"
        for result in results
        if (times := median_of(result.against_baseline)) is not None
        and times < 1.0
        and not result.provider.bound
    ]
    baselines = dict.fromkeys(result.baseline.name for result in results if result.baseline)
    return [
        f"faster than {' and '.join(baselines)}: {', '.join(beaten_by) or 'none'}",
        *(without_time(r.provider, r.case.name, r.verdict) for r in results if r.verdict.reason),
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns, the first aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        text.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return text
