"""Reads the rows of a CSV of results."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from .record import FIT_CASE, TRAINING
from .spec import STEP

RESULTS = Path(__file__).parent / "results"
OURS = "fused_ema "
BOUND = "(bound)"


@dataclass(frozen=True)
class Row:
    """A row; missing numbers are None."""

    fields: dict[str, str]

    def __getattr__(self, name: str) -> str:
        try:
            return self.fields[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def number(self, name: str) -> float | None:
        value = self.fields[name]
        return float(value) if value else None

    @property
    def is_ours(self) -> bool:
        return self.provider.startswith(OURS)

    @property
    def is_bound(self) -> bool:
        return self.provider.endswith(BOUND)

    @property
    def step_ms(self) -> float:
        """Training: the time of optimizer and average."""
        return (self.number("median_ms") or 0.0) * (self.number("step_share") or 0.0)

    @property
    def over_limit(self) -> float | None:
        """The time as a multiple of the time to move the counted bytes."""
        share = self.number("share_of_bound")
        return 1.0 / share if share else None


@dataclass(frozen=True)
class Results:
    """The rows of one machine's file."""

    name: str
    rows: Sequence[Row]

    @classmethod
    def read(cls, path: Path) -> Results:
        with path.open(newline="") as file:
            return cls(path.stem, [Row(fields) for fields in csv.DictReader(file)])

    @property
    def first(self) -> Row:
        return self.rows[0]

    def of(self, scenario: str, case: str | None = None) -> list[Row]:
        """The rows of a scenario, without those that measure the host alone."""
        return [
            row
            for row in self.rows
            if row.scenario == scenario and row.case in ((case,) if case else self.cases(scenario))
        ]

    def cases(self, scenario: str) -> list[str]:
        return unique(r.case for r in self.rows if r.scenario == scenario and not is_host(r.case))

    @cached_property
    def host(self) -> list[Row]:
        rows = [row for row in self.rows if row.scenario == STEP.name and is_host(row.case)]
        return [row for row in rows if not row.case.startswith(FIT_CASE)]

    @cached_property
    def fits(self) -> list[Row]:
        return [row for row in self.rows if row.case.startswith(FIT_CASE)]

    @cached_property
    def training(self) -> list[Row]:
        return [row for row in self.rows if row.scenario == TRAINING]


def is_host(case: str) -> bool:
    return case.startswith("host_")


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.median_ms]


def passes_ms(rows: Iterable[Row]) -> float:
    """Training: the time of forward and backward passes, which are the same for all providers."""
    return median((row.number("median_ms") or 0.0) - row.step_ms for row in timed(rows))


def everything() -> list[Results]:
    return [Results.read(path) for path in sorted(RESULTS.glob("*.csv"))]
