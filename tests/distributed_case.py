"""What the scenarios for two processes share.

Everything is in float64 and held against plain training in one process on the joined batches. The
two differ in the order of a few sums of up to ten terms, some 1e-16 relative, which a handful of
steps may amplify: RTOL and ATOL leave four decades for that and are far below any real difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from optimizers import OPTIMIZERS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

RTOL, ATOL = 1e-11, 1e-12
WORLD = 2
MAX_NORM = 2.0
SHARED = {"lr": 0.02, "ema_decay": (0.9, 0.99), "kappa": 2.0, "max_grad_norm": MAX_NORM}
BACKENDS = ("native", "triton", "foreach", "reference")


def make_model(seed: int = 0) -> nn.Sequential:
    """Over two processes: (3, 4) and (3,) in uneven shards, (1, 3) and (1,) in empty ones."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def shard(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """The last layer is the root's, which stays whole after a forward pass."""
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


def grid(replicas: int, shards: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))


def optimizer(name: str, module: nn.Module, **options):
    own = OPTIMIZERS[name]
    return own.ours(module.parameters(), **{**own.options, **SHARED, **options})


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    return x, x.sum(1, keepdim=True)


def mine(data: Tensor) -> Tensor:
    return data.chunk(WORLD)[dist.get_rank()]


def train(model, opt, steps: Sequence[int], part: Callable[[Tensor], Tensor]) -> list[float]:
    """Train, and return the gradients' norms."""
    norms = []
    for step in steps:
        x, y = map(part, batch(step))
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        norms.append(float(opt.grad_norm))
    return norms


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)


def assert_same_training(model, opt, other, twin) -> None:
    """Parameters, states, averages and counts of a sharded training and of a plain one."""
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(whole(p.detach()), q.detach())
        assert opt.state[p].keys() == twin.state[q].keys()
        for key, value in twin.state[q].items():
            assert_close(whole(opt.state[p][key]), value)
    assert opt.param_groups[0]["base_steps"] == twin.param_groups[0]["base_steps"]


def assert_equal_on_all_ranks(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        found = [torch.empty_like(tensor) for _ in range(WORLD)]
        dist.all_gather(found, tensor.detach())
        assert torch.equal(*found)
