"""What is run on a GPU machine (bench/gpu.sh): its limits, its plan, and some of it on a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch

from bench import report, run, tune, variants
from bench.cases import Case
from bench.gpu import calls, parts
from bench.gpu.__main__ import main as gpu_main
from bench.gpu.calls import TOTAL, Place
from bench.gpu.parts import Part, Session
from bench.rows import Results
from bench.variant import EMA_WEIGHT, SCALARS, Bucket, Variant
from fused_ema import _native

# What a fixture makes once is made in one worker.
pytestmark = pytest.mark.xdist_group("gpu day")

ROOT = Path(__file__).parents[1]
MOST_FILES = 8  # that a machine gives back
POLITE = "trap 'echo told; exit 130' INT; echo begun; while :; do sleep 0.1; done"
# Nor does its child end by itself.
STUBBORN = "trap '' INT; sleep 600 & echo child $!; while :; do sleep 0.1; done"


def part(name: str, script: str, limit: float = 60.0, **flags) -> Part:
    return Part(name, limit, f"{name}.log", ("bash", "-c", script), **flags)


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "KILL_AFTER", 0.5)
    monkeypatch.setattr(parts, "LEAST", 0.5)
    return Session(tmp_path, "summary.txt", 300.0, os.environ)


def summary(session: Session) -> list[str]:
    """Without the times."""
    lines = (session._out / "summary.txt").read_text().splitlines()
    return [line.partition(" s  ")[2] for line in lines]


def child_in(log: Path) -> int | None:
    """The process that a part says it has started."""
    found = re.search(r"^child (\d+)$", log.read_text(), re.MULTILINE)
    return int(found[1]) if found else None


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition) -> bool:
    """The system takes a moment to end what is killed."""
    end = monotonic() + 10.0
    while not condition() and monotonic() < end:
        sleep(0.05)
    return condition()


def test_a_part_that_fails_or_hangs_keeps_no_other_from_running(session):
    fails = part("fails", "echo what went on; exit 3", needed=True)
    hangs, stubborn = part("hangs", POLITE, 1.0), part("stubborn", STUBBORN, 1.0)
    leaves = part("leaves", "sleep 600 & echo child $!")
    later = part("later", "echo ours 1 ms; echo theirs 2 ms", show="^ours")
    assert not session.run(fails)
    assert session.run(hangs, stubborn)
    assert session.run(leaves, later, part("absent", "", skip="it is not here"))
    assert session.end() == 1
    assert sorted(session.failed) == ["fails", "hangs", "stubborn"]
    lines = summary(session)
    assert lines[0].startswith("fails: FAILED, exit status 3")
    assert lines[1] == "  | what went on"
    assert any(line.startswith("hangs: FAILED, stopped by SIGINT after 1 s") for line in lines)
    assert any(line.startswith("stubborn: FAILED, stopped by SIGINT and SIGKILL") for line in lines)
    assert "  | begun" in lines
    assert "  | told" in lines
    assert "absent: skipped, it is not here" in lines
    assert "  ours 1 ms" in lines
    assert "  theirs 2 ms" not in lines
    assert lines[-1].startswith("FAILED: fails, ")
    for name in ("stubborn", "leaves"):
        child = child_in(session._out / f"{name}.log")
        assert wait_until(lambda child=child: not is_alive(child)), name


def test_a_part_has_its_time_to_end_also_where_the_session_was_late(session, monkeypatch):
    monkeypatch.setattr(parts, "sleep", lambda _: sleep(1.0))  # beyond the limit and KILL_AFTER
    session.run(part("late", POLITE, 0.1))
    assert summary(session)[0].startswith("late: FAILED, stopped by SIGINT after 0 s")
    assert "  | told" in summary(session)


def test_a_session_that_is_told_to_end_leaves_nothing_running(session, monkeypatch):
    log = session._out / "hangs.log"

    def told(seconds):
        sleep(seconds)
        if child_in(log):
            raise SystemExit(143)

    monkeypatch.setattr(parts, "sleep", told)
    with pytest.raises(SystemExit):
        session.run(part("hangs", STUBBORN))
    assert session.failed == ["hangs"]
    assert wait_until(lambda: not is_alive(child_in(log)))


def test_what_comes_after_the_time_is_not_begun(tmp_path):
    session = Session(tmp_path, "summary.txt", parts.KILL_AFTER + parts.LEAST - 1.0, os.environ)
    assert session.run(part("late", "exit 3"))
    assert session.end() == 1
    assert summary(session) == ["late: FAILED, no time left", "FAILED: late"]
    assert not (tmp_path / "late.log").exists()


def test_a_part_gets_no_more_than_what_is_left(session):
    session._seconds = session.elapsed + 0.5 + 1.0
    session.run(part("long", POLITE))
    assert summary(session)[0].startswith("long: FAILED, stopped by SIGINT after 1 s")


def test_an_interrupt_reaches_parts_of_a_session_in_the_background(tmp_path):
    """A shell lets those ignore SIGINT, which their children would inherit."""
    code = f"""
import os, signal
from pathlib import Path
from bench.gpu import parts
signal.signal(signal.SIGINT, signal.SIG_IGN)
session = parts.Session(Path({str(tmp_path)!r}), "summary.txt", 300.0, os.environ)
session.run(parts.Part("hangs", 1.0, "log", ("bash", "-c", {POLITE!r})))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert "stopped by SIGINT after" in (tmp_path / "summary.txt").read_text()


def test_a_file_that_is_too_long_loses_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MOST_BYTES", 10)
    path = tmp_path / "log"
    path.write_text("begin" + "middle" * 100 + "ended")
    parts.trim(path)
    assert path.read_text() == "begin\n[...]\nended"


def place(call: str, device: str, out: Path) -> Place:
    return Place(
        call, device, out / "environment", "9.0", out, out / "results.csv", out / "variants"
    )


def planned(call: str, device: str, out: Path) -> list[Part]:
    return [part for together in calls.parts(place(call, device, out)) for part in together]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("call", TOTAL)
def test_the_plan_can_be_run(call, device, tmp_path):
    chosen = planned(call, device, tmp_path)
    names = [part.name for part in chosen]
    assert len(set(names)) == len(names)
    assert chosen[0].needed
    for part in chosen:
        assert part.limit <= TOTAL[call]
        module, *arguments = part.command[part.command.index("-m") + 1 :]
        assert find_spec(module) is not None, module
        if module == "bench.run":
            args = run.arguments(arguments)
            assert run.items(args), part.name
            assert args.device == device
            assert args.seconds < part.limit
        if module == "pytest":
            assert all((ROOT / name).exists() for name in arguments if name.startswith("tests/"))


@pytest.mark.parametrize("call", TOTAL)
def test_no_more_files_than_come_back(call, tmp_path):
    chosen = planned(call, "cuda", tmp_path)
    written = {
        argument for part in chosen for argument in part.command if str(tmp_path) in argument
    }
    files = {Path(name).name for name in written if name.endswith(".csv")}
    assert {"results.csv", f"{call}-tune.csv"} <= files
    assert len(files | {part.log for part in chosen} | {f"{call}-summary.txt"}) <= MOST_FILES


def test_a_part_that_there_is_not_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no part is called headlines: there are versions, "):
        gpu_main(["first", str(tmp_path), "--device", "cpu", "--without", "headlines"])


def test_parts_side_by_side_share_no_log(tmp_path):
    for call in TOTAL:
        for together in calls.parts(place(call, "cuda", tmp_path)):
            assert len({part.log for part in together}) == len(together)


def test_profiled_kernels_go_by_their_names():
    cuda = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    kernels = re.findall(r"__global__[^;{]*?(\w+)\(const __grid_constant__", cuda)
    triton = re.findall(r"^def (\w+)\(", (ROOT / "kernels" / "step.py").read_text(), re.MULTILINE)
    for pattern, names in (
        (calls.STEP, kernels),
        (calls.NORM, kernels),
        (calls.TRITON_STEP, triton),
    ):
        assert [name for name in names if re.search(pattern, name)], pattern


def test_every_variant_names_constants_that_there_are():
    assert variants.unknown_macros() == []
    for kind in variants.KINDS.values():
        assert kind[variants.BASE] == {}


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    if b"__asan_init" in Path(_native.__file__).read_bytes():
        pytest.skip("the libraries are not sanitized")
    folder = tmp_path_factory.mktemp("variants")
    variants.main([str(folder), "--shim", "--kinds", "singles"])
    return folder / "singles"


def test_a_variant_makes_the_step_that_its_scalars_say(shim):
    bucket = Bucket(Case("some", ((7, 3), (1,), (5000,), (0,))), torch.device("cpu"))
    param, grad, first, second, ema = (array.clone() for array in bucket.arrays)
    variant = Variant(shim / "base.so")
    variant.step(bucket)
    torch.testing.assert_close(bucket.arrays[1], grad, rtol=0, atol=0)
    first.lerp_(grad, SCALARS["weight1"])
    second.lerp_(grad.square(), SCALARS["weight2"])
    change = SCALARS["step_size"] * first / (second.sqrt() + SCALARS["eps"])
    param -= change + SCALARS["decay"] * param
    ema.lerp_(param, EMA_WEIGHT)
    filled = torch.zeros(len(param), dtype=torch.bool)  # else what aligns the tensors
    for start, size in zip(bucket._offsets, bucket._sizes, strict=False):
        filled[start : start + size] = True
    for found, wanted in zip(bucket.arrays, (param, grad, first, second, ema), strict=True):
        torch.testing.assert_close(found[filled], wanted[filled])


def test_tuning_finds_a_variant_with_other_bits(shim, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "ORDER", ("resnet18",))
    arguments = [str(shim), "--device", "cpu", "--shrink", "5000", "--out", str(tmp_path / "t.csv")]
    assert tune.main(arguments) == 0
    assert "OTHER BITS" not in capsys.readouterr().out
    step = Variant.step

    def wrong(self, bucket):
        step(self, bucket)
        if self.name == "chunk_8k":
            bucket.arrays[-1][0] += 1.0

    monkeypatch.setattr(Variant, "step", wrong)
    assert tune.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["chunk_8k" in line for line in lines if "OTHER BITS" in line] == [True]


def test_a_call_on_the_cpu_leaves_what_the_report_is_made_of(tmp_path):
    if b"__asan_init" in Path(_native.__file__).read_bytes():
        pytest.skip("its processes would not load the sanitizer's runtime")
    chosen = ["versions", "variants", "tune-singles", "chain", "ncu"]
    command = ["bash", "bench/gpu.sh", "first", str(tmp_path), "--parts", *chosen]
    command += ["--patience", "20"]  # other tests run at the same time
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in chosen:
        assert f"{name}: passed" in done.stdout
    assert len(list(tmp_path.iterdir())) <= MOST_FILES
    results = replace(Results.read(tmp_path / "cpu.csv"), name="some-gpu")
    assert {row.scenario for row in results.rows if row.median_ms} == {"clip", "chain"}
    assert "## some-gpu" in report.page([results])
    assert "base" in (tmp_path / "first-tune.csv").read_text()
