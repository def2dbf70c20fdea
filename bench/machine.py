"""The machine's properties, read from the system without importing torch."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Variable that names the commit if a copy of the files has no git folder.
COMMIT = "BENCH_COMMIT"


def slug(name: str) -> str:
    """A name in a form for file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def of_gpu(field: str) -> str | None:
    """A field of the first GPU from ``nvidia-smi``, such as ``name``; None without a GPU."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines()), None)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str:
    """The short hash, marked if tracked files differ from it; ``unknown`` outside a clone."""
    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT, "unknown")
    return f"{head}-dirty" if changed else head


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
