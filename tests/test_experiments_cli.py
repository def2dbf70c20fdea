"""The experiments' command line: help, presets, errors before any training, the run's folder."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("jiwer", "matplotlib", "scipy", "sklearn", "timm", "torchvision", "tqdm"):
    pytest.importorskip(module)

from fused_ema.experiments import __main__ as command  # noqa: E402
from fused_ema.experiments import plots  # noqa: E402
from fused_ema.experiments.config import chosen, number, text_of  # noqa: E402
from fused_ema.experiments.folder import Folder  # noqa: E402
from fused_ema.experiments.recipe import Recipe  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs" / "experiments"


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        command.main([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", command.NAMES)
def test_help_explains_every_option(name, capsys):
    text = "".join(help_of(capsys, name).split())
    presets = command.experiment(name).PRESETS
    assert set(presets) == ({"quick"} if name == "speech" else set(command.PRESETS))
    fields = dataclasses.fields(next(iter(presets.values())))
    for field in fields:
        assert f"--{field.name.replace('_', '-')}" in text
        assert "".join(field.metadata["help"].split()) in text
    assert len(fields) > 5
    assert "--outDIR" in text
    assert "--preset{quick,cifar10,paper}" in text


def test_help_tells_the_value_of_each_preset(capsys):
    text = "".join(help_of(capsys, "polyak").split())
    assert "[quick:resnet-digits,cifar10:resnet18,paper:resnetv2_50]" in text


def test_help_lists_the_experiments(capsys):
    listed = re.findall(r"^    (\w+)", help_of(capsys), flags=re.MULTILINE)
    assert [name for name in (*command.NAMES, "all") if name not in listed] == []


def test_a_module_runs_itself():
    done = subprocess.run(
        [sys.executable, "-m", "fused_ema.experiments.noisy_parabola", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: python -m fused_ema.experiments noisy_parabola" in done.stdout


def test_options_take_the_place_of_the_presets():
    options = command.parser().parse_args(
        ["byol", "--preset", "cifar10", "--kappas", "1,8,1/2", "--train-size", "none",
         "--small-images", "no", "--rho", "0.9"]
    )  # fmt: skip
    presets = command.experiment("byol").PRESETS
    found = chosen(presets, options.preset, vars(options))
    assert found == dataclasses.replace(
        presets["cifar10"], kappas=(1.0, 8.0, 0.5), small_images=False, rho=0.9
    )


@pytest.mark.parametrize("name", command.NAMES)
def test_a_dry_run_tells_and_writes_nothing(name, tmp_path, capsys):
    assert command.main([name, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out.startswith(name)


def test_a_dry_run_tells_what_kappa_does(tmp_path, capsys):
    options = ["--kappas", "1,8", "--per-device-batch", "16", "--seeds", "2", "--rho", "0.99"]
    command.main(["byol", "--dry-run", "--out", str(tmp_path / "out"), *options])
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    runs = {cells[0]: cells[1:] for cells in lines if cells[0].startswith("SGD")}
    quick = command.experiment("byol").PRESETS["quick"]
    batch = 8 * quick.base_batch
    found = runs["SGD, kappa 8"]
    assert found[:3] == ["0", str(batch), "8"]
    assert [float(x) for x in found[3:5]] == pytest.approx([0.99**8, 8 * quick.lr], rel=1e-4)
    steps = quick.train_size * quick.epochs // batch
    assert found[5:8] == ["16", str(batch // 16), str(steps)]
    assert runs["SGD, kappa 8, rho left alone"][3] == "0.99"
    assert 0.0 < float(found[8]) < 1.0


def test_activations_are_counted_without_computing():
    """A linear layer keeps its input, and ReLU its output."""
    import torch
    from torch import nn

    from fused_ema.experiments.dry_run import activation_bytes

    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 2))
    torch.manual_seed(0)
    # the images and ReLU's output, which the linear layer keeps too
    assert activation_bytes(model, 2, {4: 1}) == 4 * (2 * 3 * 16 + 2 * 5 * 16)


def test_values_are_written_as_they_are_read():
    assert text_of((0.25, 1.0, 32.0)) == "0.25,1,32"
    assert number("1/4") == 0.25
    assert (text_of(True), text_of(None), text_of(())) == ("yes", "none", "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["polyak", "--train-size", "1000"], "1000 training images are too few for batches of"),
        (["polyak", "--train-size", "5000"], "train_size=5000 is out of range; allowed: 1 to 1796"),
        (["polyak", "--kappas", "1,1/3"], "0.333333 x base_batch=32 is 10.6667; allowed: whole"),
        (["polyak", "--kappas", "2,4"], "lacks 1, which the others are compared with"),
        (["polyak", "--optimizers", "Adam"], "optimizers=('Adam',); allowed: SGD, AdamW"),
        (["polyak", "--per-device-batch", "24"], "which per_device_batch=24 does not divide"),
        (["polyak", "--epochs", "0"], "epochs=0 is out of range; allowed: above 0"),
        (["polyak", "--model", "resnet-9999"], "model='resnet-9999' is none of timm's"),
        (["byol", "--data", "folder"], "data_root=none with data=folder"),
        (["byol", "--data", "folder", "--data-root", "/none"], "there is no folder train"),
        (["progressive", "--tasks", "dino"], "tasks=('dino',); allowed: polyak, byol"),
        (["dino", "--rules", "all"], "rules=('all',); allowed: both, rho, centre, none"),
        (["speech", "--labelled", "99"], "labelled=99 is out of range; allowed: 1 to 45"),
        (["speech", "--preset", "paper"], "preset='paper': speech has none; allowed: quick"),
        (["progressive", "--switch-epochs", "99"], "switch_epochs=(99,) with epochs="),
        (["noisy_parabola", "--base-steps", "100"], "allowed: at least one step at each kappa"),
    ],
)
def test_bad_values_are_told_before_training(arguments, message, tmp_path):
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--out", str(tmp_path / "out")])
    assert re.search(re.escape(message), str(stop.value.code)), stop.value.code
    assert not (tmp_path / "out").exists()


@dataclasses.dataclass(frozen=True)
class Other(Recipe):
    """A config to keep a folder for."""


def test_a_folder_is_gone_on_with_only_by_the_same_options(tmp_path):
    Folder(tmp_path / "run", "polyak", Other()).begin()
    Folder(tmp_path / "run", "polyak", Other(workers=3, device="cpu"))
    with pytest.raises(ValueError, match=r"it holds a run with lr=0.1, not 0.2; give another"):
        Folder(tmp_path / "run", "polyak", Other(lr=0.2))
    with pytest.raises(ValueError, match="it holds a run with experiment='polyak', not 'byol'"):
        Folder(tmp_path / "run", "byol", Other())


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"it is not empty and holds no config.json of a run"):
        Folder(tmp_path, "polyak", Other())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_rows_are_on_disk_at_once_and_numbers_stay_numbers(tmp_path):
    folder = Folder(tmp_path, "polyak", Other())
    folder.begin()
    folder.log({"loss": 0.1 + 0.2, "worse": float("nan")})
    assert folder.rows() == [{"loss": 0.1 + 0.2, "worse": None}]
    folder.log({"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"loss": 2')  # a process that was killed
    assert len(folder.rows()) == 2
    folder.begin(1)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        json.dumps({"loss": 0.1 + 0.2, "worse": None}) + "\n"
    )


def test_a_damaged_checkpoint_is_told(tmp_path):
    folder = Folder(tmp_path, "polyak", Other())
    folder.begin()
    folder.save_checkpoint({"run": "SGD"})
    assert folder.checkpoint() == {"run": "SGD", "rows": 0}
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for damaged in (b"", whole[:100], b"no checkpoint"):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint.pt cannot be read; delete it"):
            folder.checkpoint()


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCS.glob("*.json")))
def test_figures_of_the_docs_are_drawn_from_their_data(name, tmp_path):
    data = json.loads((DOCS / f"{name}.json").read_text())
    plots.draw(data, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.count('<g id="axes_') >= 2
    assert (DOCS / f"{name}.png").stat().st_size < 150_000


def test_names_the_extra_when_a_module_is_missing():
    with pytest.raises(SystemExit, match=r"no_such: pip install 'fused_ema\[experiments\]'"):
        command.require("torch", "no_such")
