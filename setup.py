"""Builds the native extension; everything else about the package is in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from glob import glob
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup

# Before setup() reads pyproject.toml, which older ones do not understand.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"fused_ema needs setuptools 77 or later to be built; found {setuptools.__version__}. "
        "First: pip install --upgrade setuptools"
    )


def absolute(text: str, address: str) -> str:
    """Markdown whose relative links lead to files of the repository at ``address``."""
    files, relative = f"{address}/blob/main/", "(?!https?:|#)"
    text = re.sub(rf"(!\[[^]]*\]\(){relative}([^)]+)", rf"\1{files}\2?raw=true", text)
    return re.sub(rf"(\]\(){relative}", rf"\1{files}", text)


def readme() -> str:
    """README.md for other places than the repository, as far as pyproject.toml names that."""
    text = Path("README.md").read_text(encoding="utf-8")
    project = Path("pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)
    return absolute(text, address[1]) if address else text


PACKAGES: dict[str, Any] = {
    "long_description": readme(),
    "long_description_content_type": "text/markdown",
    "packages": [*find_packages(include=["fused_ema", "fused_ema.*"]), "fused_ema.kernels"],
    "package_dir": {"fused_ema.kernels": "kernels"},
}


def find_cuda() -> str:
    """The folder of nvcc's installation, as far as it can be told."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named or not nvcc:
        return named or "/usr/local/cuda"
    # What is on the PATH may be a script that starts nvcc elsewhere, where its headers are.
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return os.path.realpath(top[1] if top else Path(nvcc).resolve().parents[1])


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def no_extension() -> str | None:
    """Why no extension is compiled here, None if it is."""
    if is_set("FUSED_EMA_NO_EXTENSION"):
        return "FUSED_EMA_NO_EXTENSION is set"
    if sys.platform == "win32":
        return "Microsoft's compiler cannot compile it"
    if sys.platform == "darwin" and is_apples(shlex.split(os.environ.get("CXX") or "c++")):
        return "Apple's compiler has no OpenMP; CXX may name GCC, or clang of LLVM"
    return None


def is_apples(compiler: list[str]) -> bool:
    if shutil.which(compiler[0]) is None:
        return False
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    return "Apple" in told.stdout


if (reason := no_extension()) is not None:
    print(f"fused_ema is built without its extension: {reason}", flush=True)
    setup(**PACKAGES)
    sys.exit()

if {"sdist", "egg_info", "dist_info"} & {*sys.argv}:  # nothing is compiled: no torch is needed
    setup(**PACKAGES)
    sys.exit()

CUDA_HOME = find_cuda()
NVCC = f"{CUDA_HOME}/bin/nvcc"
if os.path.exists(NVCC):
    # Read by the import below: torch would take such a script for the compiler itself.
    os.environ["CUDA_HOME"] = CUDA_HOME

try:
    import torch
    from torch.utils.cpp_extension import (
        BuildExtension,
        CppExtension,
        CUDAExtension,
        _get_cuda_arch_flags,
        include_paths,
    )
except ImportError as error:
    # Not a build requirement: an isolated build would compile against another torch than the one
    # that later loads the extension, and their C++ ABIs need not match.
    sys.exit(
        f"fused_ema is built against the PyTorch it will run with, which does not import here "
        f"({error}).\nInstall torch, then: pip install --no-build-isolation -e .\n"
        "Or leave the extension out: FUSED_EMA_NO_EXTENSION=1 pip install -e ."
    )


# setuptools wants paths relative to this file, and runs it from its folder.
CSRC = "csrc"
SHIM = "tests/shim"
SANITIZE = is_set("FUSED_EMA_SANITIZE")
# For tests without a GPU: the CUDA kernel as ordinary C++, on CPU memory.
CUDA_SHIM = is_set("FUSED_EMA_CUDA_SHIM")

# These let sqrt and division vectorise, and keep a*b+c two roundings on every CPU target, so that
# all targets give the same bits.
FLOAT_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Two roundings on the GPU too. Line numbers are for profilers and sanitizers, and cost no time.
NVCC_FLAGS = ["-O3", "--fmad=false", "-lineinfo", "-Xfatbin=-compress-all"]
# Two architectures at a time: the last source to compile would leave the other cores idle.
NVCC_FLAGS += ["-Xcompiler=-fvisibility=hidden", "--threads=2"]
# Each takes its share of the compile time; TORCH_CUDA_ARCH_LIST asks for others.
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")


def no_cuda() -> str | None:
    """Why the kernels for NVIDIA GPUs are not built; None where they are."""
    if SANITIZE or CUDA_SHIM:
        return "this build is for tests on the CPU"
    if torch.version.cuda is None:
        return "this PyTorch is built without it"
    if not os.path.exists(NVCC):
        return f"no {NVCC} (CUDA_HOME may name another folder)"
    version = subprocess.check_output([NVCC, "--version"], text=True)
    release = re.search(r"release (\d+)\.\d+", version)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "of unknown release"
        return f"{NVCC} is {found}, PyTorch is built with CUDA {torch.version.cuda}"
    return None


NO_CUDA = no_cuda()


def architectures() -> str:
    """:data:`ARCHITECTURES` and those of the GPUs here, as far as nvcc knows them.

    The last one as PTX too, for later GPUs.
    """
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    asked = {*ARCHITECTURES, *(f"{major}.{minor}" for major, minor in found)}
    listed = subprocess.check_output([NVCC, "--list-gpu-code"], text=True).split()
    known = [arch for arch in asked if f"sm_{arch.replace('.', '')}" in listed]
    return ";".join(sorted(known, key=float)) + "+PTX"


def optimization_flags() -> list[str]:
    if SANITIZE:
        # Python's own flags hold -fwrapv, which would hide signed overflow from the sanitizer.
        return ["-O0", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS]
    return ["-O3", "-g0"]


def foreign_headers() -> list[str]:
    """Marks the headers of torch, Python and CUDA as system ones: their warnings are not ours."""
    paths = [*include_paths(), sysconfig.get_path("include")]
    if NO_CUDA is None:
        paths.append(f"{CUDA_HOME}/include")
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
        *(["-Wno-unknown-pragmas"] if CUDA_SHIM else []),
    ]


def native_extension() -> Extension:
    sources = glob(f"{CSRC}/*.cpp") + glob(f"{CSRC}/cpu/*.cpp")
    return extension("_native", CppExtension, sources)


def cuda_extension() -> Extension | None:
    """The kernels for NVIDIA GPUs, apart: a PyTorch without CUDA cannot load them."""
    if not CUDA_SHIM and NO_CUDA is not None:
        return None
    # The slots are compiled into each of the two, which share no object.
    sources = [f"{CSRC}/slots.cpp", f"{CSRC}/slots_bindings.cpp"]
    if CUDA_SHIM:
        streams = f"{CSRC}/cuda/stream.cpp"  # the shim has its own
        sources += {*glob(f"{CSRC}/cuda/*.cpp")} - {streams}
        sources += glob(f"{SHIM}/st*.cpp")
        # Small chunks and blocks have the same edges, and take a fraction of the time.
        small = {"FUSED_EMA_CHUNK_BYTES": "1024", "FUSED_EMA_THREADS": "32"}
        found = extension("_native_cuda", CppExtension, sources, FUSED_EMA_CUDA_PTX="", **small)
        found.include_dirs.insert(0, str(Path(SHIM).resolve()))
        return found
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
    sources += glob(f"{CSRC}/cuda/*.cu") + glob(f"{CSRC}/cuda/*.cpp")
    # as torch understands the variable
    ptx = re.findall(r"code=compute_(\d+)", " ".join(_get_cuda_arch_flags()))
    code = ",".join(f"{arch}0" for arch in ptx)
    return extension("_native_cuda", CUDAExtension, sources, FUSED_EMA_CUDA_PTX=code)


def extension(name: str, kind: Callable[..., Extension], sources: list[str], **macros: str) -> Any:
    headers = [str(path) for path in Path(CSRC).rglob("*") if path.suffix in (".h", ".cuh")]
    return kind(
        name=f"fused_ema.{name}",
        sources=sorted(sources),
        depends=sorted(headers),
        include_dirs=[str(Path(CSRC).resolve())],
        define_macros=[*macros.items()],
        extra_compile_args={"cxx": cxx_flags(), "nvcc": NVCC_FLAGS},
        extra_link_args=["-fopenmp", *(SANITIZERS if SANITIZE else [])],
    )


class BuildNative(BuildExtension):
    """Keeps the objects, so that an unchanged source is not compiled again.

    pip would put them into a temporary folder. System headers are not tracked as dependencies, so
    each torch and each Python gets its own folder.
    """

    def finalize_options(self) -> None:
        folder = f"build/torch-{torch.__version__}-{sys.implementation.cache_tag}"
        self.build_temp = (
            folder + ("-sanitized" if SANITIZE else "") + ("-shim" if CUDA_SHIM else "")
        )
        super().finalize_options()

    def run(self) -> None:
        """Build; extensions that an earlier build has left and this one does not make go first."""
        made = {Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions}
        for folder in {path.parent for path in made}:
            for left in {*folder.glob(f"_native*{EXTENSION_SUFFIXES[0]}")} - made:
                left.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # their flags differ, so that neither can use the other's objects
        top, self.build_temp = self.build_temp, f"{self.build_temp}/{ext.name}"
        super().build_extension(ext)
        self.build_temp = top

    def build_extensions(self) -> None:
        if CUDA_SHIM:
            built = "the CPU, and the CUDA kernels as C++ (for tests)"
        elif NO_CUDA is None:
            built = f"the CPU and CUDA {os.environ['TORCH_CUDA_ARCH_LIST']}"
        else:
            built = f"the CPU alone, not for CUDA: {NO_CUDA}"
        print(f"fused_ema is built for {built}", flush=True)
        try:
            super().build_extensions()
        except BaseException:
            print("FUSED_EMA_NO_EXTENSION=1 leaves the extension out", file=sys.stderr, flush=True)
            raise


setup(
    **PACKAGES,
    ext_modules=[ext for ext in (native_extension(), cuda_extension()) if ext is not None],
    cmdclass={"build_ext": BuildNative},
)
