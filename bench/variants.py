"""Compiles the step kernel with constants that differ from those of ``csrc/cuda/tuning.h``.

``bench.tune`` uses the results, on a machine that may lack the time to compile. Compiling needs
nvcc and some minutes, but no GPU. A folder for each kind holds a library for each variant, and
``variants.json``, which lists them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .machine import ROOT

SOURCE = ROOT / "bench" / "variant.cu"
TUNING = ROOT / "csrc" / "cuda" / "tuning.h"
INDEX = "variants.json"

# As in setup.py. Libraries in one process keep their static variables separate.
NVCC_FLAGS = (
    *("-O3", "--fmad=false", "-std=c++17", "--expt-relaxed-constexpr", "-shared"),
    *("-cudart", "shared", "-Xcompiler=-fPIC,-fno-gnu-unique", "-Xlinker=-z,defs"),
    *("-Xptxas", "-v"),
)
# In place of nvcc: compiles the kernel as C++ for the CPU, to try out the measurement.
SHIM_FLAGS = (
    *("-O1", "-std=c++17", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-fno-gnu-unique"),
    *(
        "-shared",
        "-Wl,-z,defs",
        "-Wno-unknown-pragmas",
        "-I",
        str(ROOT / "tests" / "shim"),
        "-x",
        "c++",
    ),
)

Macros = Mapping[str, str]


def chunk(kilobytes: int) -> Macros:
    return {"FUSED_EMA_CHUNK_BYTES": str(1024 * kilobytes)}


def block(threads: int, min_blocks: int) -> Macros:
    return {"FUSED_EMA_THREADS": str(threads), "FUSED_EMA_MIN_BLOCKS": str(min_blocks)}


def hints(load: str = "", store: str = "") -> Macros:
    """Cache hints of 16-byte accesses, in the syntax of PTX."""
    named = {"FUSED_EMA_LOAD_HINT": load, "FUSED_EMA_STORE_HINT": store}
    return {name: f'"{hint}"' for name, hint in named.items() if hint}


BASE = "base"
# One block for each chunk.
ONCE: Macros = {"FUSED_EMA_PERSISTENT": "0"}
CHUNKS = {f"chunk_{k}k": chunk(k) for k in (4, 8, 32, 64, 128)}
BLOCKS = {
    f"{threads}x{blocks}": block(threads, blocks)
    for threads, blocks in (
        *((128, 4), (128, 8), (128, 10), (256, 2), (256, 3), (256, 5)),
        *((512, 2), (1024, 1)),
    )
}
NO_L1, L2_256 = ".L1::no_allocate", ".L2::256B"
LOADS = {"no_l1": NO_L1, "l2_128": ".L2::128B", "l2_256": L2_256, "no_l1_l2_256": NO_L1 + L2_256}
STREAMED = {"cs": ".cs", "cg": ".cg"}
HINTS = {
    **{f"load_{name}": hints(hint) for name, hint in {**LOADS, **STREAMED, "lu": ".lu"}.items()},
    **{
        f"store_{name}": hints(store=hint)
        for name, hint in {**STREAMED, "no_l1": NO_L1, "wt": ".wt"}.items()
    },
}
PAIRS = {"": {}, "no_l1": hints(NO_L1), "cs": hints(store=".cs"), "both": hints(NO_L1, ".cs")}
COMBINED = {
    "_".join(filter(None, (size, shape, pair))): {**own_size, **own_shape, **own_pair}
    for size, own_size in {"4k": chunk(4), "16k": {}, "64k": chunk(64)}.items()
    for shape, own_shape in {"256x4": {}, "256x5": BLOCKS["256x5"], "512x2": block(512, 2)}.items()
    for pair, own_pair in PAIRS.items()
    if (size, shape) != ("4k", "512x2")  # a chunk would have fewer accesses than threads
}
# By folder: variants with one constant changed, and combinations.
KINDS: Mapping[str, Mapping[str, Macros]] = {
    "singles": {
        BASE: {},
        **CHUNKS,
        **BLOCKS,
        **HINTS,
        **{f"unroll_{n}": {"FUSED_EMA_UNROLL": str(n)} for n in (2, 4)},
        "once": ONCE,
        "once_4k": {**ONCE, **chunk(4)},
        "once_64k": {**ONCE, **chunk(64)},
    },
    "combos": {BASE: {}, **COMBINED},
}
# Number of variants of each kind that are compiled for a CPU.
TRIED = 3


@dataclass(frozen=True)
class Compiler:
    """A program, its flags, and whether it reports registers."""

    program: str
    flags: Sequence[str]
    reports: bool

    def build(self, macros: Macros, out: Path) -> dict[str, object]:
        """Compile a variant; return its entry in the index.

        Raises:
            RuntimeError: it does not compile; the message holds the compiler's output.
        """
        defined = [f"-D{name}={value}" for name, value in macros.items()]
        own = [*self.flags, "-I", str(ROOT / "csrc"), *defined, "-o", str(out), str(SOURCE)]
        done = subprocess.run([self.program, *own], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{out.stem}: {self.program} failed: {done.stderr.strip()}")
        made: dict[str, object] = {"macros": dict(macros)}
        if self.reports:
            registers = map(int, re.findall(r"Used (\d+) registers", done.stderr))
            spilled = map(int, re.findall(r"(\d+) bytes spill stores", done.stderr))
            made |= {"registers": max(registers), "spilled": max(spilled)}
        return made


def nvcc(arch: str) -> Compiler:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    program = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return Compiler(program, (*NVCC_FLAGS, f"-arch=sm_{arch}"), reports=True)


def shim() -> Compiler:
    return Compiler(os.environ.get("CXX", "c++"), SHIM_FLAGS, reports=False)


def unknown_macros() -> list[str]:
    """Macros that ``tuning.h`` does not read; their variants would equal the base."""
    known = set(re.findall(r"#ifndef (\w+)", TUNING.read_text()))
    used = {name for kind in KINDS.values() for macros in kind.values() for name in macros}
    return sorted(used - known)


def build(kind: str, folder: Path, compiler: Compiler, jobs: int, most: int | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    variants = dict(list(KINDS[kind].items())[:most])
    with ThreadPoolExecutor(jobs) as pool:
        made = pool.map(
            lambda name: compiler.build(variants[name], folder / f"{name}.so"), variants
        )
        index = {}
        for name, told in zip(variants, made, strict=True):
            index[name] = told
            print(kind, name, told, flush=True)
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for all kinds, such as build/variants")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--arch", default="90", help="compute capability (90)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--shim", action="store_true", help="a few for the CPU, to try bench.tune")
    args = parser.parse_args(argv)
    if missing := unknown_macros():
        sys.exit(f"{TUNING.relative_to(ROOT)} does not read {', '.join(missing)}")
    compiler = shim() if args.shim else nvcc(args.arch)
    for kind in args.kinds:
        build(kind, args.out / kind, compiler, args.jobs, TRIED if args.shim else None)


if __name__ == "__main__":
    main()
