"""Builds fused_ema as its users do where there is no network, into an environment of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from bench.machine import ROOT

VENV = ROOT / "build" / "gpu-venv"
BUILT = VENV / "built"
# What the extension is made of.
SOURCES = ("setup.py", "pyproject.toml", "csrc")
FLAGS = (
    *("--verbose", "--disable-pip-version-check", "--no-index"),
    *("--no-build-isolation", "--no-deps"),
)


def environment() -> str:
    """The Python of one that sees this one's packages, and into which pip may write in any case.

    It has no pip of its own: not every Python brings one to install, and the outer one will do.
    """
    inner = VENV / "bin" / "python"
    if not inner.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", VENV], check=True)
    command = [inner, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    outer = sysconfig.get_path("purelib")
    line = f"import site; site.addsitedir({outer!r})\n"
    Path(done.stdout.strip(), "outer.pth").write_text(line)
    return str(inner)


def variables(python: str) -> dict[str, str]:
    """What a process needs to find the package, and the build its ninja; nothing is held back."""
    folders = (Path(python).parent, sysconfig.get_path("scripts"), os.environ.get("PATH", ""))
    return {
        **os.environ,
        "PATH": os.pathsep.join(map(str, folders)),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def is_built(arch: str) -> bool:
    return BUILT.exists() and BUILT.read_text() == fingerprint(arch)


def fingerprint(arch: str) -> str:
    """Of all that the extension depends on."""
    found = hashlib.sha256(f"{sys.version} {version('torch')} {arch}".encode())
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                found.update(path.read_bytes())
    return found.hexdigest()


def main(arch: str) -> None:
    command = [sys.executable, "-m", "pip", "install", *FLAGS, "--editable", str(ROOT)]
    subprocess.run(command, cwd=ROOT, check=True)
    told = "import fused_ema; print('built:', fused_ema.build_info())"
    subprocess.run([sys.executable, "-c", told], cwd=VENV, check=True)
    BUILT.write_text(fingerprint(arch))


if __name__ == "__main__":
    main(sys.argv[1])
