"""Compiles and loads the plain loop of ``streams.cpp``, whose bandwidth a step could reach."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

# First, so that the process uses torch's OpenMP runtime, which the loop finds by its soname.
import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("streams.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

READ, WRITTEN = 5, 4
DTYPE = torch.float32


@cache
def library() -> ctypes.CDLL:
    """The loop's library, which every process builds for its processor.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message holds its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "streams.so"
        command = [os.environ.get("CXX", "c++"), *FLAGS, SOURCE.name, "-o", str(path)]
        try:
            built = subprocess.run(command, cwd=SOURCE.parent, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"cannot run {command[0]}: {error.strerror}") from error
        if built.returncode != 0:
            raise RuntimeError(f"{command[0]} failed: {built.stderr.strip()}")
        return ctypes.CDLL(str(path))


def load() -> Callable[..., None]:
    """``step5(p, g, m, v, e)`` on contiguous float32 tensors of one size, on torch's threads."""
    function = library().step5
    function.argtypes = [ctypes.c_void_p] * READ + [ctypes.c_int64, ctypes.c_int]
    function.restype = None

    def step5(*arrays: Tensor) -> None:
        for array in arrays:
            if array.dtype != DTYPE or not array.is_contiguous():
                raise ValueError(f"the plain loop takes contiguous {DTYPE}, not {array.dtype}")
        pointers = [array.data_ptr() for array in arrays]
        function(*pointers, arrays[0].numel(), torch.get_num_threads())

    return step5
