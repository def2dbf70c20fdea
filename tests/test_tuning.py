"""The constants of the CUDA kernels' speed, which a sweep overrides by -D, and their one place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
TUNING = CSRC / "cuda/tuning.h"
CXX = os.environ.get("CXX", "g++")
# Others than the defaults, by the constants that they set.
NUMBERS = {
    "chunk_bytes": 65536,
    "threads": 512,
    "min_blocks": 2,
    "squares_blocks": 264,
    "unroll": 2,
    "persistent": 0,
}
HINTS = {"load": ".L1::no_allocate", "store": ".cs"}


def defined(name: str) -> str:
    return f"FUSED_EMA_{name.upper()}"


def compiled(*arguments: str, source: str = "") -> str:
    if shutil.which(CXX) is None:
        pytest.skip(f"needs a C++ compiler: {CXX} is none")
    command = [CXX, "-std=c++17", "-x", "c++", "-I", str(CSRC), *arguments]
    result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_constant_can_be_overridden():
    macros = set(re.findall(r"#ifndef (\w+)", TUNING.read_text()))
    assert macros == {*map(defined, NUMBERS), *(defined(f"{way}_hint") for way in HINTS)}
    checks = (
        f'static_assert(fused_ema::cuda::{name} == {value}, "{name}");'
        for name, value in NUMBERS.items()
    )
    source = "\n".join(['#include "cuda/launch.h"', *checks])
    flags = [f"-D{defined(name)}={value}" for name, value in NUMBERS.items()]
    compiled("-fsyntax-only", *flags, "-", source=source)


def test_hints_are_those_of_the_wide_accesses():
    flags = [f'-D{defined(f"{way}_hint")}="{hint}"' for way, hint in HINTS.items()]
    text = compiled("-E", "-P", "-D__CUDA_ARCH__", *flags, str(CSRC / "cuda/pack.cuh"))
    assert '"ld.global" ".L1::no_allocate" ".v4.u32' in text
    assert '"st.global" ".cs" ".v4.u32' in text


def test_no_other_file_sets_one():
    for path in (CSRC / "cuda").iterdir():
        if path != TUNING:
            assert not re.search(rf"\b(?:{'|'.join(NUMBERS)}) = \d", path.read_text()), path
