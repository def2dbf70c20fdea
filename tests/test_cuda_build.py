"""What nvcc made of the CUDA kernels, read from the extension itself; needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import pytest
import torch

from fused_ema import _native
from fused_ema.extension import cuda, why_no_cuda

# What a fixture makes once is made in one worker.
pytestmark = pytest.mark.xdist_group("cuda build")

CSRC = Path(__file__).parents[1] / "csrc"
MAX_REGISTERS = 64
# float, double and the halves, in symbols, and how they are stored
TYPES = ("f", "d", "NS_8BFloat16E", "NS_4HalfE")
NO_MASTER = [f"NS_8NoMasterI{stored}EE" for stored in TYPES]
MASTER = [f"NS_6MasterI{stored}EE" for stored in TYPES[2:]]
ROUNDED_STATES = [f"NS_13RoundedStatesI{layout}EE" for layout in (NO_MASTER[0], *MASTER)]
# averages in full, in bfloat16, as differences
FORMATS = [f"LNS_9EmaFormatE{k}E" for k in range(3)]
KERNEL = re.compile(
    rf"_ZN9fused_ema4cuda(?:4step(INS_\w+?E)({'|'.join([*NO_MASTER, *MASTER, *ROUNDED_STATES])})"
    rf"({'|'.join(FORMATS)})|7squares(I)({'|'.join(TYPES)})|4fold(INS_\w+?E)"
    rf"|5trust(INS_\w+?E)({'|'.join([*NO_MASTER, *MASTER, *ROUNDED_STATES])}))Li\d+EE\w+"
)
FOLD = "4cuda4fold"  # in double, by functions of CUDA's that approximate and fuse


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def cuobjdump() -> str | None:
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '')}/bin"]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def has_kernels() -> bool:
    """Whether nvcc has compiled the kernels, not the shim's compiler."""
    return why_no_cuda is None and b".nv_fatbin" in Path(cuda.__file__).read_bytes()


@lru_cache
def dump(*options: str) -> str:
    if not has_kernels():
        pytest.skip("the CUDA kernels are not built")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of a CUDA installation or of triton")
    command = [tool, *options, cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sections(text: str, start: str) -> dict[tuple[str, str], str]:
    """The parts of a dump by architecture and kernel."""
    found = {}
    for code in re.split(r"\n(?=Fatbin )", text):
        arch = re.search(r"^arch = (sm_\w+)", code, re.MULTILINE)
        for part in re.split(rf"\n\s*(?={start})", code)[1:]:
            found[arch[1], KERNEL.search(part)[0]] = part
    return found


def disassembled() -> dict[tuple[str, str], str]:
    """The kernels' instructions: one old and one new architecture, as each takes half a minute."""
    built = [f"sm_{version // 10}" for version in cuda.CUDA_ARCHITECTURES]
    chosen = [arch for arch in ("sm_80", "sm_100") if arch in built] or built
    found = {}
    for arch in chosen:
        found |= sections(dump("-sass", "-arch", arch), "Function")
    return found


@pytest.fixture(scope="module")
def sass() -> dict[tuple[str, str], list[str]]:
    """Each kernel's instructions, without predicates and operands."""
    opcode = re.compile(r"^\s*/\*\w{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)", re.MULTILINE)
    return {key: opcode.findall(part) for key, part in disassembled().items()}


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], str]:
    """What each kernel takes of its GPU, on every architecture."""
    return sections(dump("-res-usage"), "Function")


@pytest.fixture(scope="module")
def steps(sass) -> dict[tuple[str, str], list[str]]:
    return {key: ops for key, ops in sass.items() if "4cuda4step" in key[1]}


def test_the_kernels_are_built_where_nvcc_is():
    content = Path(_native.__file__).read_bytes()
    if b"__asan_init" in content or os.environ.get("FUSED_EMA_CUDA_SHIM"):
        pytest.skip("a build for tests on the CPU")
    if nvcc() is None or torch.version.cuda is None:
        pytest.skip("needs nvcc, and a PyTorch that is built with CUDA")
    release = subprocess.check_output([nvcc(), "--version"], text=True)
    if f"release {torch.version.cuda.split('.')[0]}." not in release:
        pytest.skip("nvcc and PyTorch are of different CUDA releases")
    assert has_kernels()


def test_every_kernel_is_built_for_every_architecture(resources):
    built = {arch: {name for a, name in resources if a == arch} for arch, _ in resources}
    assert built.keys() == {f"sm_{version // 10}" for version in cuda.CUDA_ARCHITECTURES}
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert [max(cuda.CUDA_ARCHITECTURES)] == cuda.CUDA_PTX
    ptx = re.findall(r"^\.target sm_(\d+)", dump("-ptx"), re.MULTILINE)
    assert {10 * int(version) for version in ptx} == set(cuda.CUDA_PTX)
    # of those that move something, and may have a master
    states = [
        count
        for name, variants in _native.rule_variants().items()
        if name != "frozen"
        for count in variants.values()
    ]
    count, with_states = len(states), len([k for k in states if k > 0])
    full = count * len([*NO_MASTER, *MASTER]) + len(NO_MASTER)
    rounded = 2 * (full - count - 1)  # averages of two formats, but not of float64
    norms = [
        count
        for name, variants in _native.rule_variants().items()
        if _native.rule_scalars()[name][-1:] == ["trust"]
        for count in variants.values()
    ]
    num_trusts = len(norms) * len([*NO_MASTER, *MASTER])
    num_trusts += len([k for k in norms if k > 0]) * len(ROUNDED_STATES)
    for names in built.values():
        kinds = Counter(KERNEL.match(name).groups() for name in names)
        # with small and with large parameters; those that round take the large ones
        sizes = Counter(kinds.values())
        folds = {KERNEL.match(name)[6] for name in names if FOLD in name}
        assert len(folds) == len(_native.rule_scalars())
        assert sizes[2] == full + len(TYPES) + len(folds) + num_trusts
        assert sizes[1] == rounded + with_states * len(ROUNDED_STATES) * len(FORMATS)
        assert len(sizes) == 2


# Bytes of a thread's memory, where kernels lack registers of those that leave room for four blocks.
STACKS = {
    "sm_100": {
        "INS_4AdamILb0EEENS_8NoMasterIdEE": 8,
        "INS_4LambENS_8NoMasterIdEE": 24,
        "INS_7RmspropILb1ELb0EEENS_8NoMasterIdEE": 32,
        "INS_7RmspropILb1ELb1EEENS_8NoMasterIdEE": 8,
    },
    "sm_120": {
        "INS_3SgdILb1EEENS_8NoMasterINS_8BFloat16EEE": 8,
        "INS_7RmspropILb1ELb0EEENS_8NoMasterIdEE": 16,
        "INS_7RmspropILb1ELb1EEENS_8NoMasterIdEE": 24,
    },
}


def stack(arch: str, name: str) -> int:
    """How many bytes of memory a thread of a kernel may take."""
    known = STACKS.get(arch, {}).items() if FORMATS[0] in name else ()
    return max((most for kernel, most in known if kernel in name), default=0)


def test_registers_suffice(resources, sass):
    assert resources.keys() >= sass.keys()
    for (arch, name), part in resources.items():
        use = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", part)}
        assert use["REG"] <= MAX_REGISTERS, (arch, name, use)
        assert use["LOCAL"] == 0, (arch, name, use)
        assert use["STACK"] <= stack(arch, name), (arch, name, use)
    for key, opcodes in sass.items():
        assert stack(*key) or not [op for op in opcodes if op.startswith(("LDL", "STL"))], key


def test_squares_are_read_by_16_bytes(sass, steps):
    kernels = {key for key in sass if "4cuda7squares" in key[1]}
    assert kernels
    for key in kernels:
        assert "LDG.E.128" in " ".join(sass[key]), key


def widest(key: tuple[str, str]) -> int:
    """Bits of the weights that a kernel takes at once: half as many where registers are scarce."""
    arch, name = key
    three = ("AdamILb1E", "RmspropILb1ELb1E")  # states
    many = any(kind in name for kind in (*NO_MASTER[2:], *three))
    return 64 if int(arch[3:]) >= 100 and FORMATS[2] in name and many else 128


def test_memory_is_accessed_by_16_bytes(steps):
    for key, opcodes in steps.items():
        stores = [op for op in opcodes if op.startswith("STG")]
        wide = [op for op in stores if op.startswith(f"STG.E.{widest(key)}")]
        # averages and, with a gradient, weights: each where there is an average, and where not
        assert len(wide) >= (2 if "Frozen" not in key[1] else 1), key
        if widest(key) == 128:
            # halves beside floats go by as many elements, half as many bytes
            wide += [op for op in stores if op.startswith("STG.E.64")]
            # the path for single elements has a store for each, the one for vectors no other
            assert len(wide) >= len(stores) - len(wide), key
        # generic accesses, which look for the kind of memory first
        assert not {"LD.E.128", "ST.E.128"} & set(opcodes), key


def test_a_vector_is_loaded_before_any_of_it_is_used(steps):
    for key, opcodes in steps.items():
        load, store = (f"{access}.E.{widest(key)}" for access in ("LDG", "STG"))
        kinds = [op if not op.startswith((load, store)) else op[: len(load)] for op in opcodes]
        events = [op for op in kinds if op.startswith((load, "STG", "BRA", "CALL"))]
        longest = dict.fromkeys(events, 0)
        for kind, run in groupby(events):
            longest[kind] = max(longest[kind], len(list(run)))
        # what is written together was read together before
        assert longest[load] >= longest.get(store, 0), (key, longest)
        assert longest[load] >= 1, (key, longest)


# What fused operations of our own multiply by, exactly, so that they round once anyhow: zero, the
# scale of differences, and the place of random bits.
EXACT = {"0.0f": "RZ", "-delta_scale": "-1024", "0x1p-37f": "7.2759576141834259033e-12"}


def test_every_operation_rounds_on_its_own():
    # ptxas may fuse what PTX leaves open: operations without .rn
    pattern = r"\b((?:add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt)\.(?:\w+\.)*f(?:32|64))\b"
    ptx = dump("-ptx")
    if "target sm_" not in ptx:
        pytest.skip("the extension is built without PTX")
    entries = re.split(r"\.entry ", ptx)
    assert any(FOLD in entry for entry in entries)
    others = [entry for entry in entries if FOLD not in entry.partition("(")[0]]
    found = set(re.findall(pattern, "".join(others)))
    assert found == {
        *(f"{op}.rn.{t}" for op in ("add", "sub", "mul", "div", "sqrt") for t in ("f32", "f64")),
        "fma.rn.f32",
        "rcp.rn.f64",  # 1/scale, in the norm's kernel
    }


def test_products_that_are_fused_are_exact():
    sources = (path.read_text() for path in CSRC.rglob("*") if path.is_file())
    factors = [
        found for text in sources for found in re.findall(r"fmaf?(?:_rn)?\(\w+, (\S+),", text)
    ]
    assert sorted(factors) == sorted(EXACT)


def test_nothing_is_fused_but_division_and_square_root(sass):
    # These are made of fused operations, and begin with an approximation (MUFU).
    plain = {key for key, ops in sass.items() if not any("MUFU" in op for op in ops)}
    assert plain
    for key, part in disassembled().items():
        if key in plain:
            fused = re.findall(r"\b(?:FFMA|DFMA)\S* .*;", part)
            assert not [op for op in fused if not any(f in op for f in EXACT.values())], key


def test_cuda_sources_do_not_need_torch():
    sources = [path for path in (CSRC / "cuda").iterdir() if path.suffix in (".cu", ".cuh")]
    assert sources
    for path in (*sources, CSRC / "cuda/launch.h"):
        assert not re.search(r"#include <(torch|ATen|c10|pybind11)/", path.read_text()), path
