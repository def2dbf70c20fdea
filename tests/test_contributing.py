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


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))


def test_workflows_call_make_alone():
    files = list((ROOT / ".github/workflows").glob("*.yml"))
    assert files
    for file in files:
        text = file.read_text()
        commands = re.findall(r"^ *- run: (.*)$", text, re.MULTILINE)
        targets = {re.fullmatch(r"make ([\w-]+)[^;&|]*", line)[1] for line in commands}
        assert targets
        assert targets <= make_targets()


def test_contributing_names_targets_that_exist():
    targets = make_targets()
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"make ([a-z-]+)", text))
    assert named
    assert named <= targets
