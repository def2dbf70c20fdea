"""Times every provider in every scenario and case; see README.md beside this file.

``python -m bench.run --seconds 600 --out bench/results/NAME.csv`` runs everything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from time import monotonic

from . import record, table
from .cases import CASES, Case, shrunk
from .device import DEVICES, Device
from .harness import Settings, measure
from .host import fits, measure_host
from .providers import known, providers
from .record import Row
from .spec import CHAIN, GRAPH, OPTIMIZERS, SCENARIOS, STEP, Scenario, Spec
from .train import SMALLEST, TRAINED, measure_training

HOST, TRAINING = "host", record.TRAINING

# Larger cases take too long on a processor.
CPU_CASES = [name for name in CASES if name != "vit_l16"]
# The cases of scenarios other than step + EMA.
SCENARIO_CASES = ["resnet18", "vit_b16"]
MANY_LAUNCHES = [*SCENARIO_CASES, "tiny_10000x64"]


@dataclass(frozen=True)
class Item:
    """One table to measure."""

    name: str
    measure: Callable[[Device, Settings], Measured]


@dataclass(frozen=True)
class Measured:
    """A table's rows for the CSV, its text, and whether a provider has failed."""

    rows: list[Row]
    text: str
    failed: bool


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description="Times every provider in every scenario and case."
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to step (cpu)")
    cases = (*CASES, HOST, TRAINING)
    parser.add_argument(
        "--cases", nargs="+", choices=cases, metavar="CASE", help=f"some of {', '.join(cases)}"
    )
    scenarios = parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS)
    scenarios.metavar, scenarios.help = "SCENARIO", f"some of {', '.join(SCENARIOS)}"
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"], help="(adamw)"
    )
    names = parser.add_argument("--providers", nargs="+", choices=known())
    names.metavar, names.help = "NAME", f"some of {', '.join(map(repr, known()))}"
    parser.add_argument(
        "--rounds", type=int, default=Settings.rounds, help=f"at most ({Settings.rounds})"
    )
    parser.add_argument("--seconds", type=float, help="time for all tables together")
    parser.add_argument(
        "--out", type=Path, help="CSV file to write, or a folder for one named after the machine"
    )
    parser.add_argument("--add", action="store_true", help="keep the other tables of the file")
    parser.add_argument(
        "--shrink", type=int, default=1, metavar="N", help="cut tensors to an Nth, for a trial"
    )
    return parser.parse_args(argv)


def items(args: argparse.Namespace) -> list[Item]:
    """The requested tables: the first scenario's, then the others' in turns if time runs out."""
    kinds = []
    for optimizer in args.optimizers:
        for scenario in args.scenarios or SCENARIOS:
            spec = replace(OPTIMIZERS[optimizer], scenario=SCENARIOS[scenario])
            cases = args.cases or default_cases(args.device, spec.scenario)
            kinds.append([found for case in cases for found in item(case, spec, args.shrink)])
    others = [found for turn in zip_longest(*kinds[1:]) for found in turn if found is not None]
    return [*kinds[0], *others]


def default_cases(device: str, scenario: Scenario) -> list[str]:
    if scenario.graphed and device == "cpu":
        return []
    if scenario is not STEP:
        return MANY_LAUNCHES if scenario in (CHAIN, GRAPH) else SCENARIO_CASES
    first, *others = CASES if device == "cuda" else CPU_CASES
    return [first, HOST, TRAINING, *others]


def item(case: str, spec: Spec, shrink: int = 1) -> list[Item]:
    """The table of a case; none if the case makes no sense in the scenario."""
    name = f"{case}, {spec.scenario.name} with {spec.name}"
    if case not in (HOST, TRAINING):
        chosen = shrunk(CASES[case], shrink)
        return [Item(name, lambda *where: measured_case(chosen, spec, *where))]
    if spec.scenario is not STEP:
        return []
    if case == HOST:
        return [Item(name, lambda *where: measured_host(spec, *where))]
    models = TRAINED if shrink == 1 else [SMALLEST]
    return [Item(name, lambda *where: measured_training(models, spec, *where))]


def measured_case(case: Case, spec: Spec, device: Device, settings: Settings) -> Measured:
    chosen = providers(spec.scenario, case, device.torch_device.type)
    results = measure(case, spec, chosen, device, settings)
    failed = any(result.verdict.error for result in results)
    return Measured(list(map(record.result_row, results)), table.step_table(results), failed)


def measured_host(spec: Spec, device: Device, settings: Settings) -> Measured:
    results = measure_host(spec, device, settings)
    lines = fits(results)
    rows = [*map(record.result_row, results), *map(record.fit_row, lines)]
    failed = any(result.verdict.error for result in results)
    return Measured(rows, table.host_table(results, lines), failed)


def measured_training(
    models: Sequence[str], spec: Spec, device: Device, settings: Settings
) -> Measured:
    results = measure_training(models, spec, device, settings)
    failed = any(result.verdict.error for result in results)
    return Measured(list(map(record.training_row, results)), table.training_table(results), failed)


def shorter(settings: Settings, seconds: float) -> Settings:
    """The settings for a table that may take ``seconds``."""
    warmup = min(Settings.warmup_seconds, seconds / 100)
    return replace(settings, seconds=seconds, warmup_seconds=warmup)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each item; return 1 if a provider failed or an item had no time, else 0."""
    start = monotonic()
    args = arguments(argv)
    try:
        device = DEVICES[args.device]()
    except RuntimeError as error:
        sys.exit(f"--device {args.device}: {error}")
    settings = replace(Settings(), rounds=args.rounds, names=args.providers)
    late, failed = [], False
    shared = record.machine(device)
    out = args.out / record.file_name(shared) if args.out and args.out.is_dir() else args.out
    rows = record.read(out) if out and args.add else []
    print(", ".join(f"{key} {value}" for key, value in shared.items() if value))
    left = items(args)
    while left:
        item = left.pop(0)
        if args.seconds is not None:
            remaining = args.seconds - (monotonic() - start)
            if remaining <= 0:
                late.append(item.name)
                continue
            settings = shorter(settings, remaining / (len(left) + 1))
        print(f"measuring {item.name} ...", file=sys.stderr, flush=True)
        done = item.measure(device, settings)
        rows = record.merged(rows, [shared | row for row in done.rows])
        failed |= done.failed
        print(f"\n{done.text}\n", flush=True)
        if out:  # after every item, in case a later one fails
            record.write(out, rows)
    if late:
        print(f"no time left for {'; '.join(late)}")
    return int(bool(late) or failed)


if __name__ == "__main__":
    sys.exit(main())
