"""Figures of the experiments, drawn from saved JSON alone.

``python -m fused_ema.experiments.plots FIGURE.json OUT.png`` draws one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import gaps, seed_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can distinguish
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PINK, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#E69F00", "#999999"
DASHED = (0, (4, 2))


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure in the common style."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rc("font", size=11)
        mpl.rc("axes", titlelocation="left", titlesize=12)
        mpl.rc("axes.spines", top=False, right=False)
        mpl.rc("legend", frameon=False)
        yield Figure(figsize=(width, height), layout="constrained")


def numbers(values: Sequence[float | None]) -> list[float]:
    """Saved values as floats; None, for a number that JSON cannot hold, becomes a gap."""
    return [float("nan") if value is None else float(value) for value in values]


def draw_noisy_parabola(data: Mapping[str, Any], out: Path) -> None:
    """Draw the expected average over base steps, and the largest error over kappa."""
    with new_figure(15, 4.6) as figure:
        first, *others = figure.subplots(1, 3)
        draw_trajectories(first, data["trajectories"])
        for axes, order in zip(others, ("before", "after"), strict=True):
            draw_errors(axes, data["rows"], order)
        others[1].sharey(others[0])
        others[1].legend(fontsize=10, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(out, dpi=80)


def draw_trajectories(axes: Axes, curves: Mapping[str, Any]) -> None:
    """Draw the base run's average, and the averages at kappa with and without the rule."""
    kappa, steps = curves["kappa"], curves["base_steps"]
    axes.plot(steps, curves["base"], color=BLACK, lw=3.5, label="base, κ = 1")
    axes.plot(steps, curves["rule"], color=YELLOW, lw=1.7, label=f"κ = {kappa}, EMA rule $ρ^κ$")
    axes.plot(steps, curves["none"], color=ORANGE, ls=DASHED, label=f"κ = {kappa}, ρ left alone")
    axes.set(title=f"Average at κ = {kappa}", xlabel="base steps (κ × steps)", ylabel="E[ζ]")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    axes.grid(alpha=0.25)


def draw_errors(axes: Axes, rows: Sequence[Mapping[str, Any]], order: str) -> None:
    """Draw the errors of every choice of the decay; kappa = 1 only has rounding errors."""
    rows = [row for row in rows if row["kappa"] > 1]
    kappas = [row["kappa"] for row in rows]
    for name, label, style in (
        ("none", "ρ left alone", {"color": ORANGE, "ls": DASHED, "marker": "s"}),
        ("linear", "1 - κ(1 - ρ)", {"color": PINK, "marker": "^"}),
        ("rule", "rule $ρ^κ$", {"color": BLUE, "marker": "o"}),
        ("best", "best ρ* of each κ", {"color": GREEN, "ls": ":", "marker": "D"}),
    ):
        errors = numbers([row[f"error_{name}_{order}"] for row in rows])
        axes.plot(kappas, errors, label=label, ms=5, **style)
    axes.set(title=f"Errors, order {order!r}", xscale="log", yscale="log")
    axes.set(xlabel="κ", ylabel="max over steps of |E[g(ζ)] - E[g(ζ base)]|")
    axes.set_xticks(kappas[::2], [str(kappa) for kappa in kappas[::2]])
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def mean_and_range(values: Sequence[Sequence[float | None]]) -> tuple[Any, Any, Any]:
    """Mean, least and greatest over the seeds at every point, with a gap if a run diverged."""
    import numpy as np

    found = np.array([numbers(seed) for seed in values])
    return found.mean(0), found.min(0), found.max(0)


def draw_curve(
    axes: Axes, curve: Mapping[str, Any], style: Mapping[str, Any], scale: float = 1
) -> None:
    """Draw mean (line) and range (band) over the seeds against thousands of samples."""
    mean, low, high = (scale * part for part in mean_and_range(curve["seeds"]))
    samples = [s / 1000 for s in curve["samples"]]
    axes.fill_between(samples, low, high, color=style["color"], alpha=0.15, lw=0)
    axes.plot(samples, mean, **style)


def draw_polyak(data: Mapping[str, Any], out: Path) -> None:
    """Draw the average's test loss by both choices and its gap, in a row for each optimizer."""
    optimizers = list(dict.fromkeys(curve["optimizer"] for curve in data["curves"]))
    with new_figure(15, 3.7 * len(optimizers) + 0.4) as figure:
        grid = figure.subplots(len(optimizers), 3, squeeze=False)
        for row, optimizer in zip(grid, optimizers, strict=True):
            its = [curve for curve in data["curves"] if curve["optimizer"] == optimizer]
            row[1].sharey(row[0])
            for axes, average in zip(row, ("rule", "none"), strict=False):
                draw_losses(axes, [curve for curve in its if curve["average"] == average])
                told = "EMA rule, $ρ^κ$" if average == "rule" else "ρ left alone"
                axes.set_title(f"{optimizer}: {told}")
            row[0].set_ylabel("test loss of the average (log)")
            draw_gaps(row[2], its, optimizer)
        handles, labels = grid[0][0].get_legend_handles_labels()
        batch = data["base_batch"]
        figure.legend(handles, labels, loc="outside right center", title=f"base batch {batch}")
        figure.savefig(out, dpi=54)


def draw_gaps(axes: Axes, curves: Sequence[Mapping[str, Any]], optimizer: str) -> None:
    """Draw the largest gap to kappa = 1 in the last half over kappa, and what seeds differ by."""
    losses = {(curve["average"], curve["kappa"]): curve["loss"] for curve in curves}
    kappas = sorted({kappa for _, kappa in losses if kappa != 1})
    for average, label, style in (
        ("none", "ρ left alone", {"color": ORANGE, "ls": DASHED, "marker": "s"}),
        ("rule", "EMA rule, $ρ^κ$", {"color": BLUE, "marker": "o"}),
        ("weights", "weights, no average", {"color": GREY, "ls": ":", "marker": "^"}),
    ):
        parts = ("mean", "min", "max")
        found = [gaps(losses[average, k], losses[average, 1])["late"] for k in kappas]
        mean, low, high = (numbers([gap[part] for gap in found]) for part in parts)
        axes.fill_between(kappas, low, high, color=style["color"], alpha=0.15, lw=0)
        axes.plot(kappas, mean, label=label, ms=5, **style)
    seeds = seed_spread(losses["rule", 1])["late"]
    if seeds:
        axes.axhline(seeds, color=BLACK, lw=1, label="seeds at κ = 1")
    axes.set(title=f"{optimizer}: gap to κ = 1 (last half)", xscale="log", xlabel="κ")
    if kappas:
        set_log_scale(axes)
    axes.set_xticks(kappas, [f"{kappa:g}" for kappa in kappas])
    axes.minorticks_off()
    axes.set_ylabel("largest |loss - loss at κ = 1| (log)")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.25)


def draw_losses(axes: Axes, curves: Sequence[Mapping[str, Any]]) -> None:
    """Draw one line a kappa, from blue (small) to orange (large), black at 1."""
    for curve, colour in zip(curves, colours(curve["kappa"] for curve in curves), strict=True):
        base = curve["kappa"] == 1
        style = {"color": colour, "lw": 3 if base else 1.5, "label": f"κ = {curve['kappa']:g}"}
        draw_curve(axes, curve["loss"], style)
    axes.set_xlabel("samples seen (thousands)")
    set_log_scale(axes)
    axes.grid(alpha=0.25)


def set_log_scale(axes: Axes) -> None:
    """Set a logarithmic scale of losses, with plain numbers as labels."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def colours(kappas: Iterable[float]) -> list[str]:
    """A colour for each kappa: blues below 1, black at 1, yellow to red above."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    found = list(kappas)
    below, above = (sorted(k for k in found if (k > 1) == up and k != 1) for up in (False, True))
    result = {1.0: BLACK}
    for kappa in below:
        result[kappa] = to_hex(colormaps["winter"](below.index(kappa) / len(below)))
    for kappa in above:
        result[kappa] = to_hex(colormaps["plasma"](0.85 - 0.75 * above.index(kappa) / len(above)))
    return [result[float(kappa)] for kappa in found]


# The averages that follow the rule: one of them (rule, none), or of DINO's two.
AVERAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "rule": ("EMA rule $ρ^κ$", {"color": BLUE}),
    "both": ("rule for both", {"color": BLUE}),
    "rho": ("rule for ρ alone", {"color": SKY, "ls": "-."}),
    "centre": ("rule for the centre alone", {"color": GREEN, "ls": ":"}),
    "none": ("ρ left alone", {"color": ORANGE, "ls": DASHED}),
}


def draw_features(data: Mapping[str, Any], out: Path) -> None:
    """Draw k-NN and linear-probe accuracy of the encoder's features over samples seen."""
    titles = {"knn": "k nearest neighbours: test accuracy (%)", "probe": "linear probe (%)"}
    draw_panels(data, titles, AVERAGES, out)


def draw_batchnorm(data: Mapping[str, Any], out: Path) -> None:
    """Draw loss and accuracy of the weights with and without the rule for the statistics."""
    labels = {
        "rule": ("decay $0.9^κ$", AVERAGES["rule"][1]),
        "none": ("decay left alone", AVERAGES["none"][1]),
    }
    titles = {
        "weights_loss": "test loss of the weights (log)",
        "weights_accuracy": "test accuracy of the weights (%)",
    }
    draw_panels(data, titles, labels, out)


def draw_speech(data: Mapping[str, Any], out: Path) -> None:
    """Draw the averages' digit error, supervised and with pseudo-labels."""
    with new_figure(12.5, 4.6) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, task in zip(panels, ("supervised", "pseudo-labels"), strict=True):
            for curve in data["curves"]:
                if curve["task"] == task and (curve["kappa"], curve["average"]) != (1, "none"):
                    draw_labelled(axes, curve, "error", AVERAGES, 100)
            axes.set(title=task, xlabel="strings seen (thousands)", yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("wrong digits of the average (%, log)")
        handles, found = panels[1].get_legend_handles_labels()
        title = f"base batch {data['base_batch']}"
        figure.legend(handles, found, loc="outside right center", title=title)
        figure.savefig(out, dpi=90)


def draw_panels(
    data: Mapping[str, Any],
    titles: Mapping[str, str],
    labels: Mapping[str, tuple[str, dict[str, Any]]],
    out: Path,
) -> None:
    """Draw a panel for each quantity, with a line for each kappa and choice of the averages.

    Args:
        data: the curves, each with its ``kappa`` and ``average``.
        titles: the quantities; those named loss have a logarithmic scale, others are in percent.
        labels: label and style of each ``average``.
        out: the file.
    """
    with new_figure(12.5, 4.6) as figure:
        panels = figure.subplots(1, len(titles))
        for axes, (name, title) in zip(panels, titles.items(), strict=True):
            loss = name.endswith("loss")
            for curve in data["curves"]:
                draw_labelled(axes, curve, name, labels, 1 if loss else 100)
            axes.set(title=title, xlabel="samples seen (thousands)")
            if loss:
                set_log_scale(axes)
            axes.grid(alpha=0.25)
        handles, found = panels[0].get_legend_handles_labels()
        title = f"base batch {data['base_batch']}"
        figure.legend(handles, found, loc="outside right center", title=title)
        figure.savefig(out, dpi=90)


def draw_labelled(
    axes: Axes,
    curve: Mapping[str, Any],
    name: str,
    labels: Mapping[str, tuple[str, dict[str, Any]]],
    scale: float,
) -> None:
    """Draw a curve in the style of its kappa and its choice of the averages."""
    label, style = labels[curve["average"]]
    if curve["kappa"] == 1:
        style = {"color": BLACK, "lw": 3.0, "label": "κ = 1"}
    else:
        style = {"lw": 1.7, "label": f"κ = {curve['kappa']:g}, {label}", **style}
    draw_curve(axes, curve[name], style, scale)


def draw_progressive(data: Mapping[str, Any], out: Path) -> None:
    """Draw a panel for each task and largest kappa: fixed, switched, doubled, and kappa = 1."""
    panels: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for curve in data["curves"]:
        panels.setdefault((curve["task"], max(curve["kappas"].values())), []).append(curve)
    bases = {task: panels.pop((task, 1.0)) for task in dict.fromkeys(t for t, _ in panels)}
    with new_figure(6 * len(panels) // len(bases), 4.2 * len(bases)) as figure:
        columns = len(panels) // len(bases)
        grid = figure.subplots(len(bases), columns, sharey="row", squeeze=False)
        for axes, ((task, kappa), curves) in zip(grid.flat, panels.items(), strict=True):
            for curve, style in zip([*bases[task], *curves], PLANS, strict=False):
                plan = curve["plan"].removeprefix(f"kappa {kappa:g} ")
                label = {"kappa 1": "κ = 1", f"kappa {kappa:g}": "from the start"}.get(plan, plan)
                name, scale = ("rule_loss", 1) if task == "polyak" else ("knn", 100)
                draw_curve(axes, curve[name], {**style, "label": label}, scale)
            axes.set(title=f"{task}: κ up to {kappa:g}", xlabel="samples seen (thousands)")
            if task == "polyak":
                set_log_scale(axes)
            axes.grid(alpha=0.25)
        for row, task in zip(grid, bases, strict=True):
            polyak = "test loss of the average (log)"
            row[0].set_ylabel(polyak if task == "polyak" else "k-NN accuracy (%)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", title="large batch")
        figure.savefig(out, dpi=72)


PLANS: tuple[dict[str, Any], ...] = (
    {"color": BLACK, "lw": 3},
    {"color": ORANGE, "ls": DASHED, "lw": 1.7},
    {"color": BLUE, "lw": 1.7},
    {"color": SKY, "lw": 1.7},
    {"color": GREEN, "ls": "-.", "lw": 1.7},
    {"color": PINK, "ls": ":", "lw": 1.7},
)

DRAW: dict[str, Callable[[Mapping[str, Any], Path], None]] = {
    "noisy_parabola": draw_noisy_parabola,
    "polyak": draw_polyak,
    "batchnorm": draw_batchnorm,
    "byol": draw_features,
    "dino": draw_features,
    "progressive": draw_progressive,
    "speech": draw_speech,
}


def draw(data: Mapping[str, Any], out: Path) -> None:
    """Write the figure of an experiment's ``figure.json``; the file's suffix gives the format."""
    DRAW[data["experiment"]](data, out)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    draw(json.loads(Path(source).read_text()), Path(target))
