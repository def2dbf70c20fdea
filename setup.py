"""Builds the native extension; everything else about the package is in pyproject.toml."""

import os
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError as error:
    # Not a build requirement: an isolated build would compile against another torch than the one
    # that later loads the extension, and their C++ ABIs need not match.
    sys.exit(
        f"fused_ema is built against the PyTorch it will run with, which does not import here "
        f"({error}).\nInstall torch, then: pip install --no-build-isolation -e ."
    )

# setuptools wants paths relative to this file, and runs it from its folder.
CSRC = "csrc"
SANITIZE = os.environ.get("FUSED_EMA_SANITIZE", "0") not in ("", "0")

# These let sqrt and division vectorise, and keep a*b+c two roundings on every CPU target, so that
# all targets give the same bits.
FLOAT_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def optimization_flags() -> list[str]:
    if SANITIZE:
        # Python's own flags hold -fwrapv, which would hide signed overflow from the sanitizer.
        return ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS]
    return ["-O3", "-g0"]


def foreign_headers() -> list[str]:
    """Marks the headers of torch and Python as system ones: their warnings are not ours to fix."""
    paths = [*include_paths(), sysconfig.get_path("include")]
    return [flag for path in paths for flag in ("-isystem", path)]


def cxx_flags() -> list[str]:
    # No -std here: BuildExtension adds the one that this torch's headers need.
    return [
        *foreign_headers(),
        *optimization_flags(),
        *FLOAT_FLAGS,
        *WARNINGS,
        "-fopenmp",
        "-fvisibility=hidden",
        "-DNDEBUG",
    ]


def native_extension() -> Extension:
    headers = [str(path) for path in Path(CSRC).rglob("*.h")]
    return CppExtension(
        name="fused_ema._native",
        sources=sorted(glob(f"{CSRC}/*.cpp") + glob(f"{CSRC}/cpu/*.cpp")),
        depends=sorted(headers),
        include_dirs=[str(Path(CSRC).resolve())],
        extra_compile_args={"cxx": cxx_flags()},
        extra_link_args=["-fopenmp", *(SANITIZERS if SANITIZE else [])],
    )


class BuildNative(BuildExtension):
    """Keeps the objects, so that an unchanged source is not compiled again.

    pip would put them into a temporary folder. System headers are not tracked as dependencies, so
    each torch and each Python gets its own folder.
    """

    def finalize_options(self) -> None:
        folder = f"build/torch-{torch.__version__}-{sys.implementation.cache_tag}"
        self.build_temp = f"{folder}-sanitized" if SANITIZE else folder
        super().finalize_options()


setup(
    packages=[*find_packages(include=["fused_ema", "fused_ema.*"]), "fused_ema.kernels"],
    package_dir={"fused_ema.kernels": "kernels"},
    ext_modules=[native_extension()],
    cmdclass={"build_ext": BuildNative},
)
