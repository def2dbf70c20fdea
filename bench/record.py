"""Results as CSV rows that say what they were measured with, and nothing about whose machine."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .device import MILLI, Device
from .harness import Result, median_of
from .host import Fit
from .table import GIGA, MICRO

COLUMNS = (
    *("commit", "cpu", "cores", "threads", "device", "driver", "torch", "triton"),
    *("case", "optimizer", "provider", "dtype", "rounds"),
    *("median_ms", "p10_ms", "p90_ms", "device_ms", "host_us", "host_us_per_tensor"),
    *("bytes_per_param", "gb_per_s", "share_of_bound", "time_over_ours"),
    *("launches", "copies", "torch_ops", "error"),
)
FIT_CASE = "host_fit"

Row = dict[str, object]


def machine(device: Device) -> Row:
    """What every row of a run shares."""
    return {
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **device.describe(),
        "torch": torch.__version__,
        "triton": triton_version(),
    }


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash, marked where tracked files differ from it; ``unknown`` outside a clone."""
    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def git(*arguments: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def result_row(result: Result) -> Row:
    verdict = result.verdict
    row: Row = {
        "case": result.case.name,
        "optimizer": result.spec.name,
        "provider": result.provider.name,
        "dtype": str(result.case.dtype).removeprefix("torch."),
        "rounds": len(result.seconds),
        "bytes_per_param": result.bytes_per_param,
        "torch_ops": verdict.num_operators,
        "error": verdict.reason,
    }
    if verdict.launches:
        row |= {"launches": verdict.launches.kernels, "copies": verdict.launches.copies}
    return row | times(result) if result.seconds else row


def times(result: Result) -> Row:
    row: Row = {
        "median_ms": digits(result.median / MILLI),
        "p10_ms": digits(result.p10 / MILLI),
        "p90_ms": digits(result.p90 / MILLI),
        "time_over_ours": digits(median_of(result.against_baseline)),
    }
    if result.case.host_only:
        return row | {"host_us": digits(result.median / MICRO)}
    return row | {
        "device_ms": digits(result.device, MILLI),
        "host_us": digits(result.host, MICRO),
        "gb_per_s": digits(result.bandwidth / GIGA),
        "share_of_bound": digits(median_of(result.against_bound)),
    }


def fit_row(fit: Fit) -> Row:
    return {
        "case": f"{FIT_CASE}{'_hot' if fit.hot else ''}",
        "optimizer": fit.spec.name,
        "provider": fit.provider,
        "host_us": digits(fit.per_step / MICRO),
        "host_us_per_tensor": digits(fit.per_tensor / MICRO),
    }


def digits(value: float | None, unit: float = 1.0) -> str | None:
    return None if value is None else f"{value / unit:.5g}"


def write(path: Path, device: Device, results: Iterable[Result], fits: Iterable[Fit]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = machine(device)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(shared | row for row in map(result_row, results))
        writer.writerows(shared | row for row in map(fit_row, fits))
