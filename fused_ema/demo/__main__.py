"""Command line of the demo."""

from __future__ import annotations

import argparse
import platform
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import YoungAverageWarning, __version__
from . import agreement, batch_scaling, figure, timing
from .problem import load_digits


@dataclass(frozen=True)
class Size:
    """The size of the demo. Every batch size divides ``train_size``."""

    train_size: int = 1280
    agreement_epochs: int = 8
    scaling_epochs: int = 16
    timing_rounds: int = 25
    resnet_width: int = 64


QUICK = Size(train_size=640, agreement_epochs=1, scaling_epochs=1, timing_rounds=3, resnet_width=8)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, print their tables, and write the figure.

    Returns:
        The exit status: 0, or 1 if the results of part 1 do not agree.
    """
    options = parse(argv)
    require("sklearn", "matplotlib")
    start = time.perf_counter()
    size = QUICK if options.quick else Size()
    data = load_digits(size.train_size)
    versions = f"fused_ema {__version__}, torch {torch.__version__}"
    print(f"{versions}, {cpu_name()}, {torch.get_num_threads()} threads")

    # such a small network gains nothing from more threads
    with timing.threads(1), warnings.catch_warnings():
        # the curves begin at the first step, and --quick ends soon after it
        warnings.simplefilter("ignore", YoungAverageWarning)
        agreed = agreement.run(data, size.agreement_epochs)
        show(agreement.report(agreed))
        curves = batch_scaling.run(data, size.scaling_epochs, options.seeds)
        show(batch_scaling.report(curves, data, size.scaling_epochs))
    timings = timing.run(size.timing_rounds, size.resnet_width) if options.timing else []
    if timings:
        show(timing.report(timings))

    figure.draw(curves, timings, options.out)
    print(f"Figure: {options.out} ({time.perf_counter() - start:.0f} s in all)")
    return 0 if agreed.within_budget() else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_ema.demo",
        description="Train scikit-learn's digits with fused_ema: agreement with torch and a "
        "hand-written EMA, batch scaling with and without the EMA rule, time of a step. "
        "Prints three tables and writes a figure; takes about a minute.",
    )
    parser.add_argument(
        "--out",
        type=writable,
        default=Path("fused_ema_demo.png"),
        help="file for the figure: .png, .pdf or .svg (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        default=None,
        help="runs of each batch size in part 2 (default: 5, or 1 with --quick)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds: shows that it works, no results"
    )
    parser.add_argument(
        "--no-timing",
        dest="timing",
        action="store_false",
        help="leave out the times of a step, so that the figure is the same on every machine",
    )
    options = parser.parse_args(argv)
    if options.seeds is None:
        options.seeds = 1 if options.quick else 5
    return options


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is out of range; allowed: 1 or more")
    return value


def writable(text: str) -> Path:
    """Read a figure's path, and check before the work that its folder exists."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed endings are .png, .pdf and .svg")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}")
    return path


def require(*modules: str) -> None:
    """Exit with advice if a module is missing that only the demo needs."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(f"The demo needs {' and '.join(missing)}: pip install 'fused_ema[demo]'")


def cpu_name() -> str:
    """The processor's name, if the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def show(report: str) -> None:
    """Print a part's table at once."""
    print(f"\n{report}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
