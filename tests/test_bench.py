"""The benchmarks' harness: all that is timed is right, and counts are what they should be."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bench.graphs
from bench import cases, providers, record, run, theirs, train
from bench.cases import Case
from bench.check import Checker
from bench.data import Data
from bench.device import Cpu
from bench.harness import LEAST_ROUNDS, Settings, measure, memory_groups
from bench.provider import NotOfferedError, Provider
from bench.rows import Results
from bench.spec import BF16, EMA, LR, OPTIMIZERS, SCENARIOS, STEP
from bench.theirs import Averaging, averaging_alone
from fused_ema.step.backends import native

ADAMW = OPTIMIZERS["adamw"]
CPU = Cpu()
SMALL = Case("small", ((3, 5), (257,), (), (64, 9), (1, 31), (2048,)), num_groups=3)
ON_CPU = [scenario for scenario in SCENARIOS.values() if not scenario.graphed]
LATER = theirs.compiled()  # compiling takes longer than all other tests


def checker(scenario, optimizer="adamw", case=SMALL):
    own = replace(OPTIMIZERS[optimizer], scenario=scenario)
    return Checker(own, Data.draw(case, scenario.dtype, CPU, seed=0), CPU)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda scenario: scenario.name)
def test_every_provider_makes_the_same_step(scenario, optimizer):
    checked = checker(scenario, optimizer)
    chosen = [p for p in providers.providers(scenario, SMALL, "cpu") if p.name != LATER.name]
    verdicts = {provider.name: checked.check(provider) for provider in chosen}
    assert not {name: v.error for name, v in verdicts.items() if v.error}
    left_out = {name for name, v in verdicts.items() if v.left_out}
    if scenario.graphed:
        assert left_out == {p.name for p in chosen if not p.bound}
        return
    if scenario is EMA:
        assert left_out == set()
    elif OPTIMIZERS[optimizer].num_measured:
        others = {p.name for p in providers.STEPS if not p.name.startswith(providers.FOR_LOOP[0])}
        assert left_out == others - {LATER.name}
    else:
        needs_adamw = set() if optimizer == "adamw" else {"optimi + lerp"}
        assert left_out == {"flashoptim + lerp"} | needs_adamw


def test_the_check_finds_an_error_of_a_thousandth(monkeypatch):
    checked = checker(STEP)
    assert checked.check(providers.PEER).is_right
    monkeypatch.setattr(type(checked.spec), "make_torch", with_lr_times(1.001))
    assert "wrong weights" in checked.check(providers.PEER).error


def with_lr_times(factor):
    def make(self, groups, **flags):
        own = [{"params": g.params, **self.scaled(factor * LR * g.lr_factor)} for g in groups]
        return self.torch(own, **flags)

    return make


@pytest.mark.parametrize("scenario", ON_CPU, ids=lambda scenario: scenario.name)
def test_averages_that_move_too_little_get_no_time(scenario):
    """By 2 % of the way, in 16 bits, too, where each element is off by less than its rounding."""
    wide = Case("wide", ((50_000,),))

    def slower(weights, decay):
        return theirs.TIMM.make(weights, 1.0 - 0.98 * (1.0 - decay))

    wrong = Averaging("slower", slower)
    checked = checker(scenario, case=wide)
    kinds = [(theirs.TIMM, True), (wrong, False)]
    for averaging, is_right in kinds:
        provider = averaging_alone(averaging)
        if scenario.rule:
            provider = theirs.theirs(*providers.FUSED, averaging)
        assert checked.check(provider).is_right == is_right, averaging.name


def test_what_a_provider_leaves_out_or_fails_on_is_its_row():
    def refuse(groups, spec):
        raise NotOfferedError("there is no such thing")

    def fail(groups, spec):
        raise ValueError("bad luck\nand more")

    checked = checker(STEP)
    assert checked.check(Provider("none", refuse)).reason == "left out, there is no such thing"
    verdict = checked.check(Provider("broken", fail))
    assert (verdict.left_out, verdict.error) == (None, "ValueError: bad luck")
    results = measure(SMALL, checked.spec, [Provider("broken", fail)], CPU, Settings(rounds=1))
    row = record.result_row(results[0])
    assert row["error"] == "ValueError: bad luck"
    assert "median_ms" not in row


def test_a_backend_that_cannot_is_left_out_with_its_reason(monkeypatch):
    checked = checker(BF16)
    monkeypatch.setattr(native, "unsupported", lambda bucket: "it is Monday")
    assert "native: it is Monday" in checked.check(providers.NATIVE).left_out


def test_bytes_are_those_of_the_arrays():
    counted = {name: replace(ADAMW, scenario=s).bytes_per_param for name, s in SCENARIOS.items()}
    # p, g, m, v, ema read; all but g written: 9 arrays of 4 bytes. Clipping reads g twice. Each
    # further average is read and written. bf16: master, m, v of 4 bytes, p, g, ema of 2.
    assert counted == {
        "step": 36, "clip": 40, "chain": 40, "three_emas": 52, "bf16": 32, "ema": 12,
        "graph": 36, "clip_graph": 40,
    }  # fmt: skip
    assert OPTIMIZERS["sgd"].bytes_per_param == 28
    # and what norms are taken of: p, g; p, g, m, v
    assert OPTIMIZERS["lars"].bytes_per_param == 28 + 8
    assert OPTIMIZERS["lamb"].bytes_per_param == 36 + 16


def test_shapes_are_those_of_timm():
    pytest.importorskip("timm")
    found = {name: cases.timm_shapes(model) for name, model in cases.MODELS.items()}
    assert cases.kept_shapes() == found


def test_a_deadline_leaves_the_least_rounds():
    few = Settings(seconds=0.0, warmup_seconds=0.0, round_seconds=0.0)
    (result,) = measure(SMALL, ADAMW, [providers.NATIVE], CPU, few)
    assert len(result.seconds) == LEAST_ROUNDS


def test_providers_that_do_not_fit_in_memory_together_run_in_groups():
    array = 4 * SMALL.numel
    groups = list(memory_groups(providers.STEPS, (providers.NATIVE,), SMALL, ADAMW, 30 * array))
    assert [provider for group in groups for provider in group[1:]] == list(providers.STEPS)
    assert all(group[0] is providers.NATIVE for group in groups)
    assert {len(group) for group in groups[:-1]} == {5}  # 7 arrays shared, 4 of each


@pytest.fixture
def quick(monkeypatch):
    """One small case, and nothing compiled."""
    monkeypatch.setitem(cases.CASES, "resnet18", replace(SMALL, name="resnet18"))
    monkeypatch.setattr(theirs, "MOST_COMPILED", 0)


def test_run_writes_a_row_for_every_provider_and_scenario(quick, tmp_path, capsys):
    chosen = ["--cases", "resnet18", "--scenarios", "step", "ema", "--rounds", "1"]
    assert run.main([*chosen, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "step + EMA, 36 B a parameter" in text
    assert "no time for flashoptim + lerp on resnet18: left out, its fused step needs" in text
    (path,) = tmp_path.glob("cpu-*.csv")
    rows = Results.read(path).rows
    for scenario in (STEP, EMA):
        expected = [p.name for p in providers.providers(scenario, SMALL, "cpu")]
        assert [row.provider for row in rows if row.scenario == scenario.name] == expected
    assert all(row.median_ms or row.error for row in rows)


def test_run_times_the_providers_that_are_named(quick, tmp_path):
    names = [providers.NATIVE.name, providers.PEER.name]
    chosen = ["--cases", "resnet18", "--scenarios", "step", "--rounds", "1", "--providers", *names]
    assert run.main([*chosen, "--out", str(tmp_path / "some.csv")]) == 0
    rows = Results.read(tmp_path / "some.csv").rows
    assert [row.provider for row in rows] == [*names, "stream (bound)"]
    with pytest.raises(SystemExit):
        run.arguments(["--providers", "nobody"])


def test_a_table_measured_anew_takes_the_old_ones_place(quick, tmp_path):
    path = tmp_path / "some.csv"
    chosen = ["--rounds", "1", "--out", str(path), "--cases", "resnet18", "--providers"]
    both = [providers.NATIVE.name, providers.PEER.name]
    assert run.main([*chosen, *both, "--scenarios", "step", "ema"]) == 0
    before = record.read(path)
    assert run.main([*chosen, both[0], "--scenarios", "step", "clip", "--add"]) == 0
    found = [(row["scenario"], row["provider"]) for row in record.read(path)]
    bound = "stream (bound)"
    assert found == [
        ("step", both[0]), ("step", bound),
        ("ema", both[0]), ("ema", bound),
        ("clip", both[0]), ("clip", bound),
    ]  # fmt: skip
    kept = [row for row in record.read(path) if row["scenario"] == "ema"]
    assert kept == [row for row in before if row["scenario"] == "ema"]


def test_shrunk_cases_keep_their_tensors():
    for case in cases.CASES.values():
        small = cases.shrunk(case, 100)
        assert len(small.shapes) == len(case.shapes)
        assert small.group_ends == case.group_ends
        assert len(case.shapes) <= small.numel <= max(len(case.shapes) * 100, case.numel // 10)


class FakeGraphs:
    """torch.cuda's graphs: what is captured runs when it is replayed, not before."""

    def __init__(self, ran):
        self.ran = ran
        self.captured = None

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.ran.extend(self.captured))

    @contextmanager
    def graph(self, graph):
        before = list(self.ran)
        yield
        self.captured = self.ran[len(before) :]
        self.ran[:] = before

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return nullcontext()


def test_a_graphed_step_is_carried_out_once_a_call(monkeypatch):
    ran = []
    monkeypatch.setattr(bench.graphs.torch, "cuda", FakeGraphs(ran))
    step = bench.graphs.Graphed(lambda: ran.append("step"), torch.device("cuda"))
    for count in range(1, 5):
        step()
        assert len(ran) == count


def test_run_says_what_it_had_no_time_for(quick, capsys):
    assert run.main(["--cases", "resnet18", "--scenarios", "ema", "--seconds", "0"]) == 1
    assert "no time left for resnet18, ema with adamw" in capsys.readouterr().out


def test_default_tables_cover_every_scenario_on_both_devices():
    for device in ("cpu", "cuda"):
        names = [item.name for item in run.items(run.arguments(["--device", device]))]
        for scenario in [s.name for s in SCENARIOS.values() if device == "cuda" or not s.graphed]:
            assert f"resnet18, {scenario} with adamw" in names
        assert len([name for name in names if name.startswith(("host", "training"))]) == 2


def test_training_steps_by_every_right_provider(quick, monkeypatch):
    def create_model(_):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, train.CLASSES))

    monkeypatch.setattr(train, "library", lambda _: SimpleNamespace(create_model=create_model))
    found = train.measure_training(["resnet18"], ADAMW, CPU, Settings(rounds=2))
    assert [result.provider for result in found] == list(providers.TRAINERS)
    for result in found:
        assert len(result.steps) == len(result.passes) == len(result.against_ours) == 2
        assert 0.0 < result.share < 1.0
        assert record.training_row(result)["batch"] == train.BATCHES["cpu"]["resnet18"]


def test_training_without_timm_is_left_out(quick, monkeypatch):
    def missing(name):
        raise NotOfferedError(f"{name} cannot be imported")

    monkeypatch.setattr(train, "library", missing)
    found = train.measure_training(["resnet18"], ADAMW, CPU, Settings(rounds=1))
    assert {result.verdict.reason for result in found} == {"left out, timm cannot be imported"}


def test_parameters_that_are_no_copy_of_their_masters_get_no_time(monkeypatch):
    checked = checker(BF16)
    monkeypatch.setattr(theirs.Weights, "scatter", lambda self: None)
    assert "no rounded copy of its master" in checked.check(providers.PEER).error
