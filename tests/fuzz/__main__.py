"""``python -m fuzz [CHECK ...] [--seconds S | --seed N]``, in the folder ``tests``."""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import torch

from . import CHECKS, again


def main() -> int:
    """Run checks in turn; every failure is told with the command that repeats it."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, help="this seed alone")
    options = parser.parse_args()
    names = options.checks or list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"no such check: {', '.join(unknown)}; allowed: {', '.join(CHECKS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of values that are loaded and differ, among others
    ran, failed = Counter[str](), Counter[str]()
    for name, seed in cases(names, options.seed, options.seconds):
        ran[name] += 1
        try:
            CHECKS[name](seed)
        except Exception as error:
            failed[name] += 1
            if options.seed is not None:
                raise
            print(f"{name}, seed {seed}: {type(error).__name__}: {error}")
            print(f"  again: {again(name, seed)}", flush=True)
    for name in names:
        print(f"{name}: {failed[name]} of {ran[name]} failed")
    return 1 if failed else 0


def cases(names: list[str], seed: int | None, seconds: float) -> Iterator[tuple[str, int]]:
    """Pairs of check and seed: one seed for all, or fresh ones until the time is over."""
    if seed is not None:
        yield from ((name, seed) for name in names)
        return
    first = secrets.randbelow(1 << 30)
    print(f"seeds from {first} on", flush=True)
    end = time.monotonic() + seconds
    for count, name in zip(itertools.count(), itertools.cycle(names), strict=False):
        if time.monotonic() > end:
            return
        yield name, first + count // len(names)


if __name__ == "__main__":
    sys.exit(main())
