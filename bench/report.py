"""Makes docs/benchmarks.md, its figures and README's table from the CSV files in bench/results."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .cases import CASES
from .rows import Results, Row, everything, timed, unique
from .spec import SCENARIOS, STEP, Scenario
from .titles import SMALL, number_of, processor, title

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "benchmarks"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: python -m bench.report -->", "<!-- end of results -->"

# The providers in README's table.
RIVALS = (
    "torch fused + lerp",
    "torch foreach + lerp",
    "torch for-loop + AveragedModel",
    "torch fused + timm ModelEmaV3",
    "torch fused + ema-pytorch",
)
# The cases whose rows are shown in full.
DETAILED = ("resnet18", "vit_b16")

INTRODUCTION = """# Benchmarks

`python -m bench.report` makes this page from the files in `bench/results`; edit neither.
`bench/README.md` explains how the times are measured, and how to measure your own. A ratio is a
provider's time over that of `fused_ema native`, paired by round: above 1 `fused_ema native` is
faster, below 1 slower. Every result was checked against the reference first.
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


def losses(rows: Iterable[Row]) -> str:
    faster = [
        f"{row.provider} on {title(row.case)} ({digits(row.number('time_over_ours'))})"
        for row in timed(rows)
        if not row.is_bound and (row.number("time_over_ours") or 1.0) < 1.0
    ]
    none = "No tested alternative was faster."
    return f"Faster than ours: {', '.join(faster)}." if faster else none


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
        "processor's caches hold everything.\n"
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
        "step. An optimizer can save at most the time of the step, and its share shrinks with "
        "larger batches.\n"
    )
    lines = [
        (
            f"{title(row.case)}, {number_of(row.batch, 'image')}",
            row.provider,
            digits(row.number("median_ms")),
            digits(row.number("p10_ms")),
            digits(row.number("p90_ms")),
            percent(row.number("step_share"), 1),
            digits(row.number("time_over_ours"), "×"),
        )
        for row in rows
    ]
    heading = ("", "provider", "median ms", "p10", "p90", "optimizer + EMA", "over ours")
    yield table(heading, lines) + "\n"
    yield f"{losses(rows)}\n"
    reasons = list(untimed(results.training))
    if reasons:
        yield "\n".join(reasons) + "\n"
    if rows:
        yield figure(results, "training", "Share of a training step in optimizer and EMA")


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
        cases = results.cases(STEP.name)
        rows = {(row.provider, row.case): row for row in results.of(STEP.name)}
        lines = []
        for case in cases:
            ours = baseline(results.of(STEP.name, case))
            if ours is not None:
                others = [ratio(rows.get((rival, case)), results) for rival in RIVALS]
                time = digits(ours.number("median_ms"), " ms")
                lines.append([sized(case), time, of_bound(results, STEP, case), *others])
        parts.append(f"{machine(results)}; medians, ratios paired by round:\n")
        parts.append(table(["AdamW + EMA, float32", "ours", "of the bound", *RIVALS], lines) + "\n")
        parts += [f"- {line}" for line in remarks(results)]
        parts.append("")
    return "\n".join(parts)


def remarks(results: Results) -> Iterator[str]:
    compared = [row for scenario in SCENARIOS for row in results.of(scenario)]
    yield losses(compared)
    hosts = [
        f"{row.provider} {digits(row.number('host_us'))} + "
        f"{digits(row.number('host_us_per_tensor'))} µs a tensor"
        for row in results.fits
        if not row.case.endswith("_hot")
    ]
    if hosts:
        yield f"Host time of a step in µs, with new gradients: {'; '.join(hosts)}."
    shares = [
        f"{percent(row.number('step_share'), 1)} with {row.provider}"
        for row in timed(results.training)
        if row.case == results.training[0].case
    ]
    if shares:
        first = results.training[0]
        step = f"a training step of {title(first.case)} with {number_of(first.batch, 'image')}"
        yield (
            f"In {step}, optimizer and average take {', '.join(shares)}. A faster optimizer "
            "could save at most that."
        )


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
