"""One of two processes, started by test_torchtitan.py: the page's blocks, with FSDP2.

With torchtitan where it is installed; else with a container that makes the calls of torchtitan 0.3.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pages
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from fused_ema.experiments.distributed import processes


@dataclass(kw_only=True, slots=True)
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class OptimizersContainer(torch.optim.Optimizer):
    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list[ParamGroupConfig]

    @classmethod
    def __init_subclass__(cls):
        cls.Config.build = lambda config, **options: cls(config, **options)

    @staticmethod
    def _resolve_optimizer_factory(name):
        return {"AdamW": torch.optim.AdamW}[name]

    def __init__(self, config, *, model_parts):
        self.optimizers = []
        for part in model_parts:
            by_name: dict[str, list] = {}
            for group in config.param_groups:
                named = dict(part.named_parameters())
                names = [name for name in named if re.search(group.pattern, name)]
                params = {"params": [named[name] for name in names], "param_names": names}
                options = {"fused": True, "foreach": False, **group.optimizer_kwargs}
                by_name.setdefault(group.optimizer_name, []).append({**params, **options})
            for name, groups in by_name.items():
                self.optimizers.append(self._resolve_optimizer_factory(name)(groups))
        super().__init__([p for part in model_parts for p in part.parameters()], {})

    def __iter__(self):
        return iter(self.optimizers)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                for index, name in zip(group["params"], group["param_names"], strict=True):
                    flat |= {f"state.{name}.{k}": v for k, v in saved["state"][index].items()}
                    fields = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                    flat |= {f"param_groups.{name}.{k}": v for k, v in fields.items()}
        return flat

    def load_state_dict(self, flat):
        for optimizer in self.optimizers:
            state, groups = {}, []
            for group in optimizer.param_groups:
                first, indices = group["param_names"][0], []
                for name, param in zip(group["param_names"], group["params"], strict=True):
                    indices.append(len(state))
                    state[len(state)] = {
                        k: flat[f"state.{name}.{k}"] for k in optimizer.state[param]
                    }
                fields = [k for k in group if k not in ("params", "param_names")]
                groups.append({"params": indices})
                groups[-1] |= {k: flat[f"param_groups.{first}.{k}"] for k in fields}
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def install() -> None:
    """Where torchtitan is missing, the container above is imported in its place."""
    if importlib.util.find_spec("torchtitan") is None:
        for name in ("torchtitan", "torchtitan.components", "torchtitan.components.optimizer"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules[name].OptimizersContainer = OptimizersContainer
        sys.modules[name].ParamGroupConfig = ParamGroupConfig


def model_part(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))


def sharded(seed: int) -> nn.Module:
    part = model_part(seed)
    fully_shard(part[0])
    return fully_shard(part)


def loss_of(parts, batch):
    for part in parts:
        batch = part(batch)
    return batch.square().mean()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> None:
    torch.set_num_threads(1)
    install()
    batches = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0))
    parts = [sharded(0)]
    names: dict[str, Any] = {"__name__": __name__, "model_parts": parts}
    names |= {"loss_of": loss_of, "batches": batches}
    pages.run_page("frameworks/torchtitan.md", names)

    # in one process, on both processes' batches, which are the same
    twin = model_part(0)
    opt = names["FusedScaledAdamW"](
        twin.parameters(), lr=8e-4, betas=(0.9, 0.95), ema_decay=0.999, kappa=4, model=twin
    )
    for batch in batches:
        opt.zero_grad()
        loss_of([twin], batch).backward()
        opt.step()
    for name, value in opt.ema_state_dict(twin).items():
        found = whole(names["average"][name])
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
        assert (found - whole(parts[0].state_dict()[name])).abs().max() > 1e-4
        assert f"state.{name}.ema" in names["checkpoint"]
    with opt.ema_weights():
        assert abs(names["validated"] - loss_of([twin], batches[0]).item()) < 1e-5

    # another run continues bit for bit
    again = [sharded(0)]
    other = names["config"].build(model_parts=again)
    loss_of(again, batches[0]).backward()
    other.step()
    again[0].load_state_dict(parts[0].state_dict())
    other.load_state_dict(names["checkpoint"])
    for model_parts, container in ((parts, names["optimizers"]), (again, other)):
        container.zero_grad()
        loss_of(model_parts, batches[1]).backward()
        container.step()
    resumed = names["ema_state_dict"](again[0], other)
    for name, value in names["ema_state_dict"](parts[0], names["optimizers"]).items():
        assert torch.equal(whole(value), whole(resumed[name])), name


if __name__ == "__main__":
    with processes():
        main()
        open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").close()
