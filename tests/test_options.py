"""What help() says of every argument, and what a type checker refuses."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import fused_ema
from fused_ema import FusedScaledAdamW, FusedScaledSGD
from fused_ema.optim.options import EMA, TEXTS, EmaOptions, composed
from fused_ema.step.backends import BACKENDS, BackendName

CLASSES = [
    value
    for value in map(fused_ema.__dict__.get, fused_ema.__all__)
    if inspect.isclass(value) and issubclass(value, fused_ema.FusedScaledOptimizer)
]


def arguments(cls) -> set[str]:
    found = set()
    for name, parameter in inspect.signature(cls).parameters.items():
        found |= {*EMA} if parameter.kind is parameter.VAR_KEYWORD else {name}
    return found


def described(cls) -> set[str]:
    """Arguments in the section of that name, as `name: text` or `name, name: text`."""
    section = re.split(r"\n *(?:Args|Raises):\n", inspect.cleandoc(cls.__doc__))[1]
    names = re.findall(r"^    ([a-z][\w, ]*): ", section, re.MULTILINE)
    return {name for listed in names for name in listed.split(", ")}


@pytest.mark.parametrize("cls", CLASSES)
def test_help_describes_every_argument(cls):
    assert described(cls) == arguments(cls)


def test_the_options_are_those_of_the_type():
    assert EMA.keys() == EmaOptions.__annotations__.keys()
    assert get_type_hints(EmaOptions).keys() == EMA.keys()
    assert all(text[0] != " " and text.rstrip()[-1] == "." for text in TEXTS.values())


def test_an_unknown_option_has_no_text():
    with pytest.raises(KeyError, match="learning_rate"):
        composed("Args:\n    {learning_rate}\n")


def test_the_backends_are_those_of_the_type():
    assert get_args(BackendName) == ("auto", *(backend.NAME for backend in BACKENDS))


def test_a_type_checker_refuses_what_the_constructor_does(tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    wrong = {
        "backend": "'nativ'",
        "ema_order": "'later'",
        "ema_format": "'fp8'",
        "state_format": "'delta'",
        "ema_buffers": "'average_'",
        "momentum_scaling": "'exakt'",
    }
    calls = [f"FusedScaledSGD([], {name}={value})" for name, value in wrong.items()]
    lines = ["from fused_ema import FusedScaledSGD", "FusedScaledSGD([], backend='native')", *calls]
    program.write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--no-incremental", str(program)]
    root = Path(fused_ema.__file__).parents[1]
    env = {**os.environ, "MYPYPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env)
    refused = set(map(int, re.findall(r"program\.py:(\d+): error: Argument", done.stdout)))
    assert refused == {*range(3, 3 + len(calls))}, done.stdout + done.stderr
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}={value} is not known; allowed: '"):
            FusedScaledSGD([torch.ones(1, requires_grad=True)], **{name: value.strip("'")})


@pytest.mark.parametrize("flag", ["master_weights", "amsgrad", "maximize", "capturable"])
@pytest.mark.parametrize("value", ["yes", 2, None])
def test_switches_are_true_or_false(flag, value):
    with pytest.raises(ValueError, match=f"{flag}={value!r} is not known; allowed: True or False"):
        FusedScaledAdamW([torch.ones(1, requires_grad=True)], **{flag: value})


@pytest.mark.parametrize("decays", [[], ()])
def test_no_decay_at_all_is_none(decays):
    with pytest.raises(ValueError, match=r"ema_decay=.* allowed"):
        FusedScaledSGD([torch.ones(1, requires_grad=True)], ema_decay=decays)
