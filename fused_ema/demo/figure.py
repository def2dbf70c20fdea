"""The demo's figure: EMA model over samples seen, and the time of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .batch_scaling import BASE_BATCH, Curves
from .timing import CROWDED, OURS, Timing, describe, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase, SubFigure

# Okabe and Ito's palette, which colour-blind readers can distinguish
COLOURS = {1: "#000000", 4: "#0072B2", 16: "#D55E00"}
OTHER_COLOUR = "#999999"
OUR_COLOUR = "#009E73"
DASHED = (0, (4, 2))


def draw(curves: Sequence[Curves], timings: Sequence[Timing], out: Path) -> None:
    """Write the figure, without times if there are none; the file's suffix gives the format."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rc("font", size=11)
        mpl.rc("axes", titlelocation="left", titlesize=12)
        mpl.rc("axes.spines", top=False, right=False)
        if timings:
            figure = Figure(figsize=(15, 6), layout="constrained")
            grid = figure.add_gridspec(1, 2, width_ratios=(1.7, 1), wspace=0.03)
            draw_scores(figure.add_subfigure(grid[0]), curves)
            draw_timings(figure.add_subfigure(grid[1]), timings)
        else:
            figure = Figure(figsize=(9.5, 5), layout="constrained")
            draw_scores(figure, curves)
        figure.savefig(out, dpi=120)


def draw_timings(figure: SubFigure, timings: Sequence[Timing]) -> None:
    """Draw a panel for each network."""
    for axes, timing in zip(figure.subplots(len(timings), 1), timings, strict=True):
        draw_timing(axes, timing)
    figure.suptitle("Time of a step, AdamW + EMA (a quick look)", weight="bold")


def draw_scores(figure: FigureBase, curves: Sequence[Curves]) -> None:
    """Draw test loss and accuracy of the averages over samples seen."""
    from matplotlib.ticker import LogLocator, NullLocator

    loss, accuracy = figure.subplots(1, 2)
    draw_curves(loss, curves, Curves.losses)
    loss.set(title="test loss (log scale)", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_locator(NullLocator())
    draw_curves(accuracy, curves, lambda curve, average: 100 * curve.accuracies(average))
    accuracy.set(title="test accuracy (%)")
    figure.suptitle("EMA model at κ times the batch size (mean and range of seeds)", weight="bold")
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def draw_curves(
    axes: Axes, curves: Sequence[Curves], values: Callable[[Curves, int], Tensor]
) -> None:
    """Draw one line for each average: solid with the rule, dashed without."""
    for curve in curves:
        batch = f"κ = {curve.kappa}, batch {curve.kappa * BASE_BATCH}"
        names = {0: f"{batch}: EMA rule, $ρ^κ$", 1: f"{batch}: ρ left alone"}
        if curve.kappa == 1:
            names = {0: batch}
        for average, name in names.items():
            draw_line(axes, curve, values(curve, average), name, dashed=average == 1)
        if curve.kappa == 1:
            axes.plot([], " ", label=" ")  # gives the legend a column for each kappa
    axes.set_xlabel("samples seen")
    axes.set_xlim(0, curves[0].samples[-1].item())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)


def draw_line(axes: Axes, curve: Curves, values: Tensor, name: str, dashed: bool) -> None:
    """Draw the mean over the seeds as a line, and their range as a band."""
    colour = COLOURS[curve.kappa]
    samples = curve.samples.numpy()
    axes.fill_between(
        samples, values.amin(0).numpy(), values.amax(0).numpy(), color=colour, alpha=0.15, lw=0
    )
    axes.plot(
        samples,
        values.mean(0).numpy(),
        color=colour,
        linestyle=DASHED if dashed else "-",
        linewidth=3 if curve.kappa == 1 else 1.7,
        label=name,
    )


def draw_timing(axes: Axes, timing: Timing) -> None:
    """Draw the median time of a step, with the 10th to 90th percentile."""
    names, longest = list(timing.seconds), 0.0
    for i, name in enumerate(names):
        low, median, high = (1e3 * value for value in timing.quantiles(name))
        axes.barh(i, median, height=0.6, color=OUR_COLOUR if name == OURS else OTHER_COLOUR)
        axes.errorbar(
            median, i, xerr=[[median - low], [high - median]], color="black", capsize=3, lw=1
        )
        longest = max(longest, high)
        axes.annotate(
            f"{milliseconds(median)} ms"
            + ("" if name == OURS else f"  ({timing.ratio(name):.1f}×)"),
            (max(median, high), i),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * longest)
    threads = f"{timing.threads} thread" + "s" * (timing.threads > 1)
    if timing.crowded():
        # beside our bar, which is seldom the longest and leaves room
        at, across = (0.99, len(names) - 1), axes.get_yaxis_transform()
        axes.text(*at, CROWDED, color="#D55E00", ha="right", va="center", transform=across)
    axes.set(title=describe(timing), xlabel=f"ms a step, {threads}: median, p10 to p90")
