"""Chooses between the compiled extension and its stand-in, for the whole package.

Attributes:
    native: the extension, or :mod:`fused_ema.extension.standin`.
    why_not: the reason why the extension is not in use, None if it is.
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
    """The module to use, and why it is the stand-in; warns if an extension was refused.

    Args:
        name: full name of the extension.
        folder: the only folder that may hold its file; an editable installation would offer that of
            another copy.
        running: the version of the torch in use.
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
        except Exception as error:  # any error: the warning names it
            why = f"it cannot be loaded ({error}): {REBUILD}"
    warnings.warn(
        f"fused_ema goes on without its compiled extension, slower: {why}; or set {VARIABLE}=1",
        RuntimeWarning,
        stacklevel=2,
    )
    return standin, why


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

    why_not: str | None
else:
    native, why_not = _load("fused_ema._native", Path(__file__).parents[1], torch.__version__)
