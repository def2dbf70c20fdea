"""The scripts in examples/, which docs/examples.md shows, run and reach a result worth showing."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchrun import run_two

pytest.importorskip("sklearn")

FOLDER = Path(__file__).parents[1] / "examples"
CHANCE = 0.1  # of guessing a digit


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def strictly():
    """One thread, because networks are small, and no warning at all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_num_threads(threads)


def test_supervised_ends_with_an_average_that_is_better():
    found = load("supervised").main(epochs=5)
    assert found["average"] > 0.95
    assert found["average"] > found["weights"]


def test_byol_learns_features_that_noise_does_not_change():
    found = load("byol").main(epochs=5)
    assert found["byol"] > found["random"] + 0.15


@pytest.mark.parametrize("kappa", [1, 4])
def test_dino_finds_the_digits(kappa):
    found = load("dino").main(epochs=10, kappa=kappa)
    assert found["dino"] > found["random"] + 0.3


def test_pseudo_labels_are_better_than_labels_alone():
    main = load("pseudo_labels").main
    found, alone = (main(steps=600, weight=weight)["teacher"] for weight in (1.0, 0.0))
    assert found > alone + 0.03
    assert alone > 5 * CHANCE


def test_diffusion_samples_digits():
    found = load("diffusion").main(steps=1000)
    assert found["average"] < found["weights"]
    assert found["samples to train"] < 1.6 * found["test to train"]


def test_fsdp2_trains_in_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_two(str(FOLDER / "fsdp2.py"))
    saved = torch.load(tmp_path / "ema.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        **{"0.weight": (128, 64), "0.bias": (128,)},
        **{"2.weight": (10, 128), "2.bias": (10,)},
    }


def test_the_page_shows_every_example():
    """Those of the frameworks are on their pages, with their tests."""
    page = (FOLDER.parent / "docs" / "examples.md").read_text()
    shown = re.findall(r'--8<-- "examples/(\w+)\.py"', page)
    stems = {path.stem for path in FOLDER.glob("*.py")}
    assert sorted(shown) == sorted(stem for stem in stems if not stem.startswith("train_"))
