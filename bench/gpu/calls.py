"""The parts of the two calls, the most important first; when time runs out, the rest is skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from . import install
from .parts import Part

# Seconds of each call; the machine's commands may take 560 and 235.
TOTAL = {"first": 545.0, "second": 222.0}

# The providers that every case compares; the others together take the time of several cases.
FEW = (
    *("fused_ema native", "fused_ema triton", "torch fused + lerp", "torch foreach + lerp"),
    *("Triton, chunks of 128", "lerp"),
)
MODELS = ("resnet18", "vit_b16")
HEADLINE = (*MODELS, "tiny_10000x64", "groups50", "vit_l16")
# Arguments that cut tensors for a trial on a CPU; the GPU's kernels take longer there.
SHRUNK, MORE_SHRUNK = ("--shrink", "200"), ("--shrink", "5000")

# Patterns by which the profiler matches the kernels' names.
STEP, TRITON_STEP, NORM = "^step$", "^step_kernel$", "^squares$"

TESTED = r" in \d+\.\d+s|^(FAILED|ERROR) "
CASE = r"^\w+: .* parameters"
TIMED = (
    rf"{CASE}|^(fused_ema|torch|Triton|lerp|copy|stream|no time for (?!.*left out)|no time left)"
)
TUNED = rf"{CASE}|^ *[0-9]+\. |OTHER BITS|no time left"
COUNTED = r"DRAM Throughput|Memory Throughput|Duration|Registers Per|Achieved Occ|Context"


@dataclass(frozen=True)
class Place:
    """The environment of a call.

    environment: the virtual environment whose Python finds all packages, see
    :mod:`bench.gpu.install`.
    arch: the GPU's compute capability, empty if it is not known.
    results: the CSV file of :mod:`bench.run`.
    variants: the folder that :mod:`bench.variants` has filled.
    patience: factor of all limits.
    """

    call: str
    device: str
    environment: Path
    arch: str
    out: Path
    results: Path
    variants: Path
    patience: float = 1.0

    @property
    def seconds(self) -> float:
        return TOTAL[self.call] * self.patience

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def shrunk(self) -> tuple[str, ...]:
        return SHRUNK if self.on_cpu else ()

    def file(self, name: str) -> str:
        return f"{self.call}-{name}"

    def part(self, name: str, limit: float, log: str, module: str, *arguments: str) -> Part:
        command = (str(install.python(self.environment)), "-m", module, *arguments)
        return Part(name, limit * self.patience, self.file(log), command)


def parts(place: Place) -> Iterator[tuple[Part, ...]]:
    """The parts of the call, as tuples of those that run side by side."""
    yield (versions(place),)
    yield from first(place) if place.call == "first" else second(place)


def first(place: Place) -> Iterator[tuple[Part, ...]]:
    if place.on_cpu:
        yield (variants(place),)
    yield build(place), tune(place, "singles", 150, 70)
    yield (pytest(place, "gpu-tests", 80, 6, "tests/test_gpu.py"),)
    # on a CPU Triton is interpreted, which takes minutes
    backends = "native" if place.on_cpu else "native,triton"
    yield (pytest(place, "parity", 110, 14, "tests/test_parity.py", "--backends", backends),)
    yield (timed(place, "headline", 110, cases=HEADLINE),)
    yield (timed(place, "graphs", 60, ("graph", "clip_graph")),)
    yield (timed(place, "chain", 60, ("clip", "chain")),)
    yield (profile(place, "ncu", STEP, "vit_b16", "native"),)
    yield (memcheck(place),)
    yield (timed(place, "host", 40, cases=("host",), providers=()),)
    yield (timed(place, "everyone", 80, cases=("resnet18",), providers=()),)


def second(place: Place) -> Iterator[tuple[Part, ...]]:
    yield (build(place),)
    yield (tune(place, "combos", 70, 50),)
    yield (timed(place, "again", 45, into=place.out / place.file("again.csv")),)
    yield (profile(place, "ncu-triton", TRITON_STEP, "vit_b16", "triton"),)
    yield (profile(place, "ncu-norm", NORM, "resnet18", "native", "--clip"),)
    yield (timed(place, "formats", 60, ("three_emas", "bf16", "ema")),)
    yield (timed(place, "training", 50, cases=("training",), providers=()),)
    yield (racecheck(place),)


def versions(place: Place) -> Part:
    part = place.part("versions", 60, "setup.log", "bench.gpu.versions", place.device)
    return replace(part, show="^Python|DeviceProp|Driver Version", needed=True)


def build(place: Place) -> Part:
    limit = 200 if place.on_cpu else 150  # a CPU may have only two cores
    part = place.part("build", limit, "setup.log", "bench.gpu.install", place.arch)
    skip = (
        "nothing has changed since it passed"
        if install.is_built(place.environment, place.arch)
        else None
    )
    return replace(part, show="^ *fused_ema is built|^built", skip=skip)


def variants(place: Place) -> Part:
    folder = str(place.variants)
    return place.part("variants", 60, "setup.log", "bench.variants", folder, "--shim")


def tune(place: Place, kind: str, limit: float, seconds: float) -> Part:
    folder, out = place.variants / kind, place.out / place.file("tune.csv")
    arguments = [str(folder), "--out", str(out), "--device", place.device]
    arguments += [
        "--seconds",
        str(seconds * place.patience),
        *(MORE_SHRUNK if place.on_cpu else ()),
    ]
    part = place.part(f"tune-{kind}", limit, "bench.log", "bench.tune", *arguments)
    if place.on_cpu or (folder / "variants.json").exists():
        return replace(part, show=TUNED)
    return replace(part, skip=f"python -m bench.variants {place.variants} makes the kernels first")


def pytest(place: Place, name: str, limit: float, most: int, *arguments: str) -> Part:
    workers = min(most, os.cpu_count() or 1) if find_spec("xdist") else 0
    several = ("-n", str(workers)) if workers else ()
    hung = ("-vv", "-o", "faulthandler_timeout=45")  # shows which test hangs, and where
    flags = ("--tb=short", "--maxfail=12", "-p", "no:cacheprovider", "--device", place.device)
    part = place.part(name, limit, "tests.log", "pytest", *arguments, *flags, *hung, *several)
    return replace(part, show=TESTED)


def timed(
    place: Place,
    name: str,
    limit: int,
    scenarios: Sequence[str] = ("step",),
    cases: Sequence[str] = MODELS,
    providers: Sequence[str] = FEW,
    into: Path | None = None,
) -> Part:
    """A part that times tables; the last may begin at the last moment. No providers means all."""
    out = str(into or place.results)
    seconds = str((limit - 15) * place.patience)
    arguments = ["--device", place.device, "--seconds", seconds, "--out", out, "--add"]
    arguments += ["--scenarios", *scenarios, "--cases", *cases, *place.shrunk]
    if providers:
        arguments += ["--providers", *providers]
    return replace(place.part(name, limit, "bench.log", "bench.run", *arguments), show=TIMED)


def profile(place: Place, name: str, kernel: str, *target: str) -> Part:
    """A part that reads all counters of one launch, at the present clock rate."""
    part = steps(place, name, 45, "ncu.txt", *target)
    flags = ("--clock-control", "none", "-k", f"regex:{kernel}", "--launch-skip", "2")
    flags += ("--launch-count", "1", "--set", "full", "--page", "details")
    tool = find("ncu", "/opt/nvidia/nsight-compute/*/ncu")
    return replace(watched(place, part, tool, *flags), show=COUNTED)


def steps(place: Place, name: str, limit: float, log: str, *target: str) -> Part:
    arguments = (*target, "--device", place.device, *place.shrunk)
    return place.part(name, limit, log, "bench.gpu.profiled", *arguments)


def memcheck(place: Place) -> Part:
    arguments = ("--device", place.device, "--backends", "native")
    part = place.part("memcheck", 60, "tests.log", "bench.memcheck", *arguments)
    return sanitized(place, part)


def racecheck(place: Place) -> Part:
    part = steps(place, "racecheck", 30, "tests.log", "resnet18", "native", "--clip")
    return sanitized(place, part)


def sanitized(place: Place, part: Part) -> Part:
    """Run a part under a sanitizer that ignores API errors: torch expects some of them."""
    tool = find("compute-sanitizer", "/usr/local/cuda*/bin/compute-sanitizer")
    flags = ("--tool", part.name, "--report-api-errors", "no", "--error-exitcode", "9")
    own = replace(part, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return watched(place, own, tool, *flags)


def watched(place: Place, part: Part, tool: str | None, *flags: str) -> Part:
    """Run a part under a tool, except on a CPU."""
    if place.on_cpu:
        return part
    if tool is None:
        return replace(part, skip="its tool is not here")
    return replace(part, command=(tool, *flags, *part.command))


def find(tool: str, pattern: str) -> str | None:
    return shutil.which(tool) or next(iter(sorted(glob(pattern), reverse=True)), None)
