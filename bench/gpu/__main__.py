"""Tests, measures and tunes, in two calls, on a GPU machine that is available for minutes."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench import machine

from . import install
from .calls import TOTAL, Place, parts
from .parts import Session

# The machine keeps the first call's file here, and the second call continues it.
KEPT = machine.ROOT / "build" / "gpu-results"
VARIANTS = machine.ROOT / "build" / "variants"
# The CPU's times do not matter, and threads that wait for each other would only slow it down.
ON_CPU = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("call", choices=TOTAL, help="first takes 9 minutes, second 4 more")
    parser.add_argument("out", type=Path, metavar="OUTDIR", help="for at most 8 files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(cuda)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    parser.add_argument("--without", nargs="+", metavar="PART", default=[], help="all but these")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="factor of all limits, for a busy machine (1)"
    )
    return parser.parse_args(argv)


def place(args: argparse.Namespace) -> Place:
    out, on_cpu = args.out.resolve(), args.device == "cpu"
    name, arch = (None if on_cpu else machine.of_gpu(key) for key in ("name", "compute_cap"))
    return Place(
        call=args.call,
        device=args.device,
        environment=install.environment(),
        arch=arch or "",
        out=out,
        results=out / f"{machine.slug(name or args.device)}.csv",
        variants=VARIANTS / "cpu" if on_cpu else VARIANTS,
        patience=args.patience,
    )


def told_to_end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    here = place(args)
    names = [part.name for together in parts(here) for part in together]
    if unknown := {*(args.parts or ()), *args.without}.difference(names):
        sys.exit(f"no part is called {' or '.join(sorted(unknown))}: there are {', '.join(names)}")
    signal.signal(signal.SIGTERM, told_to_end)
    own = ON_CPU if here.on_cpu else {"TORCH_CUDA_ARCH_LIST": here.arch} if here.arch else {}
    environment = own | install.variables(here.environment)
    session = Session(here.out, here.file("summary.txt"), here.seconds, environment)
    session.say(f"fused_ema {machine.commit()} on {here.results.stem}, {args.call} call")
    kept = KEPT / machine.commit() / here.results.name
    if args.call == "second" and kept.exists() and not here.results.exists():
        shutil.copy(kept, here.results)
    try:
        for together in parts(here):
            if not session.run(*(part for part in together if wanted(part.name, args))):
                break
            if here.results.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(here.results, kept)
    finally:
        status = session.end()
    return status


def wanted(name: str, args: argparse.Namespace) -> bool:
    return name not in args.without and (args.parts is None or name in args.parts)


if __name__ == "__main__":
    sys.exit(main())
