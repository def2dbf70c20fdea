"""The demo at its quickest: three tables, a figure, and trainings that agree."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
image = pytest.importorskip("matplotlib.image")

from fused_ema.demo import __main__ as command  # noqa: E402
from fused_ema.demo import agreement, batch_scaling, console, problem, timing  # noqa: E402

# What a fixture makes once is made in one worker.
pytestmark = pytest.mark.xdist_group("demo")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    figure = tmp_path_factory.mktemp("demo") / "figure.png"
    threads = torch.get_num_threads()
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as progress:
        status = command.main(["--quick", "--out", str(figure)])
    assert torch.get_num_threads() == threads
    return SimpleNamespace(
        status=status, printed=printed.getvalue(), progress=progress.getvalue(), figure=figure
    )


def numbers(printed, start):
    (line,) = (line.strip() for line in printed.splitlines() if line.strip().startswith(start))
    return [float(cell) for cell in line.removeprefix(start).split()[:4]]


def test_prints_three_tables(quick):
    titles = [line for line in quick.printed.splitlines() if line[:2] in ("1.", "2.", "3.")]
    assert [title.split(":")[0] for title in titles] == [
        "1. Agreement",
        "2. Batch scaling",
        "3. Timing",
    ]
    assert sum(set(line) == {"-", " "} for line in quick.printed.splitlines()) == 3
    for average in batch_scaling.AVERAGES:
        assert quick.printed.count(f"  {average}  ") == len(batch_scaling.KAPPAS) - 1
    for path in (*timing.PATHS, timing.OURS):
        assert quick.printed.count(f"  {path}  ") == 2


def test_agreement_is_within_the_printed_budget(quick):
    assert quick.status == 0
    found = numbers(quick.printed, "FusedScaledAdamW - torch")
    budget = numbers(quick.printed, "rounding budget")
    assert len(found) == len(budget) == 4
    assert all(0 <= value <= allowed for value, allowed in zip(found, budget, strict=True))
    # such a budget can tell the two optimizers from different ones
    assert max(budget) < 1e-4


def test_writes_the_figure(quick):
    height, width, _ = image.imread(quick.figure).shape
    assert width > height > 400


def test_shows_progress_in_lines(quick):
    assert "\r" not in quick.progress
    for part in ("[1/3] Agreement", "[2/3] Batch scaling", "[3/3] Timing"):
        assert f"{part}:   0 %\n" in quick.progress
        assert f"{part}: done in" in quick.progress


def test_progress_rewrites_one_line_on_a_terminal():
    with redirect_stderr(Terminal()) as stream, console.Progress("work", 3) as progress:
        for _ in range(3):
            progress.advance(note="(here)")
    lines = stream.getvalue().split("\r\033[K")
    assert lines[1:4] == ["work:   0 %", "work:  33 % (here)", "work:  66 % (here)"]
    assert lines[4].startswith("work: done in ")
    assert stream.getvalue().count("\n") == 1


def test_budget_notices_a_wrong_optimizer():
    vector = torch.linspace(-1, 1, 101, dtype=torch.float64)
    same = agreement.Trained(vector, vector, problem.Score(0.0, 1.0))
    result = agreement.Agreement(100, ours=same, by_hand=same, float64=same)
    assert result.within_budget()
    largest, _ = result.budget(vector)
    for field in ("weights", "average"):
        off = same._replace(**{field: vector + 2 * largest})
        assert not replace(result, ours=off).within_budget()
        broken = same._replace(**{field: vector * torch.nan})
        assert not replace(result, ours=broken).within_budget()


def test_rho_left_alone_is_the_rule_at_kappa_1():
    data = problem.load_digits(command.QUICK.train_size)
    with redirect_stderr(io.StringIO()), timing.threads(1):
        curve = torch.tensor(batch_scaling.train(data, 1, 1, 0, console.Progress("", 80)))
    torch.testing.assert_close(curve[:, 0], curve[:, 1], rtol=0, atol=0)
    assert not torch.equal(curve[:, 0], curve[:, 2])


@pytest.mark.parametrize("size", [command.Size(), command.QUICK], ids=["full", "quick"])
def test_every_batch_size_divides_the_training_set(size):
    spacing = batch_scaling.SAMPLES_BETWEEN_SCORES
    for kappa in batch_scaling.KAPPAS:
        assert spacing % (kappa * batch_scaling.BASE_BATCH) == 0
    assert size.train_size % spacing == 0
    assert size.train_size % agreement.BATCH == 0


def test_every_batch_size_sees_the_same_samples():
    data = problem.load_digits(64)
    small, large = (
        torch.cat([images for images, _ in problem.minibatches(data, batch, 2, 0)])
        for batch in (8, 32)
    )
    assert torch.equal(small, large)
    assert len(small) == 128
    with pytest.raises(ValueError, match="batch=48 does not divide the 64 training images"):
        next(problem.minibatches(data, 48, 1, 0))


def test_resnet18_shapes():
    shapes = timing.resnet18_shapes()
    assert len(shapes) == 62
    assert sum(torch.Size(shape).numel() for shape in shapes) == 11_173_962


def test_knows_when_other_processes_take_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    few = timing.Timing("", threads=1, others=0.5, tensors=0, parameters=0, seconds={})
    assert not few.crowded()
    assert replace(few, threads=2).crowded()
    assert timing.others_cpu_seconds() >= 0


def test_table_is_aligned():
    assert console.table("<>", ["a", "bb"], [["long", "1"], ["x", "234"]]).splitlines() == [
        "   a      bb",
        "   ----  ---",
        "   long    1",
        "   x     234",
    ]


def test_without_times_there_are_two_parts(tmp_path, capsys):
    out = tmp_path / "figure.png"
    assert command.main(["--quick", "--no-timing", "--out", str(out)]) == 0
    assert "3. Timing" not in capsys.readouterr().out
    height, width, _ = image.imread(out).shape
    assert (width, height) == (1140, 600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "0 is out of range; allowed: 1 or more"),
        (["--out", "figure.txt"], "allowed endings are .png, .pdf and .svg"),
        (["--out", "no/such/folder/figure.png"], "there is no folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_names_the_extra_when_a_module_is_missing():
    with pytest.raises(SystemExit, match=r"needs no_such_module: pip install 'fused_ema\[demo\]'"):
        command.require("torch", "no_such_module")
