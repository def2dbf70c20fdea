"""Supervised training: the average is what you evaluate and ship. python examples/supervised.py

The learning rate stays high, so that the weights jump around a good place; their average is in it.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from fused_ema import FusedScaledSGD, WarmUpDecay


def main(epochs: int = 10) -> dict[str, float]:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images, order = images.float() / 16, torch.randperm(len(images))
    train, test = order[:1280], order[1280:]

    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    opt = FusedScaledSGD(
        model.parameters(),
        lr=0.5,
        momentum=0.9,
        ema_decay=WarmUpDecay(0.99),  # a short run: forget the start at once
        model=model,  # BatchNorm's statistics belong to the averaged model, too
        ema_buffers="average",
    )
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(32):
            opt.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            opt.step()

    @torch.no_grad()
    def accuracy() -> float:
        return (model(images[test]).argmax(1) == labels[test]).double().mean().item()

    model.eval()
    results = {"weights": accuracy()}
    with opt.ema_weights():
        results["average"] = accuracy()
    return results  # torch.save(opt.ema_state_dict(model), "ema.pt") saves the average


if __name__ == "__main__":
    print(main())
