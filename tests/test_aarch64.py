"""The CPU loops for 64-bit ARM: cross-compiled, and run by an emulator if one is there.

Debian and Ubuntu have both: ``apt-get install g++-aarch64-linux-gnu qemu-user``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_native import check_loops

ROOT = Path(__file__).parents[1]
CROSS = "aarch64-linux-gnu-"
CXX = os.environ.get("CXX", "g++")
# As setup.py has them.
FLAGS = (
    *("-std=c++20", "-g0", "-Wall", "-Wextra", "-Werror", "-DNDEBUG", "-fopenmp", "-I", "csrc"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(compiler: str, optimization: str, source: str, folder: Path) -> Path:
    object_file = folder / f"{Path(compiler).name}-{Path(source).stem}.o"
    run(compiler, *FLAGS, optimization, "-c", source, "-o", object_file)
    return object_file


@pytest.fixture(scope="module")
def loops(tmp_path_factory) -> Path:
    if shutil.which(f"{CROSS}g++") is None:
        pytest.skip(f"needs {CROSS}g++")
    folder = tmp_path_factory.mktemp("aarch64")
    return build(f"{CROSS}g++", "-O3", "csrc/cpu/targets.cpp", folder)


def test_every_loop_with_a_root_is_vectorised(loops):
    check_loops(f"{CROSS}objdump", loops, "neon", r"\sfsqrt\s+v")


def test_an_emulated_processor_gives_the_bits_of_this_one(loops, tmp_path):
    if shutil.which("qemu-aarch64") is None or shutil.which(CXX) is None:
        pytest.skip(f"needs qemu-aarch64 and {CXX}")
    compilers, bits = (CXX, f"{CROSS}g++"), "tests/cross/bits.cpp"
    with ThreadPoolExecutor(2) as pool:
        own = pool.submit(build, CXX, "-O1", "csrc/cpu/targets.cpp", tmp_path)
        objects = [*pool.map(lambda cxx: build(cxx, "-O1", bits, tmp_path), compilers)]
    programs = [tmp_path / "own", tmp_path / "aarch64"]
    for cxx, program, made, kernels in zip(
        compilers, programs, objects, (own.result(), loops), strict=True
    ):
        run(cxx, "-static", "-fopenmp", made, kernels, "-o", program)
    mine, (target, *theirs) = run(programs[0]), run("qemu-aarch64", programs[1]).split()
    assert target == "neon"
    results = {tuple(line.split()[1:]) for line in mine.splitlines()}
    assert results == {tuple(theirs)}  # one for all targets
    assert int(theirs[0]) > 100
