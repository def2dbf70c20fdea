"""Draws the results of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .rows import Results, Row, timed, unique
from .spec import STEP
from .titles import SMALL, TITLES, number_of, processor, title

matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
MARKERS = "osD^vP"
DPI = 100


def draw(results: Results, folder: Path) -> Iterator[Path]:
    """Write the figures that have rows; yield each file."""
    for name, plot in (("limit", limit), ("host", host), ("training", training)):
        figure = plot(results)
        if figure is not None:
            path = folder / f"{results.name}-{name}.png"
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
            yield path


def where(results: Results) -> str:
    row = results.first
    place = processor(row) if row.device == "cpu" else row.device
    return f"{place}, torch {row.torch}, commit {row.commit}"


def axes(size: tuple[float, float], heading: str, results: Results) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{heading}\n{where(results)}", x=0.01, ha="left", fontsize=9)
    return figure, figure.subplots()


def limit(results: Results) -> Figure | None:
    """Draw a dot for each provider and case: the time as a multiple of the byte limit."""
    rows = [
        row
        for row in timed(results.of(STEP.name))
        if not row.is_bound and row.case != SMALL and row.over_limit
    ]
    if not rows:
        return None
    providers = unique(row.provider for row in rows)
    figure, own = axes(
        (7.5, 1.6 + 0.27 * len(providers)),
        f"AdamW + EMA: time of a step over the time to move {rows[0].bytes_per_param} bytes a "
        "parameter",
        results,
    )
    for i, case in enumerate(unique(row.case for row in rows)):
        points = [
            (row.over_limit, providers.index(row.provider)) for row in rows if row.case == case
        ]
        own.scatter(
            *zip(*points, strict=True),
            s=26,
            marker=MARKERS[i % len(MARKERS)],
            color=COLORS[i % len(COLORS)],
            alpha=0.85,
            label=title(case),
        )
    own.axvline(1.0, color="black", linewidth=1.0)
    own.set_xscale("log")
    plain_ticks(own.xaxis)
    own.set_xlabel("time / byte limit; at 1 as fast as a plain loop over as many bytes")
    own.set_yticks(range(len(providers)), providers)
    own.invert_yaxis()
    own.grid(axis="x", which="both", alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def plain_ticks(axis: Any) -> None:
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def host(results: Results) -> Figure | None:
    """Draw lines through the medians, with the range from p10 to p90."""
    rows = timed(results.host)
    if not rows:
        return None
    figure, own = axes(
        (7.5, 4.2), "AdamW + EMA: host time of a step, tensors of hardly any elements", results
    )
    for i, provider in enumerate(unique(row.provider for row in rows)):
        for hot, style in ((False, "-"), (True, "--")):
            chosen = [r for r in rows if r.provider == provider and ("hot" in r.case) == hot]
            counts = [int(row.case.rpartition("_")[2]) for row in chosen]
            label = f"{provider}, {'same' if hot else 'new'} gradients"
            own.plot(counts, micro(chosen, "median_ms"), style, color=COLORS[i], label=label)
            low, high = micro(chosen, "p10_ms"), micro(chosen, "p90_ms")
            own.fill_between(counts, low, high, color=COLORS[i], alpha=0.15, linewidth=0)
    own.set_xscale("log")
    own.set_yscale("log")
    for axis in (own.xaxis, own.yaxis):
        plain_ticks(axis)
    own.set_xlabel("tensors")
    own.set_ylabel("µs a step; bands from p10 to p90")
    own.grid(alpha=0.25)
    own.legend(frameon=False)
    return figure


def micro(rows: list[Row], name: str) -> list[float]:
    return [1e3 * (row.number(name) or 0.0) for row in rows]


def training(results: Results) -> Figure | None:
    """Draw bars of the share that optimizer and average take."""
    rows = timed(results.training)
    if not rows:
        return None
    figure, own = axes(
        (7.5, 1.4 + 0.27 * len(rows)), "Share of a training step spent in optimizer + EMA", results
    )
    labels = [f"{title(row.case)}, {number_of(row.batch, 'image')}: {row.provider}" for row in rows]
    shares = [100.0 * (row.number("step_share") or 0.0) for row in rows]
    models = list(TITLES)
    colors = [COLORS[models.index(row.case) % len(COLORS)] for row in rows]
    own.barh(range(len(rows)), shares, color=colors, height=0.7)
    for i, (row, share) in enumerate(zip(rows, shares, strict=True)):
        text = f" {share:.1f} % of {row.number('median_ms'):,.0f} ms"
        own.annotate(text, (share, i), va="center", fontsize=8)
    own.set_yticks(range(len(rows)), labels)
    own.invert_yaxis()
    own.set_xlim(0, 1.35 * max(shares))
    own.set_xlabel("% of the step (forward, backward, optimizer, average)")
    return figure
