"""The tools that contributors run are those that make runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_pre_commit_pins_what_make_pins():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.findall(r"\[([\w-]+)==([\w.]+)\]", hooks)
    assert {name for name, _ in found} == {"ruff", "clang-format"}
    assert all(pins[name] == version for name, version in found)


def test_contributing_names_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"make ([a-z-]+)", text))
    assert named
    assert named <= targets
