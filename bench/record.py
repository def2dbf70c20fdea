"""Results as CSV rows with the hardware and versions, but nothing about the machine's owner."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .check import Verdict
from .device import MILLI, Device
from .harness import Result, median_of
from .host import Fit
from .machine import commit, cpu_model, slug
from .spec import Spec
from .table import GIGA, MEGA, MICRO
from .train import Training

COLUMNS = (
    *("commit", "cpu", "cores", "threads", "device", "driver", "torch", "triton"),
    *("case", "scenario", "optimizer", "provider", "dtype", "rounds"),
    *("median_ms", "p10_ms", "p90_ms", "device_ms", "host_us", "host_us_per_tensor"),
    *("bytes_per_param", "gb_per_s", "share_of_bound", "time_over_ours"),
    *("launches", "copies", "torch_ops", "peak_extra_mb", "first_step_ms"),
    *("batch", "step_share", "error"),
)
FIT_CASE = "host_fit"
TRAINING = "training"

Row = dict[str, object]


def machine(device: Device) -> Row:
    """The fields that all rows of a run share."""
    return {
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **device.describe(),
        "torch": torch.__version__,
        "triton": triton_version(),
    }


def file_name(shared: Row) -> str:
    """The file name for a device; for a CPU, its model and number of cores."""
    name = str(shared["device"])
    if name == "cpu":
        name = f"cpu-{shared['cpu']}-{shared['cores']}-cores"
    return f"{slug(name)}.csv"


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def result_row(result: Result) -> Row:
    row: Row = {
        "case": result.case.name,
        "scenario": result.spec.scenario.name,
        "optimizer": result.spec.name,
        "provider": result.provider.name,
        "dtype": dtype_name(result.spec),
        "rounds": len(result.seconds),
        "bytes_per_param": result.bytes_per_param,
        "error": result.verdict.reason,
        **counts(result.verdict),
    }
    return row | times(result) if result.seconds else row


def dtype_name(spec: Spec) -> str:
    return str(spec.scenario.dtype).removeprefix("torch.")


def counts(verdict: Verdict) -> Row:
    if verdict.counts is None:
        return {}
    own = verdict.counts
    row: Row = {
        "torch_ops": own.num_operators,
        "peak_extra_mb": digits(own.peak_bytes / MEGA),
        "first_step_ms": digits(own.first_step / MILLI),
    }
    if own.launches:
        row |= {"launches": own.launches.kernels, "copies": own.launches.copies}
    return row


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


def training_row(result: Training) -> Row:
    row: Row = {
        "case": result.model,
        "scenario": TRAINING,
        "optimizer": result.spec.name,
        "provider": result.provider.name,
        "dtype": dtype_name(result.spec),
        "rounds": len(result.steps),
        "batch": result.batch,
        "error": result.verdict.reason,
    }
    if not result.steps:
        return row
    return row | {
        "median_ms": digits(median_of(result.totals), MILLI),
        "p10_ms": digits(result.p10 / MILLI),
        "p90_ms": digits(result.p90 / MILLI),
        "time_over_ours": digits(median_of(result.against_ours)),
        "step_share": digits(result.share),
    }


def fit_row(fit: Fit) -> Row:
    return {
        "case": f"{FIT_CASE}{'_hot' if fit.hot else ''}",
        "scenario": fit.spec.scenario.name,
        "optimizer": fit.spec.name,
        "provider": fit.provider,
        "host_us": digits(fit.per_step / MICRO),
        "host_us_per_tensor": digits(fit.per_tensor / MICRO),
    }


def digits(value: float | None, unit: float = 1.0) -> str | None:
    return None if value is None else f"{value / unit:.5g}"


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the file completely or not at all, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def read(path: Path) -> list[Row]:
    """The rows that :func:`write` has written; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The old rows, in which new tables replace those of the same case and scenario."""
    tables: dict[tuple[object, ...], list[Row]] = {}
    for rows in (old, new):
        own: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            own.setdefault((row["scenario"], row["optimizer"], row["case"]), []).append(row)
        tables |= own
    return [row for rows in tables.values() for row in rows]
