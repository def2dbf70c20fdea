"""What setup.py decides before anything is compiled."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


def names_of_setup(monkeypatch, *commands: str) -> dict[str, Any]:
    """What setup.py defines when it is asked to build; nothing is built."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.setattr("sys.argv", ["setup.py", *(commands or ("build_ext",))])
    return runpy.run_path("setup.py")


def test_an_old_setuptools_is_told_of_in_one_line(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit) as told:
        names_of_setup(monkeypatch)
    line = "fused_ema needs setuptools 77 or later to be built; found 65.5.0"
    assert str(told.value).startswith(line)
    assert "\n" not in str(told.value)


def compiler(folder: Path, version: str) -> str:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\necho '{version}'\n")
    file.chmod(0o755)
    return str(file)


def platform(monkeypatch, name: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.platform", name)
    return names_of_setup(monkeypatch)


def test_windows_goes_on_without_an_extension(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        platform(monkeypatch, "win32")
    assert end.value.code is None
    line = "fused_ema is built without its extension: Microsoft's compiler cannot compile it\n"
    assert capsys.readouterr().out == line


def test_apples_compiler_does_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", compiler(tmp_path, "Apple clang version 17.0.0"))
    with pytest.raises(SystemExit) as end:
        platform(monkeypatch, "darwin")
    assert end.value.code is None
    line = "fused_ema is built without its extension: Apple's compiler has no OpenMP; CXX may name"
    assert capsys.readouterr().out.startswith(line)


def test_another_compiler_on_macos_makes_the_extension(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(tmp_path, "g++-14 (Homebrew GCC 14.2.0) 14.2.0"))
    names = platform(monkeypatch, "darwin")
    assert names["native_extension"]().name == "fused_ema._native"


@pytest.mark.parametrize("command", ["sdist", "egg_info", "dist_info"])
def test_a_source_distribution_needs_no_torch(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as end:
        names_of_setup(monkeypatch, command)
    assert end.value.code is None
    with pytest.raises(SystemExit, match="which does not import here"):
        names_of_setup(monkeypatch, "bdist_wheel")


def test_a_readme_elsewhere_leads_back_to_the_repository(monkeypatch):
    absolute = names_of_setup(monkeypatch)["absolute"]
    text = "![plot](docs/a.png) [page](docs/b.md#c) [there](https://host/d) [here](#e)"
    blob = "https://host/us/it/blob/main"
    assert absolute(text, "https://host/us/it") == (
        f"![plot]({blob}/docs/a.png?raw=true) [page]({blob}/docs/b.md#c) [there](https://host/d) "
        "[here](#e)"
    )
