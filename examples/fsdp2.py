"""FSDP2: weights, moments and averages are sharded over the processes.

    torchrun --nproc-per-node=2 examples/fsdp2.py

With nccl and GPUs in place of gloo, nothing else changes but the device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from fused_ema import FusedScaledAdamW, WarmUpDecay

BASE_BATCH = 32  # for which lr and ema_decay were chosen


def main(epochs: int = 10, batch: int = 32) -> dict[str, float]:
    torch.manual_seed(0)  # the same weights and the same split in every process
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images, order = images.float() / 16, torch.randperm(len(images))
    train, test = order[:1280], order[1280:]

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    for layer in (model[0], model[2], model):
        fully_shard(layer)  # first; then make the optimizer
    rank, processes = dist.get_rank(), dist.get_world_size()
    opt = FusedScaledAdamW(
        model.parameters(),
        lr=2e-3,
        ema_decay=WarmUpDecay(0.99),
        kappa=processes * batch / BASE_BATCH,
        max_grad_norm=5.0,  # of the whole gradient, over all shards
        model=model,
    )
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(processes * batch):
            rows = rows[rank::processes]  # each process has its part of the batch
            opt.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            opt.step()

    @torch.no_grad()
    def accuracy() -> float:
        return (model(images[test]).argmax(1) == labels[test]).double().mean().item()

    results = {"weights": accuracy()}
    with opt.ema_weights():
        results["average"] = accuracy()
    whole = {name: value.full_tensor() for name, value in opt.ema_state_dict(model).items()}
    if rank == 0:
        torch.save(whole, "ema.pt")  # for a model that is not sharded
    return results


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = main()
    if dist.get_rank() == 0:
        print(results)
    dist.destroy_process_group()
