"""Prints the versions of everything in use; fails if torch cannot use the device."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "timm")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def main(device: str) -> None:
    versions = ", ".join(f"{package} {installed(package)}" for package in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}, CUDA {torch.version.cuda}")
    torch.zeros(1, device=device)
    if device != "cpu":
        print(torch.cuda.get_device_properties(0), flush=True)
        subprocess.run(["nvidia-smi"], check=False)


if __name__ == "__main__":
    main(sys.argv[1])
