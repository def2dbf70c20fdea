"""The package's shape: imports run one way, and the library itself never prints."""

from __future__ import annotations

import ast
from pathlib import Path

import fused_ema

PACKAGE = Path(fused_ema.__file__).parent
# The floors, lowest first: each may import from itself and from those below.
FLOORS = (
    (
        *("checks", "dtypes", "realmath", "values", "names", "together", "sharding", "build"),
        "wrapped",
        *("extension", "_native", "_native_cuda", "kernels"),
    ),
    ("scaling", "batchnorm", "progressive", "posthoc"),
    ("rules",),
    ("ema",),
    ("step",),
    ("optim",),
    ("__init__",),
    ("demo", "experiments", "integrations", "__main__"),
)
# What shows something to a person.
PROGRAMS = ("demo", "experiments", "__main__")
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports."""
    package = ["fused_ema", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            names = [".".join([*filter(None, base), alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "fused_ema" and len(parts) > 1:
                found.add(parts[1] if parts[1] in LEVEL else "__init__")
    return found


def test_imports_go_down():
    for path in sources():
        up = {name for name in imported(path) if LEVEL[name] > LEVEL[top(path)]}
        assert not up, f"{path} imports {up}"


def test_scaling_and_decay_import_only_math():
    for module in ("scaling", "ema/decay"):
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        names = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not names & {"torch", "numpy"}, module


def test_the_library_never_prints():
    for path in sources():
        if top(path) in PROGRAMS:
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_update_maths_is_written_once_a_language():
    csrc = Path(__file__).parents[1] / "csrc"
    users = {p.name for p in csrc.rglob("*") if p.is_file() and "sqrt(" in p.read_text()}
    assert users == {
        *("adam.h", "lamb.h", "rmsprop.h", "trust.h"),
        *("norm.h", "scaling.h", "schedules.h"),
    }
    kernels = Path(__file__).parents[1] / "kernels"
    users = {p.name for p in kernels.glob("*.py") if "sqrt(" in p.read_text()}
    assert users == {"blending.py", "rules.py", "schedules.py", "squares.py", "trust.py"}
    users = {top(p) for p in sources() if ".sqrt()" in p.read_text()} - set(PROGRAMS)
    assert users == {"realmath", "rules"}
