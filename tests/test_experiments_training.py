"""Trainings of the experiments on tiny data: every preset's path, resume, parity of backends."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import one_thread  # noqa: F401
from torchrun import run_two

for module in ("jiwer", "matplotlib", "sklearn", "timm", "torchvision", "tqdm"):
    pytest.importorskip(module)
Image = pytest.importorskip("PIL.Image")

from fused_ema.experiments import __main__ as command  # noqa: E402
from fused_ema.experiments import (  # noqa: E402
    batchnorm,
    byol,
    data,
    dino,
    distributed,
    polyak,
    progressive,
    speech,
    training,
)
from fused_ema.experiments.distributed import Group  # noqa: E402
from fused_ema.experiments.folder import Folder  # noqa: E402

IMAGES = {"polyak": polyak, "byol": byol, "dino": dino, "batchnorm": batchnorm}
TASKS = {**IMAGES, "speech": speech}
# Runs of a tiny config.
RUNS = {"polyak": 4, "byol": 3, "dino": 5, "batchnorm": 3, "speech": 5}
# Few samples, all else as the preset has it.
TINY = {"train_size": 64, "base_batch": 8, "epochs": 2, "warmup_epochs": 1.0, "seeds": 1}
TINY |= {"evaluate_epochs": 1}


@pytest.fixture
def float64():
    """Networks are made in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(name, **options):
    config = {**TINY, "kappas": (1.0, 4.0), **options}
    if name == "speech":
        config["start_epoch"] = 1
    return dataclasses.replace(TASKS[name].PRESETS["quick"], **config)


def run(name, config, out):
    module = progressive if name == "progressive" else TASKS[name]
    module.run(config, Folder(out, name, config), Group())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def make_images(root: Path, sizes: dict[str, int], side: int = 40) -> Path:
    """An ImageFolder of two classes of noise, one darker than the other."""
    generator = torch.Generator().manual_seed(0)
    for part, count in sizes.items():
        for brightness, name in ((80, "dark"), (200, "light")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count // 2):
                noise = torch.randint(0, 50, (side, side, 3), generator=generator)
                pixels = (noise + brightness).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 32, "test": 8})


def test_progressive(tmp_path):
    config = progressive.Config(
        train_size=64, kappas=(2.0,), switch_epochs=(1,), doubling_epochs=1, epochs=2, seeds=1
    )
    rows = run("progressive", config, tmp_path)
    assert len({row["run"] for row in rows}) == 2 * len(progressive.plans(config)) == 8
    summary = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [run["kappas"] for run in summary[:4]] == [
        {"0": 1.0}, {"0": 2.0}, {"0": 1.0, "1": 2.0}, {"0": 1.0, "1": 2.0},
    ]  # fmt: skip


def test_doubling_ends_at_the_largest_kappa():
    assert progressive.doubling(8.0, 3) == {0: 1.0, 3: 2.0, 6: 4.0, 9: 8.0}
    assert progressive.doubling(6.0, 30) == {0: 1.0, 30: 2.0, 60: 4.0, 90: 6.0}


@pytest.mark.parametrize(
    ("name", "preset", "options"),
    [
        ("polyak", "cifar10", []),
        ("byol", "cifar10", ["--hidden", "32", "--projection", "8"]),
        ("progressive", "cifar10", ["--switch-epochs", "1", "--doubling-epochs", "1"]),
        ("polyak", "paper", []),
        ("batchnorm", "paper", []),
        ("dino", "cifar10", ["--hidden", "32", "--bottleneck", "8", "--outputs", "16"]),
    ],
)
def test_presets_for_folders(name, preset, options, images, tmp_path, monkeypatch):
    """A small network stands for the preset's, all else is its own."""
    for module in IMAGES.values():
        small = dataclasses.replace(
            module.PRESETS[preset], model="resnet-digits", small_images=False,
            image_size=8, base_batch=8, warmup_epochs=0.5,
        )  # fmt: skip
        monkeypatch.setitem(module.PRESETS, preset, small)
    kappas = "2" if name == "progressive" else "1,2"
    arguments = ["--data-root", str(images), "--kappas", kappas, "--epochs", "2", "--seeds", "1"]
    arguments += ["--workers", "0", "--per-device-batch", "4", *options]
    status = command.main([name, "--preset", preset, "--out", str(tmp_path / "out"), *arguments])
    assert status == 0
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000


def test_backbones_of_the_presets():
    from fused_ema.experiments.networks import backbone

    for module, preset, features in ((polyak, "cifar10", 512), (polyak, "paper", 2048)):
        network = backbone(module.PRESETS[preset], channels=3, classes=10)
        assert network.num_features == features
    small = backbone(polyak.PRESETS["cifar10"], 3, 10)
    assert small.conv1.stride == (1, 1)
    with torch.no_grad():
        assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
        vit = backbone(byol.PRESETS["paper"], channels=3, classes=0)
    assert vit.num_features == 768


def test_paper_preset_in_two_processes(images, tmp_path):
    """torchrun with gloo: shared and accumulated batches, evaluation by both, one writer."""
    small = ["--model", "resnet-digits", "--image-size", "16", "--base-batch", "16", "--epochs"]
    small += ["2", "--kappas", "1,2", "--warmup-epochs", "1", "--hidden", "32", "--seeds", "1"]
    small += ["--projection", "8", "--per-device-batch", "4", "--workers", "0"]
    options = ["byol", "--preset", "paper", "--data-root", str(images), *small]
    out = tmp_path / "two"
    run_two("-m", "fused_ema.experiments", *options, "--out", str(out))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # one writer: three runs of two evaluations and an end
    assert len(rows) == 9
    assert {row["samples"] for row in rows if "samples" in row} == {0, 64}


LEAVES = """
import os
import torch
from fused_ema.experiments.distributed import Group, Place, processes

def waits():
    tasks = [f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task")]
    return any("gloo" in open(task).read() for task in tasks)

with processes() as group:
    place = Place(Group(world=2), torch.device("cpu"), "fp32")  # as with others
    place.wrap(torch.nn.Linear(3, 3))(torch.ones(1, 3)).sum().backward()
    assert waits()
del place
assert not waits()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' list of threads")
def test_no_thread_outlives_the_group():
    """One that communicates while Python ends aborts the process."""
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    alone |= {"MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", LEAVES]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def stop_after(monkeypatch, steps):
    """Ctrl-C in the middle of a step, as often as there are numbers."""
    seen = {"steps": 0}
    take = training.Batch.over

    def over(self, model):
        seen["steps"] += 1
        if seen["steps"] in steps:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, model)

    monkeypatch.setattr(training.Batch, "over", over)


@pytest.mark.parametrize("name", TASKS)
def test_a_stopped_run_goes_on_bit_by_bit(name, tmp_path, monkeypatch):
    """Stopped within an epoch, at its end, and in another run; results are the uninterrupted."""
    config = tiny(name)
    expected = run(name, config, tmp_path / "whole")
    kinds = {row["run"] for row in expected}
    assert len(kinds) == RUNS[name]
    for kind in kinds:
        mine = [row for row in expected if row["run"] == kind]
        assert [row.get("samples") for row in mine] == [0, 64, 128, None]
        assert mine[-1]["finished"]
    out = tmp_path / "stopped"
    # 8 steps an epoch at kappa 1, 2 at kappa 4
    stop_after(monkeypatch, (3, 8, 19))
    for position in ((0, 24), (1, 0), (1, 32)):
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
            run(name, config, out)
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        assert (state["epoch"], state["position"]) == position
    assert run(name, config, out) == expected
    assert not (out / "checkpoint.pt").exists()
    for file in ("summary.json", "figure.json"):
        assert (out / file).read_text() == (tmp_path / "whole" / file).read_text()


@pytest.mark.parametrize("name", TASKS)
def test_same_trajectory_by_native_and_reference(name, tmp_path, monkeypatch, float64):
    """Weights, averages and buffers after 6 steps in float64.

    A few roundings each, which BatchNorm over 8 samples and BYOL grow by some 1e4.
    """
    states = []
    for backend in ("native", "reference"):
        with monkeypatch.context() as patch:
            stop_after(patch, (6,))
            patch.setattr(distributed.Place, "take", in_float64)
            with pytest.raises(KeyboardInterrupt):
                run(name, tiny(name, backend=backend), tmp_path / backend)
        states.append(torch.load(tmp_path / backend / "checkpoint.pt", weights_only=True))
    native, reference = states
    assert native["position"] == 48
    for key in ("model", "optimizer"):
        mine, theirs = (
            [t for t in leaves(state[key]) if t.is_floating_point()] for state in states
        )
        assert len(mine) > 10
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    assert native["optimizer"]["param_groups"] == reference["optimizer"]["param_groups"]


def in_float64(place, tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def leaves(value):
    """The tensors in a state dict."""
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def test_images_in_files_are_augmented_by_epoch_and_index(images):
    config = dataclasses.replace(
        polyak.PRESETS["cifar10"], data_root=images, image_size=32, train_size=16
    )
    found = data.load(config, views=1).train
    (views,), classes = found.__getitems__([(5, 0), (5, 3)])
    torch.manual_seed(123)
    (again,), _ = found.__getitems__([(5, 3)])
    assert torch.equal(again[0], views[1])
    assert views.shape == (2, 3, 32, 32)
    assert not torch.equal(found.__getitems__([(6, 3)])[0][0], again)
    assert len(found) == 16
    assert set(classes.tolist()) <= {0, 1}


def test_damaged_folders_are_told(tmp_path):
    config = dataclasses.replace(polyak.PRESETS["cifar10"], data_root=tmp_path)

    def told():
        with pytest.raises(ValueError, match=r"^data_root=|jpg") as error:
            data.load(config, views=1)
        return str(error.value)

    assert "there is no folder train" in told()
    (tmp_path / "train").mkdir()
    assert "train holds no class folders" in told()
    make_images(tmp_path / "some", {"train": 4, "test": 2}, side=8)
    config = dataclasses.replace(config, data_root=tmp_path / "some")
    extra = tmp_path / "some" / "train" / "extra"
    extra.mkdir()
    assert "train/extra holds no images" in told()
    (extra / "0.jpg").write_bytes(b"")
    assert "train/extra/0.jpg is an empty file" in told()
    (extra / "0.jpg").write_bytes(b"no image")
    assert "0.jpg cannot be read as an image" in told()
    Image.new("RGB", (8, 8)).save(extra / "0.jpg")
    assert "class 'extra' is in one of train and test only" in told()


def test_more_seeds_and_kappas_go_on_in_the_same_folder(tmp_path):
    few = tiny("byol", kappas=(1.0,), seeds=1)
    rows = run("byol", few, tmp_path / "out")
    more = tiny("byol", kappas=(1.0, 4.0), seeds=2)
    found = run("byol", more, tmp_path / "out")
    assert found[: len(rows)] == rows
    ended = [row["run"] for row in found if row.get("finished")]
    assert len(ended) == len(set(ended)) == 6
    whole = run("byol", more, tmp_path / "whole")
    assert sorted(map(str, found)) == sorted(map(str, whole))
    for file in ("summary.json", "figure.json"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "whole" / file).read_text()
    other = run("byol", tiny("byol", kappas=(1.0,), seeds=1, first_seed=7), tmp_path / "out")
    assert {row["run"] for row in other} - {row["run"] for row in found} == {"SGD, kappa 1, seed 7"}
    with pytest.raises(ValueError, match="with these kappas a run sees 96 samples, and those that"):
        run("byol", tiny("byol", kappas=(1.0, 6.0), seeds=1), tmp_path / "out")


def test_a_long_epoch_is_saved_within(tmp_path, monkeypatch):
    saved = []
    save = training.Training.save
    monkeypatch.setattr(
        training.Training, "save", lambda self: (saved.append(self.position), save(self))[1]
    )
    config = tiny("polyak", kappas=(1.0,), optimizers=("SGD",), epochs=1, checkpoint_minutes=1e-9)
    run("polyak", config, tmp_path)
    assert saved == [*range(8, 64, 8), 0]


def test_scalars_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny("batchnorm", kappas=(1.0,), tensorboard=True)
    rows = run("batchnorm", config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / rows[0]["run"]))
    events.Reload()
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("weights_loss")]
    wanted = [(row["samples"], row["weights_loss"]) for row in rows if "samples" in row]
    assert [step for step, _ in found] == [step for step, _ in wanted] == [0, 64, 128]
    assert [x for _, x in found] == pytest.approx([x for _, x in wanted], rel=1e-6)


def test_batchnorms_control_leaves_the_statistics_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "scale_batchnorm_momentum", lambda _, kappa: seen.append(kappa))
    run("batchnorm", tiny("batchnorm", epochs=1), tmp_path)
    assert seen == [1.0, 4.0, 1.0]


def test_views_of_a_folder_have_their_sizes(images):
    config = dataclasses.replace(
        dino.PRESETS["paper"], data_root=images, image_size=64, local_size=32, local_crops=2
    )
    found = data.load(config, 4).train
    views, _ = found.__getitems__([(5, 0), (5, 3)])
    assert [view.shape[-1] for view in views] == [64, 64, 32, 32]
    again, _ = found.__getitems__([(5, 3)])
    assert all(torch.equal(a[0], b[1]) for a, b in zip(again, views, strict=True))


def test_blur_takes_a_random_radius(images):
    image = data.opened(next(str(path) for path in images.rglob("*.jpg")))
    blur = data.Blur(0.5, 2.0)
    torch.manual_seed(0)
    found = [torch.tensor(list(blur(image).tobytes())).float().std() for _ in range(4)]
    sharp = torch.tensor(list(image.tobytes())).float().std()
    assert len({x.item() for x in found}) == 4
    assert all(x < sharp for x in found)
