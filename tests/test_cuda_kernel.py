"""The CUDA kernel's source as C++ on the CPU (tests/shim): the bits of the CPU loop, no bad access.

Memory is watched by the address sanitizer, every tensor an allocation of its own, and alignment by
the one for undefined behaviour.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fused_ema import _native

# What a fixture makes once is made in one worker.
pytestmark = pytest.mark.xdist_group("cuda kernel")

ROOT = Path(__file__).parents[1]
SOURCES = (
    *("tests/shim/step_rounding.cpp", "tests/shim/step.cpp"),
    *("tests/shim/parity.cpp", "csrc/cpu/targets.cpp"),
)
FLAGS = (
    *("-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-I", "tests/shim", "-I", "csrc"),
    # the same edges, in a fraction of the time
    *("-DFUSED_EMA_CHUNK_BYTES=1024", "-DFUSED_EMA_THREADS=32"),
)
CXX = os.environ.get("CXX", "g++")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def build(*arguments: str | Path) -> None:
    result = run(CXX, *FLAGS, *arguments)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def parity(tmp_path_factory) -> Path:
    if shutil.which(CXX) is None:
        pytest.skip(f"needs a C++ compiler: {CXX} is none")
    if b"__asan_init" in Path(_native.__file__).read_bytes():
        pytest.skip("is sanitized by itself, as part of the ordinary tests")
    folder = tmp_path_factory.mktemp("shim")
    objects = [folder / f"{Path(source).stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s, o: build("-c", s, "-o", o), SOURCES, objects))
    build(*objects, "-o", folder / "parity")
    return folder / "parity"


@pytest.mark.parametrize(
    "group", ["rules", "masters", "rounding", "words", "control", "empty", "accesses", "errors"]
)
def test_the_kernel_gives_the_bits_of_the_cpu_loop(parity, group):
    result = run(parity, group)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"{group}: [1-9]\d* buckets\n", result.stdout)
