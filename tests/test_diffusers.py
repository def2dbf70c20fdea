"""diffusers: a training loop without EMAModel, its folders in pipelines, and adapters of peft."""

from __future__ import annotations

import copy
import warnings

import pages
import pytest
import torch
from pages import one_thread  # noqa: F401

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

from fused_ema import FusedScaledAdamW, FusedScaledSGD, InverseGammaDecay, load_ema

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page's blocks leave behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        names = pages.run_page("frameworks/diffusers.md")
        names["checkpoint"] = torch.load("checkpoint/optimizer.bin", weights_only=True)
    return names


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_saved_folders_hold_the_average(page):
    unet = page["unet"]
    average = page["opt"].ema_state_dict(unet)
    assert_same(page["average"].state_dict(), average)
    assert_same(page["sampler"].unet.state_dict(), average)
    assert not torch.equal(unet.conv_in.weight, average["conv_in.weight"])
    assert page["samples"].shape == (2, 8, 8, 1)
    saved = page["checkpoint"]["state"]
    for entry, param in zip(saved.values(), unet.parameters(), strict=True):
        assert torch.equal(entry["ema"], page["opt"].state[param]["ema"])


def small() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    shape = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    return UNet2DModel(
        block_out_channels=(4,), norm_num_groups=2, attention_head_dim=2, **shape, **blocks
    )


def train(unet: UNet2DModel, opt, after=lambda: None, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, noise = torch.randn(2, 4, 1, 4, 4, generator=generator)
        opt.zero_grad()
        (unet(x + noise, torch.tensor(3)).sample - noise).square().mean().backward()
        opt.step()
        after()


def test_the_average_is_emamodels(tmp_path):
    """And the folder that EMAModel writes continues here."""
    theirs, ours = small(), small()
    ema = EMAModel(
        theirs.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        power=3 / 4,
        model_cls=UNet2DModel,
        model_config=theirs.config,
    )
    torchs = torch.optim.SGD(theirs.parameters(), lr=0.05)
    train(theirs, torchs, lambda: ema.step(theirs.parameters()))
    decay = InverseGammaDecay(0.9999, power=3 / 4)
    opt = FusedScaledSGD(ours.parameters(), lr=0.05, ema_decay=decay, model=ours)
    train(ours, opt)
    ema.save_pretrained(tmp_path)
    folder = UNet2DModel.from_pretrained(tmp_path).state_dict()
    average = opt.ema_state_dict(ours)
    for name, value in folder.items():
        # values of order one, rounded a few times in float32 at each of six steps
        torch.testing.assert_close(average[name], value, rtol=0, atol=5e-6, msg=name)
    weight = "conv_in.weight"
    assert (folder[weight] - theirs.state_dict()[weight]).abs().max() > 1e-4
    resumed = FusedScaledSGD(theirs.parameters(), lr=0.05, ema_decay=decay, model=theirs)
    resumed.load_state_dict(torchs.state_dict())
    load_ema(resumed, theirs, folder)
    assert_same(resumed.ema_state_dict(theirs), folder)


def test_only_adapters_are_averaged(page):
    model, opt = page["model"], page["adapters"]
    adapters = {name: param for name, param in model.named_parameters() if "lora" in name}
    assert opt.state.keys() == set(adapters.values())
    average = opt.ema_state_dict(model)
    frozen = page["text_to_image"]().state_dict()
    loaded = page["other"].state_dict()  # whose adapter has another name
    loaded = {name.replace(".default_0.", ".default."): value for name, value in loaded.items()}
    assert loaded.keys() == average.keys()
    for name, value in loaded.items():
        assert torch.equal(average[name], value), name
        assert torch.equal(model.state_dict()[name], value) == (name not in adapters), name
        if name not in adapters:
            assert torch.equal(frozen[name.replace(".base_layer", "")], value), name
    assert adapters


def test_the_average_of_adapters_by_name(page):
    """As for save_lora_weights of the pipelines."""
    model, opt = page["model"], page["adapters"]
    found = peft.get_peft_model_state_dict(model, state_dict=opt.ema_state_dict(model))
    with opt.ema_weights():
        expected = copy.deepcopy(peft.get_peft_model_state_dict(model))
    assert_same(found, expected)
    assert found


def test_a_model_of_pefts_own(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"])
    model = peft.get_peft_model(small(), config)
    trained = [param for param in model.parameters() if param.requires_grad]
    opt = FusedScaledAdamW(trained, lr=1e-2, ema_decay=0.5, model=model)
    train(model, opt)
    average = {name: value.clone() for name, value in opt.ema_state_dict(model).items()}
    with opt.ema_weights():
        model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(small(), tmp_path)
    assert_same(other.state_dict(), average)
    assert not all(torch.equal(average[n], v) for n, v in model.state_dict().items())
