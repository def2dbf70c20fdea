"""A trained model, and all that reading its average must leave as it is."""

from __future__ import annotations

import torch
from torch import nn

from fused_ema import FusedScaledSGD


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.norm(self.first(x))))


def trained(known: bool = True, dtype: torch.dtype = torch.float32, **kwargs):
    torch.manual_seed(0)
    model = Net().to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    kwargs = {"ema_decay": 0.5, "model": model if known else None, **kwargs}
    opt = FusedScaledSGD(params, lr=0.5, momentum=0.9, **kwargs)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(8, 3, dtype=dtype)).square().sum().backward()
        opt.step()
    with torch.no_grad():
        model.first.weight[0, 0] = 1e5  # more than float16 holds
    return model, opt


class Whole:
    """All that a read must leave as it is, bit for bit."""

    def __init__(self, model: nn.Module, opt: torch.optim.Optimizer) -> None:
        self.model, self.opt = model, opt
        self.before = self.now()

    def now(self) -> dict[str, tuple]:
        held = {f"model {k}": v for k, v in self.model.state_dict(keep_vars=True).items()}
        for i, state in enumerate(self.opt.state.values()):
            held |= {f"{i} {k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
        held |= {
            f"grad {n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None
        }
        return {
            name: (id(t), t.data_ptr(), t.dtype, t.stride(), t.detach().clone(), t._version)
            for name, t in held.items()
        }

    def check(self, versions: bool = True) -> None:
        now = self.now()
        assert now.keys() == self.before.keys()
        for name, (*place, value, version) in self.before.items():
            *place_now, value_now, version_now = now[name]
            assert place_now == place, name
            assert torch.equal(value_now, value), name
            assert not versions or version_now == version or name.startswith("grad"), name


def assert_holds_average(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    for p, state in opt.state.items():
        assert torch.equal(p, state["ema"].to(p.dtype))
