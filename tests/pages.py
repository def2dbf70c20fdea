"""Runs the code blocks of documentation pages, and the examples."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are faster on one thread, above all while other tests run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blocks(page: str, language: str = "python") -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def run_page(page: str, names: dict | None = None, count: int | None = None) -> dict:
    """Run a page's blocks one after the other, in the present folder, and return their names."""
    names = {"__name__": "page"} if names is None else names
    for block in blocks(page)[:count]:
        exec(compile(block, page, "exec"), names)
    return names


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict:
    path = ROOT / "examples" / name
    assert len(path.read_text().splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    return runpy.run_path(str(path), run_name="__main__")
