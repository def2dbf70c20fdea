"""Times every provider on every case: ``python -m bench.run``; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from . import record, table
from .cases import CASES
from .harness import Result, Settings, measure
from .host import Fit, fits, measure_host
from .providers import OPTIMIZERS, PROVIDERS

HOST = "host"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    cases = (*CASES, HOST)
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, metavar="CASE")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"])
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args(argv)


def measure_case(
    name: str, optimizer: str, settings: Settings
) -> tuple[list[Result], list[Fit], str]:
    """Results, the host's fitted lines, and the table."""
    spec = OPTIMIZERS[optimizer]
    if name == HOST:
        results = measure_host(spec, settings)
        lines = fits(results)
        return results, lines, table.host_table(results, lines)
    results = measure(CASES[name], spec, PROVIDERS, settings)
    return results, [], table.step_table(results)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table per case; 1 if a provider got no time, else 0."""
    args = arguments(argv)
    settings = replace(Settings(), rounds=args.rounds)
    results: list[Result] = []
    lines: list[Fit] = []
    print(", ".join(f"{key} {value}" for key, value in record.machine().items()))
    for optimizer, name in product(args.optimizers, args.cases):
        print(f"measuring {name} with {optimizer} ...", file=sys.stderr, flush=True)
        new, fitted, text = measure_case(name, optimizer, settings)
        results += new
        lines += fitted
        print(f"\n{text}\n", flush=True)
    if args.out:
        record.write(args.out, results, lines)
    return int(any(result.error for result in results))


if __name__ == "__main__":
    sys.exit(main())
