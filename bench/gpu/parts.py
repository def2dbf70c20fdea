"""Runs commands within a time limit each, so that none prevents another from running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from bench.machine import ROOT

# Seconds from interrupting a part to killing it; no part begins with less time left.
KILL_AFTER = 8.0
LEAST = 8.0
POLL = 0.05

# Lines shown of a failed part's output and of matching lines, and their width.
TAIL_LINES, SHOWN_LINES, WIDTH = 10, 40, 170
# A larger file might not be copied from the machine, so its middle is cut out.
MOST_BYTES = 12 << 20


@dataclass(frozen=True)
class Part:
    """A command whose result is useful without the others.

    limit: seconds until it is interrupted, as by Ctrl-C.
    log: the file to which its output is appended.
    environment: its variables in addition to those of all parts.
    show: pattern of the output lines that the summary repeats.
    skip: why it cannot run here, if it cannot.
    needed: whether all other parts depend on it.
    """

    name: str
    limit: float
    log: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    show: str | None = None
    skip: str | None = None
    needed: bool = False


class Running:
    """A running part, in its own process group."""

    def __init__(self, part: Part, limit: float, log: Path, environment: Mapping[str, str]) -> None:
        self.part = part
        self.limit = limit
        self.signals: list[signal.Signals] = []
        self._until = limit
        self._log = log
        with log.open("a") as file:
            file.write(f"\n$ {' '.join(part.command)}\n")
        self._begin = log.stat().st_size
        self._start = monotonic()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment, **part.environment},
                preexec_fn=alone,
            )

    @property
    def seconds(self) -> float:
        return monotonic() - self._start

    def ended(self) -> bool:
        """Whether the part has ended; one that takes too long is interrupted, then killed."""
        if self._process.poll() is not None:
            return True
        if self.seconds > self._until and len(self.signals) < len(SIGNALS):
            self._tell(SIGNALS[len(self.signals)])
            self.signals.append(SIGNALS[len(self.signals)])
            self._until = self.seconds + KILL_AFTER  # from now, even if this process is late
        return False

    def finish(self) -> int:
        """Kill what is left of the part, and return its exit status."""
        self._tell(signal.SIGKILL)
        return self._process.wait()

    def output(self) -> list[str]:
        with self._log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace").splitlines()

    def _tell(self, kind: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, kind)


SIGNALS = (signal.SIGINT, signal.SIGKILL)


def alone() -> None:
    """Prepare the command's process: its own group, and the default handling of Ctrl-C."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Session:
    """Runs parts one after another until the time is over, and writes a summary.

    Args:
        out: the folder of logs and summary.
        summary: the summary's file name.
        seconds: time for all parts together, including killing the last one.
        environment: variables of all parts.
    """

    def __init__(
        self, out: Path, summary: str, seconds: float, environment: Mapping[str, str]
    ) -> None:
        self.failed: list[str] = []
        self._out = out
        self._summary = out / summary
        self._seconds = seconds
        self._environment = environment
        self._start = monotonic()

    @property
    def elapsed(self) -> float:
        return monotonic() - self._start

    def say(self, text: str) -> None:
        line = f"{self.elapsed:4.0f} s  {text}"
        print(line, flush=True)
        with self._summary.open("a") as file:
            file.write(f"{line}\n")

    def run(self, *parts: Part) -> bool:
        """Run the parts side by side, each with its own log; return whether needed ones passed."""
        running: list[Running] = []
        passed = True
        try:
            for part in parts:
                left = self._seconds - KILL_AFTER - self.elapsed
                if part.skip is not None:
                    self.say(f"{part.name}: skipped, {part.skip}")
                elif left < LEAST:
                    self.say(f"{part.name}: FAILED, no time left")
                    self.failed.append(part.name)
                else:
                    log = self._out / part.log
                    limit = min(part.limit, left)
                    running.append(Running(part, limit, log, self._environment))
            while running:
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    passed &= self._note(one) or not one.part.needed
                sleep(POLL)
        finally:  # parts may still run if this process is told to end
            for one in running:
                one.finish()
                self.failed.append(one.part.name)
        return passed

    def end(self) -> int:
        """Write the summary, and return the exit status."""
        for path in filter(Path.is_file, self._out.iterdir()):
            trim(path)
        if self.failed:
            self.say(f"FAILED: {', '.join(self.failed)}")
        else:
            self.say("all passed")
        return int(bool(self.failed))

    def _note(self, one: Running) -> bool:
        status, output = one.finish(), one.output()
        if one.signals:
            names = " and ".join(kind.name for kind in one.signals)
            verdict = f"FAILED, stopped by {names} after {one.limit:.0f} s"
        else:
            verdict = f"FAILED, exit status {status}" if status else "passed"
        self.say(f"{one.part.name}: {verdict}, {one.seconds:.0f} s")
        shown = [line for line in output if one.part.show and re.search(one.part.show, line)]
        for line in shown[:SHOWN_LINES]:
            self.say(f"  {line[:WIDTH]}")
        if verdict == "passed":
            return True
        self.failed.append(one.part.name)
        for line in output[-TAIL_LINES:]:
            self.say(f"  | {line[:WIDTH]}")
        return False


def trim(path: Path) -> None:
    """Cut the middle out of a file that is too large."""
    size = path.stat().st_size
    if size <= MOST_BYTES:
        return
    with path.open("rb") as file:
        head = file.read(MOST_BYTES // 2)
        file.seek(size - MOST_BYTES // 2)
        tail = file.read()
    path.write_bytes(head + b"\n[...]\n" + tail)
