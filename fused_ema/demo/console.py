"""Progress lines of the demo, and aligned tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType


class Progress:
    """Shows the progress of a part of the demo on standard error.

    A terminal shows one line that is rewritten; a file or pipe gets a short line at each quarter.

    Args:
        title: name of the work.
        total: number of calls of :meth:`advance`.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.shown = -1
        self.stream = sys.stderr
        self.resolution = 1 if self.stream.isatty() else 25

    def __enter__(self) -> Progress:
        self.start = time.perf_counter()
        self._show(0, "")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._write(f"done in {time.perf_counter() - self.start:.1f} s")
        if self.stream.isatty():
            self.stream.write("\n")

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report that ``amount`` more is done, and what comes next."""
        self.done += amount
        percent = 100 * self.done // self.total
        if percent < 100:
            self._show(percent, note)

    def _show(self, percent: int, note: str) -> None:
        mark = percent // self.resolution
        if mark != self.shown:
            self.shown = mark
            self._write(f"{percent:3d} % {note}")

    def _write(self, text: str) -> None:
        line = f"{self.title}: {text}".rstrip()
        self.stream.write(f"\r\033[K{line}" if self.stream.isatty() else f"{line}\n")
        self.stream.flush()


def table(align: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Indented lines of aligned columns.

    Args:
        align: ``<`` (left) or ``>`` (right) for each column.
        header: titles of the columns.
        rows: cells.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)]
        lines.append("   " + "  ".join(cells).rstrip())
    return "\n".join(lines)
