"""Averages as other packages save them: by the packages, and by hand where they are missing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

MODULES = {
    "torch: AveragedModel": "torch.optim.swa_utils",
    "timm: ModelEmaV3": "timm.utils",
    "ema-pytorch: EMA": "ema_pytorch",
    "diffusers: EMAModel": "diffusers.training_utils",
}
TORCH, TIMM, EMA_PYTORCH, DIFFUSERS = MODULES
UPDATES = 7
per_package = pytest.mark.parametrize("package", MODULES)


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    # no bias before BatchNorm: its gradient is pure rounding, which Adam would magnify
    return nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)
    ).to(dtype)


def batches(steps: int, dtype: torch.dtype, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(steps, 32, 8, dtype=dtype, generator=generator)
    return [(x, x.prod(1, keepdim=True).tanh()) for x in inputs]


def installed(package: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(MODULES[package], exc_type=ImportError)


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def written_by_hand(package: str, source: nn.Module) -> dict:
    """The layout of each package's state, holding the weights of `source` after some updates."""
    state = source.state_dict()
    if package == TORCH:
        return {"n_averaged": torch.tensor(UPDATES), **prefixed("module.", state)}
    if package == TIMM:
        return prefixed("module.", state)
    if package == EMA_PYTORCH:
        counts = {"initted": torch.tensor(True), "step": torch.tensor(UPDATES)}
        online = network(seed=99).to(source[0].weight.dtype).state_dict()
        return {**counts, **prefixed("online_model.", online), **prefixed("ema_model.", state)}
    settings = {"decay": 0.9999, "min_decay": 0.0, "update_after_step": 0}
    warmup = {"use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}
    shadows = [p.detach().clone() for p in source.parameters()]
    return {**settings, **warmup, "optimization_step": UPDATES, "shadow_params": shadows}


def saved_by(package: str, source: nn.Module) -> dict:
    """The same from the package itself."""
    module = installed(package)
    if package == TORCH:
        ema = AveragedModel(source)
        ema.n_averaged.fill_(UPDATES)
    elif package == TIMM:
        ema = module.ModelEmaV3(source)
    elif package == EMA_PYTORCH:
        ema = module.EMA(network(seed=99).to(source[0].weight.dtype), ema_model=source)
        ema.initted.fill_(True)
        ema.step.fill_(UPDATES)
    else:
        ema = module.EMAModel(source.parameters())
        ema.optimization_step = UPDATES
    return ema.state_dict()


def assert_averages(opt, model: nn.Module, source: nn.Module, index: int = 0) -> None:
    average = opt.ema_state_dict(model, index)
    for name, expected in source.named_parameters():
        assert torch.equal(average[name], expected.to(average[name].dtype)), name
