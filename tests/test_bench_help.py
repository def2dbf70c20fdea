"""Each command of the benchmarks that its README names answers --help at once."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "bench" / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m (bench\.\w+)", TEXT)))


def test_commands_are_found():
    assert {"bench.run", "bench.report", "bench.ema_error", "bench.cases"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_help_is_all_that_help_does(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(command, run_name="__main__")
    assert stop.value.code == 0
    assert f"usage: python -m {command} " in capsys.readouterr().out
