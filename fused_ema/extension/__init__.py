"""The compiled extension, or what stands in for it: the one place that chooses.

Attributes:
    native: the extension, or :mod:`fused_ema.extension.standin`.
    why_not: why the extension is not in use, None where it is.
"""

from __future__ import annotations

import os
import re
import warnings
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from . import standin

__all__ = ["native", "why_not"]

VARIABLE = "FUSED_EMA_NO_EXTENSION"
REBUILD = "rebuild with pip install --no-build-isolation -e ."


def _load(name: str, folder: Path, running: str) -> tuple[ModuleType, str | None]:
    """The module to use, and why it is the stand-in; a warning where an extension was refused.

    Args:
        name: of the extension, in full.
        folder: where its file must be: an editable installation would offer that of another copy.
        running: the version of the torch that runs here.
    """
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        return standin, f"{VARIABLE} is set"
    files = _files(name, folder)
    if PathFinder.find_spec(name, [str(folder)]) is None:
        if not files:
            return standin, f"it is not built: {REBUILD.replace('rebuild', 'build')}"
        why = f"{files[0]} is not for this Python ({EXTENSION_SUFFIXES[0]}): {REBUILD}"
    else:
        try:
            module = import_module(name)
            reason = _mismatch(getattr(module, "TORCH_VERSION", None), running)
            if reason is None:
                return module, None
            why = reason
        except Exception as error:  # whatever it is: the warning tells it
            why = f"it cannot be loaded ({error}): {REBUILD}"
    warnings.warn(
        f"fused_ema goes on without its compiled extension, slower: {why}; or set {VARIABLE}=1",
        RuntimeWarning,
        stacklevel=2,
    )
    return standin, why


def _mismatch(built: str | None, running: str) -> str | None:
    """Why an extension that was built for a torch cannot be used with another.

    It reads torch's objects in memory: where another torch lays them out otherwise, that is no
    error, but memory that is overwritten.
    """
    if built is not None and _release(built) == _release(running):
        return None
    return f"built for torch {built or 'of unknown version'}, running {running}: {REBUILD}"


def _release(version: str) -> str:
    """``2.14.1`` of ``2.14.1+cu130`` or ``2.14.1a0``."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found else version


def _files(name: str, folder: Path) -> list[str]:
    """Extensions of that name, whatever they were built for."""
    pattern = f"{name.rpartition('.')[2]}.*"
    return sorted(p.name for p in folder.glob(pattern) if p.suffix in (".so", ".pyd"))


if TYPE_CHECKING:
    from .. import _native as native

    why_not: str | None
else:
    native, why_not = _load("fused_ema._native", Path(__file__).parents[1], torch.__version__)
