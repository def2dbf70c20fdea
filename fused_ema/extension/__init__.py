"""Chooses between the compiled extensions and their substitutes, for the whole package.

There are two: ``fused_ema._native`` for the CPU, and ``fused_ema._native_cuda`` with the kernels
for NVIDIA GPUs, which needs a torch with CUDA. One build may make both; without the second, the
first works.

Attributes:
    native: the extension, or :mod:`fused_ema.extension.standin`.
    why_not: the reason why the extension is not in use, None if it is.
    cuda: the extension with the CUDA kernels; only to be used if ``why_no_cuda`` is None.
    why_no_cuda: the reason why the CUDA kernels are not in use, None if they are.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from . import standin

__all__ = ["cuda", "native", "why_no_cuda", "why_not"]

VARIABLE = "FUSED_EMA_NO_EXTENSION"
REBUILD = "rebuild with pip install --no-build-isolation -e ."


def _load(name: str, folder: Path, running: str) -> tuple[ModuleType, str | None]:
    """The module to use, and why it is the stand-in; warns if an extension was refused.

    Args:
        name: full name of the extension.
        folder: the only folder that may hold its file; an editable installation would offer that of
            another copy.
        running: the version of the torch in use.
    """
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        return standin, f"{VARIABLE} is set"
    module, why, refused = _find(name, folder, running)
    if refused:
        _warn(f"without its compiled extension, slower: {why}; or set {VARIABLE}=1")
    return module or standin, why


def _load_cuda(
    name: str, folder: Path, running: str, has_cuda: bool
) -> tuple[ModuleType | None, str | None]:
    """The CUDA kernels, or why there are none; warns if they were refused.

    Args:
        name: as for :func:`_load`.
        folder: the same.
        running: the same.
        has_cuda: whether that torch is built with CUDA. If not, there is no GPU to use them on.
    """
    module, why, refused = _find(name, folder, running)
    if refused and not has_cuda:
        why = f"torch {running} is built without CUDA"
    elif why is not None and not refused:
        why = f"{why}, with the nvcc of PyTorch's CUDA release"
    elif refused:
        _warn(f"without its CUDA kernels, with Triton or foreach on GPUs: {why}")
    return module, why


def _not_built(platform: str) -> str:
    build = REBUILD.replace("rebuild", "build")
    if platform == "win32":
        build = "Microsoft's compiler cannot"
    if platform == "darwin":
        build += "; Apple's compiler cannot, GCC can (CXX=g++-14)"
    return f"it is not built: {build}"


def _warn(how: str) -> None:
    warnings.warn(f"fused_ema goes on {how}", RuntimeWarning, stacklevel=3)


def _find(name: str, folder: Path, running: str) -> tuple[ModuleType | None, str | None, bool]:
    """An extension, why it is not usable, and whether it is refused: it is there, but unusable."""
    files = _files(name, folder)
    if PathFinder.find_spec(name, [str(folder)]) is None:
        if not files:
            return None, _not_built(sys.platform), False
        return None, f"{files[0]} is not for this Python ({EXTENSION_SUFFIXES[0]}): {REBUILD}", True
    try:
        module = import_module(name)
    except Exception as error:  # any error: the warning names it
        return None, f"it cannot be loaded ({error}): {REBUILD}", True
    why = _mismatch(getattr(module, "TORCH_VERSION", None), running)
    return (module, None, False) if why is None else (None, why, True)


def _mismatch(built: str | None, running: str) -> str | None:
    """Why an extension built for one torch version cannot be used with another.

    The extension accesses torch's objects in memory. If another torch lays them out differently, it
    does not raise but overwrites other memory.
    """
    if built is not None and _release(built) == _release(running):
        return None
    return f"built for torch {built or 'of unknown version'}, running {running}: {REBUILD}"


def _release(version: str) -> str:
    """The release number in a version: ``2.14.1`` in ``2.14.1+cu130`` or ``2.14.1a0``."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found else version


def _files(name: str, folder: Path) -> list[str]:
    """Files of extensions of that name, built for any Python."""
    pattern = f"{name.rpartition('.')[2]}.*"
    return sorted(p.name for p in folder.glob(pattern) if p.suffix in (".so", ".pyd"))


if TYPE_CHECKING:
    from .. import _native as native
    from .. import _native_cuda as cuda

    why_not: str | None
    why_no_cuda: str | None
else:
    _given = Path(__file__).parents[1], torch.__version__
    native, why_not = _load("fused_ema._native", *_given)
    if why_not is None:
        has_cuda = torch.version.cuda is not None
        cuda, why_no_cuda = _load_cuda("fused_ema._native_cuda", *_given, has_cuda)
    else:
        cuda, why_no_cuda = None, why_not
