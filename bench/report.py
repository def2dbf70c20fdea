"""Makes docs/benchmarks.md, its figures and README's results from bench/results."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import wrap

from .cases import CASES
from .rows import Results, Row, everything, passes_ms, timed, unique
from .spec import SCENARIOS, STEP, Scenario
from .titles import SMALL, number_of, processor, title

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "benchmarks"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: python -m bench.report -->", "<!-- end of results -->"

# The providers in README.
RIVALS = ("torch fused + lerp", "torch fused + timm ModelEmaV3", "torch for-loop + AveragedModel")
# The cases whose rows are shown in full.
DETAILED = ("resnet18", "vit_b16")

INTRODUCTION = """# Benchmarks

`python -m bench.report` makes this page from the files in `bench/results`; edit neither.
`bench/README.md` explains how the times are measured, and how to measure your own. A ratio is a
provider's time over that of `fused_ema native`, paired by round: above 1 `fused_ema native` is
faster, below 1 slower. Every result was checked against the reference first.

A fused step of AdamW with an average must move 36 bytes a parameter, and a step with a separate
pass for the average 40: saving that pass alone gains at most 1.11×. Larger ratios on large tensors
mean that the alternative does not reach the memory's bandwidth: torch's fused CPU step does not.
With many small tensors, host overhead dominates; with unscaling and clipping, the saved passes over
the gradients do. The `foreach` and `reference` backends are slower than torch's own foreach; they
step the parameters that native cannot.
"""


def table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rules = ["---", *["--:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heading, rules, *lines))


def digits(value: float | None, unit: str = "") -> str:
    """A value with three significant digits."""
    if value is None:
        return ""
    places = 0 if value >= 100 or value == 0 else 1 if value >= 10 else 2
    return f"{value:,.{places}f}{unit}"


def percent(value: float | None, places: int = 0) -> str:
    return "" if value is None else f"{100.0 * value:.{places}f} %"


def sized(case: str) -> str:
    """A case's title, with its number of parameters unless the title says it."""
    count, millions = len(CASES[case].shapes), CASES[case].numel / 1e6
    return title(case) if count == 1 else f"{title(case)} ({count:,} tensors, {millions:,.1f} M)"


def machine(results: Results) -> str:
    row = results.first
    parts = {
        "GPU": "" if row.device == "cpu" else row.device,
        "driver": row.driver,
        "CPU": processor(row),
        "torch": row.torch,
        "Triton": row.triton,
        "commit": row.commit,
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value)


def baseline(rows: Iterable[Row]) -> Row | None:
    """The row that ratios refer to: the first of our backends that has a time."""
    return next((row for row in timed(rows) if row.is_ours), None)


def faster(rows: Iterable[Row]) -> list[str]:
    """The alternatives that were faster than ours, with their ratios."""
    return [
        f"{row.provider} on {title(row.case)} ({digits(row.number('time_over_ours'))})"
        for row in timed(rows)
        if not row.is_bound and (row.number("time_over_ours") or 1.0) < 1.0
    ]


def losses(rows: Iterable[Row]) -> str:
    found = faster(rows)
    none = "No tested alternative was faster."
    return f"Faster than ours: {', '.join(found)}." if found else none


def untimed(rows: Iterable[Row]) -> Iterator[str]:
    """Lines that say which providers have no time and why, grouped by reason and cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            cases.setdefault((row.provider, row.error), []).append(title(row.case))
    providers: dict[tuple[str, str], list[str]] = {}
    for (provider, reason), where in cases.items():
        providers.setdefault((", ".join(where), reason), []).append(provider)
    for (where_all, reason), own in providers.items():
        yield f"- No time for {', '.join(own)} on {where_all}: {reason}."


def ratios(results: Results, scenario: Scenario) -> str:
    """The table of ratios: a row for each provider, a column for each case."""
    cases = results.cases(scenario.name)
    rows = {(row.provider, row.case): row for row in results.of(scenario.name)}
    lines = []
    for provider in unique(row.provider for row in results.of(scenario.name)):
        own = [rows.get((provider, case)) for case in cases]
        if any(row is not None and row.median_ms for row in own):
            lines.append([provider, *(ratio(row, results) for row in own)])
    lines.append(["of the bound, ours", *(of_bound(results, scenario, case) for case in cases)])
    return table(["", *map(title, cases)], lines)


def ratio(row: Row | None, results: Results) -> str:
    if row is None or not row.median_ms:
        return ""
    ours = baseline(results.of(row.scenario, row.case))
    if row is ours:
        return f"**{digits(row.number('median_ms'), ' ms')}**"
    return digits(row.number("time_over_ours"), "×")


def of_bound(results: Results, scenario: Scenario, case: str) -> str:
    """Our share of the bound's bandwidth; ``host-bound`` if bytes hardly matter."""
    ours = baseline(results.of(scenario.name, case))
    if case == SMALL:
        return "host-bound"
    return "" if ours is None else percent(ours.number("share_of_bound"))


def details(rows: Sequence[Row]) -> str:
    """The table of one case, with every column that is not empty."""
    columns = {
        "median ms": "median_ms",
        "p10": "p10_ms",
        "p90": "p90_ms",
        "device ms": "device_ms",
        "host µs": "host_us",
        "GB/s": "gb_per_s",
        "launches": "launches",
        "torch operators": "torch_ops",
        "extra MB": "peak_extra_mb",
        "first step, ms": "first_step_ms",
    }
    shown = {
        name: [digits(row.number(column)) for row in timed(rows)]
        for name, column in columns.items()
    }
    for count in ("launches", "torch operators"):
        shown[count] = [row.fields[columns[count]] for row in timed(rows)]
    filled = {name: cells for name, cells in shown.items() if any(cells)}
    providers = [row.provider for row in timed(rows)]
    return table(["", *filled], zip(providers, *filled.values(), strict=True))


def scenario_section(results: Results, scenario: Scenario) -> Iterator[str]:
    rows = results.of(scenario.name)
    counted = baseline(rows)
    if counted is None:
        return
    yield f"### {scenario.title[0].upper()}{scenario.title[1:]}\n"
    counted_bytes = f"A step must move {counted.bytes_per_param} bytes a parameter."
    yield f"{counted_bytes} {scenario_note(scenario)}".rstrip() + "\n"
    yield ratios(results, scenario) + "\n"
    yield f"{losses(rows)}\n"
    reasons = list(untimed(rows))
    if reasons:
        yield "\n".join(reasons) + "\n"
    cases = results.cases(scenario.name)
    case = next((case for case in DETAILED if case in cases), cases[0])
    yield f"{sized(case)} in full:\n"
    yield details(results.of(scenario.name, case)) + "\n"


def scenario_note(scenario: Scenario) -> str:
    notes = {
        "clip": "Theirs is `clip_grad_norm_`, the step and the average.",
        "chain": "Theirs is `GradScaler`, `clip_grad_norm_`, the step and the average.",
        "bf16": (
            "Only fused_ema and timm round an average in bfloat16 stochastically. The others keep "
            "theirs in float32, because an average that is rounded to nearest would not move at "
            "usual decays."
        ),
        "ema": "Ours is `FusedEMA`, which works with any optimizer.",
    }
    return notes.get(scenario.name, "")


def host_section(results: Results) -> Iterator[str]:
    if not results.fits:
        return
    yield "### Host time\n"
    yield (
        "Steps over n tensors with hardly any elements, and the line through the medians. "
        "Gradients are either new at every step, or the same at every step, so that the "
        "processor's caches hold everything. The two are measured one after the other, so that a "
        "difference between them includes changes of the machine's speed; the figure shows new "
        "gradients.\n"
    )
    lines = [
        (
            row.provider,
            "same" if row.case.endswith("_hot") else "new",
            digits(row.number("host_us")),
            f"{row.number('host_us_per_tensor'):.3f}",
        )
        for row in results.fits
    ]
    yield table(("", "gradients", "µs a step", "µs a tensor"), lines) + "\n"
    yield figure(results, "host", "Host time of a step against the number of tensors")


def training_section(results: Results) -> Iterator[str]:
    rows = timed(results.training)
    if not results.training:
        return
    yield "### Training\n"
    yield (
        "Forward and backward passes of timm's models on random images of 224 × 224, then the "
        "step of optimizer and average. The passes are the same code for everyone, so their time "
        "is given once. An optimizer can save at most the time of its own step, and its share "
        "shrinks with larger batches.\n"
    )
    lines = []
    for case in unique(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        about = f"{title(case)}, {number_of(own[0].batch, 'image')}"
        passes = digits(passes_ms(own), " ms")
        lines += [training_line(about, passes, row) for row in own]
    heading = ("", "provider", "optimizer + EMA", "share", "forward + backward", "whole step")
    yield table((*heading, "p10", "p90", "over ours"), lines) + "\n"
    if rows:
        yield f"{whole_steps(rows)}\n"
    reasons = list(untimed(results.training))
    if reasons:
        yield "\n".join(reasons) + "\n"
    if rows:
        yield figure(results, "training", "Time of optimizer and EMA in a training step")


def training_line(about: str, passes: str, row: Row) -> tuple[str, ...]:
    columns = ("median_ms", "p10_ms", "p90_ms")
    whole, *range_of = (digits(row.number(column)) for column in columns)
    share = percent(row.number("step_share"), 1)
    ratio = digits(row.number("time_over_ours"), "×")
    step = digits(row.step_ms, " ms")
    return about, row.provider, step, share, passes, f"{whole} ms", *range_of, ratio


def whole_steps(rows: Sequence[Row]) -> str:
    """Who was faster over whole training steps, and how much these vary by themselves."""
    spreads = [
        ((row.number("p90_ms") or 0.0) - (row.number("p10_ms") or 0.0))
        / (row.number("median_ms") or 1.0)
        for row in rows
    ]
    noise = (
        f"Whole training steps vary by {percent(min(spreads))} to {percent(max(spreads))} of their "
        "median (p10 to p90)"
    )
    found = faster(rows)
    if not found:
        return f"{noise}. No tested alternative was faster over them."
    slower = all(row.step_ms > ours.step_ms for row, ours in with_ours(rows))
    why = ", although the step itself took longer than ours" if slower else ""
    return f"{noise}. Faster than ours over them: {', '.join(found)}{why}."


def with_ours(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """The rows of the alternatives that were faster, each with ours of the same case."""
    for row in rows:
        ours = baseline(other for other in rows if other.case == row.case)
        if ours is not None and not row.is_ours and faster([row]):
            yield row, ours


def figure(results: Results, name: str, alt: str) -> str:
    return f"![{alt}]({FIGURES.name}/{results.name}-{name}.png)\n"


def page(everyone: Sequence[Results]) -> str:
    parts = [INTRODUCTION]
    for results in everyone:
        parts.append(f"## {results.name}\n")
        parts.append(f"{machine(results)}.\n")
        parts.append(figure(results, "limit", "Time against the byte limit, per provider"))
        for scenario in SCENARIOS.values():
            parts += scenario_section(results, scenario)
        parts += [*host_section(results), *training_section(results)]
    return "\n".join(parts)


def summary(everyone: Sequence[Results]) -> str:
    """The text that README shows between its two comments."""
    parts = []
    for results in everyone:
        items = [line for item in items_about(results) for line in wrapped(item)]
        parts += [f"{machine(results)}:", "", *items, ""]
    return "\n".join(parts)


def wrapped(item: str) -> list[str]:
    return wrap(item, 128, initial_indent="- ", subsequent_indent="  ")


def items_about(results: Results) -> Iterator[str]:
    """A machine's results in a few sentences."""
    rows = timed(results.of(STEP.name))
    sizes = [CASES[row.case].numel / 1e6 for row in rows if row.case != SMALL]
    if sizes:
        large = [row for row in rows if row.case != SMALL]
        yield (
            f"AdamW with an average, {min(sizes):,.0f} to {max(sizes):,.0f} million parameters, in "
            f"multiples of our time: {longer(large)}."
        )
    small = [row for row in rows if row.case == SMALL]
    if small:
        yield f"The same on 10,000 tensors of 64 elements: {longer(small)}."
    compared = [row for scenario in SCENARIOS for row in results.of(scenario)]
    yield losses(compared).replace("was faster", "had a faster step")
    training = timed(results.training)
    if training:
        yield whole_steps(training)


def longer(rows: Sequence[Row]) -> str:
    """How many times as long as ours each rival takes, from the least to the most."""
    found = []
    for provider in RIVALS:
        ratios = [row.number("time_over_ours") for row in rows if row.provider == provider]
        known = sorted(ratio for ratio in ratios if ratio)
        if known:
            ends = unique(digits(ratio) for ratio in (known[0], known[-1]))
            found.append(f"{provider} {' to '.join(ends)}")
    return ", ".join(found)


def readme(text: str, everyone: Sequence[Results]) -> str:
    """The README with the results inserted.

    Raises:
        ValueError: the README lacks a comment.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks the comment {END if begin else BEGIN}")
    return f"{before}{BEGIN}\n{summary(everyone)}{END}{after}"


def documents() -> dict[Path, str]:
    everyone = everything()
    return {PAGE: page(everyone), README: readme(README.read_text(), everyone)}


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.report", description=__doc__).parse_args()
    from . import figures  # imported here, because only it needs matplotlib

    for path, text in documents().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
    FIGURES.mkdir(exist_ok=True)
    for results in everything():
        for path in figures.draw(results, FIGURES):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
