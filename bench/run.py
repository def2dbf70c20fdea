"""Times every provider on every case: ``python -m bench.run``; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import monotonic

from . import record, table
from .cases import CASES, GPU_CASES
from .device import DEVICES, Device
from .harness import Result, Settings, measure
from .host import Fit, fits, measure_host
from .providers import OPTIMIZERS, PROVIDERS

HOST = "host"
DEFAULT_CASES = {"cpu": (*CASES, HOST), "cuda": (*GPU_CASES, HOST)}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    cases = (*GPU_CASES, HOST)
    parser.add_argument("--cases", nargs="+", choices=cases, metavar="CASE")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"])
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--seconds", type=float, help="start no case after so many")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args(argv)


def measure_case(
    name: str, optimizer: str, device: Device, settings: Settings
) -> tuple[list[Result], list[Fit], str]:
    """Results, the host's fitted lines, and the table."""
    spec = OPTIMIZERS[optimizer]
    if name == HOST:
        results = measure_host(spec, device, settings)
        lines = fits(results)
        return results, lines, table.host_table(results, lines)
    providers = PROVIDERS[device.torch_device.type]
    results = measure(GPU_CASES[name], spec, providers, device, settings)
    return results, [], table.step_table(results)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table per case; 1 if a provider failed or a case found no time, else 0."""
    start = monotonic()
    args = arguments(argv)
    try:
        device = DEVICES[args.device]()
    except RuntimeError as error:
        sys.exit(f"--device {args.device}: {error}")
    settings = replace(Settings(), rounds=args.rounds)
    results: list[Result] = []
    lines: list[Fit] = []
    late: list[str] = []
    print(", ".join(f"{key} {value}" for key, value in record.machine(device).items() if value))
    for optimizer, name in product(args.optimizers, args.cases or DEFAULT_CASES[args.device]):
        if args.seconds is not None and monotonic() - start > args.seconds:
            late.append(f"{name} with {optimizer}")
            continue
        print(f"measuring {name} with {optimizer} ...", file=sys.stderr, flush=True)
        new, fitted, text = measure_case(name, optimizer, device, settings)
        results += new
        lines += fitted
        print(f"\n{text}\n", flush=True)
        if args.out:  # after every case, in case a later one is the last
            record.write(args.out, device, results, lines)
    if late:
        print(f"no time left for {', '.join(late)}")
    return int(bool(late) or any(result.verdict.error for result in results))


if __name__ == "__main__":
    sys.exit(main())
