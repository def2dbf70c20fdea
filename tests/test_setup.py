"""What setup.py decides before anything is compiled."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import setuptools

ROOT = Path(__file__).parents[1]


def names_of_setup(monkeypatch, *commands: str) -> dict[str, Any]:
    """What setup.py defines when it is asked to build; nothing is built."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.setattr("sys.argv", ["setup.py", *(commands or ("build_ext",))])
    return runpy.run_path("setup.py")
