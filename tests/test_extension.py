"""Without its compiled extension, or with one that cannot be used, the package goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fused_ema
from fused_ema import _native, extension
from fused_ema.extension import standin

ROOT = Path(__file__).parents[1]
SUFFIX = EXTENSION_SUFFIXES[0]
WITHOUT = {"FUSED_EMA_NO_EXTENSION": "1"}
USE = """
import torch
import fused_ema

class Both:
    def __init__(self, ours, theirs, **kwargs):
        self.sets = [[torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)] for _ in "ab"]
        self.ours = ours(self.sets[0], ema_decay=0.5, backend="foreach", **kwargs)
        self.theirs = theirs(self.sets[1], **kwargs)
        self.average = [p.detach().double() for p in self.sets[1]]

    def step(self, k):
        for params in self.sets:
            for p in params:
                p.grad = torch.sin(torch.arange(float(p.numel())) + k)
        self.ours.step()
        self.theirs.step()
        for a, p in zip(self.average, self.sets[1]):
            a += (1 - 0.5) * (p.detach() - a)

    def check(self):
        for p, q, a in zip(*self.sets, self.average):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(self.ours.state[p]["ema"].double(), a, rtol=1e-6, atol=1e-7)

def use():
    optim = torch.optim
    for ours, theirs, kwargs in (
        (fused_ema.FusedScaledSGD, optim.SGD, dict(lr=0.1, momentum=0.9)),
        (fused_ema.FusedScaledAdam, optim.Adam, dict(lr=0.1)),
        (fused_ema.FusedScaledAdamW, optim.AdamW, dict(lr=0.1, weight_decay=0.05)),
    ):
        both, other = Both(ours, theirs, **kwargs), Both(ours, theirs, **kwargs)
        for k in range(3):
            both.step(k)
        both.check()
        before = [p.detach().clone() for p in both.sets[0]]
        with both.ours.ema_weights():
            for p, a in zip(both.sets[0], both.average):
                torch.testing.assert_close(p.detach().double(), a, rtol=1e-6, atol=1e-7)
        assert all(map(torch.equal, both.sets[0], before))
        other.ours.load_state_dict(both.ours.state_dict())
        other.theirs.load_state_dict(both.theirs.state_dict())
        other.average = both.average
        with torch.no_grad():
            for mine, yours in zip(other.sets, both.sets):
                for p, q in zip(mine, yours):
                    p.copy_(q)
        other.step(7)
        other.check()
        assert other.ours.backends == ("foreach",)
"""


def run(code: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(cwd), **env},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def package(folder: Path) -> Path:
    """The package's Python files, elsewhere, without an extension."""
    copy = folder / "fused_ema"
    # what finds itself by its file must find this folder
    ignored = shutil.ignore_patterns("_native*", "__pycache__")
    shutil.copytree(Path(fused_ema.__file__).parent, copy, ignore=ignored)
    return copy


def test_everything_but_native_works_where_it_is_not_built(tmp_path):
    package(tmp_path)
    done = run(
        "import warnings; warnings.simplefilter('error')"
        + USE
        + """
use()
info = fused_ema.build_info()
assert info["cpu_targets"] == [] and info["cuda"] is None
print(info["extension"])
p = torch.nn.Parameter(torch.ones(2))
p.grad = torch.ones(2)
for backend in ("native", "auto"):
    opt = fused_ema.FusedScaledSGD([p], backend=backend)
    try:
        opt.step()
    except RuntimeError as error:
        print(error)
print(opt.backends, p.detach())
""",
        tmp_path,
        TRITON_INTERPRET="0",
    )
    assert done.returncode == 0, done.stderr
    why, error, chosen = done.stdout.splitlines()
    assert why == "it is not built: build with pip install --no-build-isolation -e ."
    assert f"native: it needs the compiled extension: {why}" in error
    assert chosen.startswith("('foreach',)")


def test_the_variable_chooses_in_silence():
    code = "import warnings; warnings.simplefilter('error')" + USE + "use()"
    done = run(code + "; print(fused_ema.build_info()['extension'])", **WITHOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "FUSED_EMA_NO_EXTENSION is set"


def test_an_extension_that_cannot_be_used_is_told_once(tmp_path):
    (package(tmp_path) / f"_native{SUFFIX}").write_text("")
    code = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import fused_ema
    import fused_ema.optim.base
    p = fused_ema.FusedScaledSGD([__import__("torch").ones(2, requires_grad=True)]).step()
print(len(told), told[0].category.__name__, told[0].message)
print(fused_ema.build_info()["extension"])
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    told, reason = done.stdout.splitlines()
    assert told.startswith("1 RuntimeWarning fused_ema goes on without its compiled extension")
    assert reason in told


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        (f"an_extension{SUFFIX}", "", "it cannot be loaded ("),
        ("an_extension.py", "raise OSError('lost')", "it cannot be loaded (lost)"),
        ("an_extension.py", "import not_a_module", "it cannot be loaded (No module named 'not_a_"),
        ("an_extension.cpython-34m-foreign.so", "", "an_extension.cpython-34m-foreign.so is not"),
        ("an_extension.py", "", "built for torch of unknown version, running 2.11.0"),
        ("an_extension.py", "TORCH_VERSION = '2.14.1'", "built for torch 2.14.1, running 2.11.0"),
    ],
)
def test_why_an_extension_cannot_be_used(file, content, why, tmp_path, monkeypatch):
    (tmp_path / file).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("FUSED_EMA_NO_EXTENSION", raising=False)
    with pytest.warns(RuntimeWarning, match="goes on without") as told:
        chosen, reason = extension._load("an_extension", tmp_path, "2.11.0")
    sys.modules.pop("an_extension", None)
    assert chosen is standin
    assert reason is not None
    assert reason.startswith(why)
    assert reason.endswith("rebuild with pip install --no-build-isolation -e .")
    assert reason in str(told[0].message)


def test_an_absent_extension_is_not_warned_of(tmp_path, monkeypatch):
    monkeypatch.delenv("FUSED_EMA_NO_EXTENSION", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen, why = extension._load("an_extension", tmp_path, "2.11.0")
    assert chosen is standin
    assert why is not None
    assert why.startswith("it is not built")


@pytest.mark.parametrize(
    ("platform", "why"),
    [
        ("linux", "it is not built: build with pip install --no-build-isolation -e ."),
        ("win32", "it is not built: Microsoft's compiler cannot"),
        ("darwin", "-e .; Apple's compiler cannot, GCC can (CXX=g++-14)"),
    ],
)
def test_why_none_is_built(platform, why, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.delenv("FUSED_EMA_NO_EXTENSION", raising=False)
    assert extension._load("an_extension", tmp_path, "2.11.0")[1].endswith(why)


def test_an_extension_of_another_torch_is_refused(monkeypatch):
    folder = Path(fused_ema.__file__).parent
    monkeypatch.delenv("FUSED_EMA_NO_EXTENSION", raising=False)
    built = extension._load("fused_ema._native", folder, torch.__version__)[0].TORCH_VERSION
    message = f"built for torch {built}, running 2.11.0: rebuild with pip install"
    with pytest.warns(RuntimeWarning, match=message):
        chosen, why = extension._load("fused_ema._native", folder, "2.11.0")
    assert chosen is standin
    assert why is not None
    assert why.startswith(message)


NO_LIBRARY = "raise ImportError('libc10_cuda.so: cannot open shared object file')"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (NO_LIBRARY, "it cannot be loaded (libc10_cuda.so: cannot open"),
        ("TORCH_VERSION = '2.14.1'", "built for torch 2.14.1, running 2.11.0"),
    ],
)
def test_cuda_kernels_that_cannot_be_used_are_told_of_where_a_gpu_may_be(
    content, why, tmp_path, monkeypatch
):
    (tmp_path / "some_kernels.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match="goes on without its CUDA kernels") as told:
        found, reason = extension._load_cuda("some_kernels", tmp_path, "2.11.0", has_cuda=True)
    assert found is None
    assert reason is not None
    assert reason.startswith(why)
    assert reason in str(told[0].message)
    sys.modules.pop("some_kernels", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, reason = extension._load_cuda("some_kernels", tmp_path, "2.11.0", has_cuda=False)
    sys.modules.pop("some_kernels", None)
    assert found is None
    assert reason == "torch 2.11.0 is built without CUDA"


def test_cuda_kernels_that_are_not_built_are_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, reason = extension._load_cuda("some_kernels", tmp_path, "2.11.0", has_cuda=True)
    assert found is None
    assert reason is not None
    assert reason.startswith("it is not built")


def test_a_cpu_extension_is_used_without_the_cuda_kernels_beside_it(tmp_path):
    folder = package(tmp_path)
    (folder / Path(_native.__file__).name).symlink_to(_native.__file__)
    (folder / f"_native_cuda{SUFFIX}").write_text("")
    code = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import fused_ema
import torch
info = fused_ema.build_info()
p = torch.ones(2, requires_grad=True)
p.grad = torch.ones(2)
opt = fused_ema.FusedScaledSGD([p], lr=0.5, backend="native")
opt.step()
print([str(w.message) for w in told], info["extension"], opt.backends, p.tolist())
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    told = "fused_ema goes on without its CUDA kernels" if torch.version.cuda else "[]"
    assert told in done.stdout
    assert done.stdout.strip().endswith("in use ('native',) [0.5, 0.5]")


@pytest.mark.parametrize(
    ("built", "running", "fits"),
    [
        ("2.14.1", "2.14.1+cu130", True),
        ("2.14.1", "2.14.1", True),
        ("2.15.0", "2.15.0a0+git123", True),
        ("2.14.1", "2.14.10", False),
        ("2.14.1", "2.14.0+cu130", False),
        (None, "2.14.1", False),
    ],
)
def test_which_torch_fits(built, running, fits):
    assert (extension._mismatch(built, running) is None) == fits


def test_a_build_without_the_extension_needs_neither_compiler_nor_torch(tmp_path):
    command = "build", "--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")
    code = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "--quiet", *{command}]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = run(code, **WITHOUT, CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    line = "fused_ema is built without its extension: FUSED_EMA_NO_EXTENSION is set"
    assert done.stdout.splitlines() == [line]
    files = [path.name for path in (tmp_path / "lib").rglob("*") if path.is_file()]
    assert {"standin.py", "tensors.py", "step.py"} <= set(files)
    assert not [name for name in files if name.endswith(".so")]
