"""Builds fused_ema as users without a network do, in an environment of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from bench.machine import ROOT

# File in the environment that identifies the last build.
BUILT = "built"
# Sources of the extension.
SOURCES = ("setup.py", "pyproject.toml", "csrc")
FLAGS = (
    *("--verbose", "--disable-pip-version-check", "--no-index"),
    *("--no-build-isolation", "--no-deps"),
)


def environment() -> Path:
    """A virtual environment that sees this Python's packages, and into which pip can always write.

    By itself it would see the packages of the system's Python, but not those of a virtual
    environment. It has no pip of its own, because not every Python can install one, and the outer
    pip works.
    """
    outer = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"gpu-venv-{sys.implementation.cache_tag}-{outer}"
    inner = python(folder)
    if not inner.exists():
        flags = ("--without-pip", "--system-site-packages")
        subprocess.run([sys.executable, "-m", "venv", *flags, folder], check=True)
    command = [inner, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    Path(done.stdout.strip(), "outer.pth").write_text(line)
    return folder


def python(environment: Path) -> Path:
    return environment / "bin" / "python"


def variables(environment: Path) -> dict[str, str]:
    """Variables with which a process finds the package, and the build its ninja; unbuffered."""
    folders = (environment / "bin", sysconfig.get_path("scripts"), os.environ.get("PATH", ""))
    return {
        **os.environ,
        "PATH": os.pathsep.join(map(str, folders)),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def is_built(environment: Path, arch: str) -> bool:
    told = environment / BUILT
    return told.exists() and told.read_text() == fingerprint(arch)


def fingerprint(arch: str) -> str:
    """A hash of everything on which the extension depends."""
    found = hashlib.sha256(f"{sys.version} {version('torch')} {arch}".encode())
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                found.update(path.read_bytes())
    return found.hexdigest()


def main(arch: str) -> None:
    """Install the package; the environment's Python runs this."""
    environment = Path(sys.prefix)
    command = [sys.executable, "-m", "pip", "install", *FLAGS, "--editable", str(ROOT)]
    subprocess.run(command, cwd=ROOT, check=True)
    told = "import fused_ema; print('built:', fused_ema.build_info())"
    subprocess.run([sys.executable, "-c", told], cwd=environment, check=True)
    (environment / BUILT).write_text(fingerprint(arch))


if __name__ == "__main__":
    main(sys.argv[1])
