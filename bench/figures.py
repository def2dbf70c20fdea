"""Draws the results of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .rows import Results, Row, passes_ms, timed, unique
from .spec import STEP
from .titles import SMALL, number_of, processor, title

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
        (7.5, 2.0 + 0.27 * len(providers)),
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
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plain_ticks(axis: Any) -> None:
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def host(results: Results) -> Figure | None:
    """Draw lines through the medians with new gradients, with the range from p10 to p90."""
    rows = [row for row in timed(results.host) if "hot" not in row.case]
    if not rows:
        return None
    figure, own = axes(
        (7.5, 4.2),
        "AdamW + EMA: host time of a step, tensors of hardly any elements, new gradients",
        results,
    )
    for i, provider in enumerate(unique(row.provider for row in rows)):
        chosen = [row for row in rows if row.provider == provider]
        counts = [int(row.case.rpartition("_")[2]) for row in chosen]
        own.plot(counts, micro(chosen, "median_ms"), "o-", color=COLORS[i], ms=4, label=provider)
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
    """Draw bars of the time of optimizer and average, a panel for each model."""
    rows = timed(results.training)
    if not rows:
        return None
    models = unique(row.case for row in rows)
    counts = [sum(row.case == model for row in rows) for model in models]
    figure = Figure(figsize=(7.5, 1.3 + 0.6 * len(models) + 0.27 * len(rows)), layout="constrained")
    heading = "Training: time of optimizer + EMA after the same forward and backward passes"
    figure.suptitle(f"{heading}\n{where(results)}", x=0.01, ha="left", fontsize=9)
    panels = figure.subplots(len(models), 1, sharex=True, height_ratios=counts, squeeze=False)
    for own, model in zip(panels[:, 0], models, strict=True):
        draw_training(own, [row for row in rows if row.case == model])
    longest = max(row.step_ms for row in rows)
    panels[-1, 0].set_xlim(0, 1.1 * longest)
    panels[-1, 0].set_xlabel("ms of optimizer + EMA in a training step")
    return figure


def draw_training(own: Any, rows: list[Row]) -> None:
    colors = [COLORS[0] if row.is_ours else "tab:gray" for row in rows]
    own.barh(range(len(rows)), [row.step_ms for row in rows], color=colors, height=0.7)
    for i, row in enumerate(rows):
        own.annotate(f" {row.step_ms:.0f} ms", (row.step_ms, i), va="center", fontsize=8)
    own.set_yticks(range(len(rows)), [row.provider for row in rows])
    own.invert_yaxis()
    first = rows[0]
    about = f"{title(first.case)}, {number_of(first.batch, 'image')}"
    own.set_title(
        f"{about}: {passes_ms(rows):,.0f} ms of forward and backward", fontsize=9, loc="left"
    )
