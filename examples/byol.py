"""BYOL (Grill et al. 2020): the target network is the average. python examples/byol.py

Without labels, the network learns from two noisy views of a digit what they have in common. Then
the nearest neighbour of a noisy digit in its features has the same label more often.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from fused_ema import CosineDecay, FusedScaledAdamW

TRAIN = 1280


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(*sizes[:2]), nn.BatchNorm1d(sizes[1]), nn.ReLU(), nn.Linear(*sizes[1:])
    )


def neighbours(encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How often a test image's nearest training image in the features has its label."""
    with torch.no_grad():
        features = normalize(encoder.eval()(images), dim=1)
    encoder.train()
    nearest = (features[TRAIN:] @ features[:TRAIN].T).argmax(1)
    return (labels[nearest] == labels[TRAIN:]).double().mean().item()


def main(epochs: int = 10) -> dict[str, float]:
    torch.manual_seed(0)
    digits, labels = map(torch.tensor, load_digits(return_X_y=True))

    def view(digits: Tensor) -> Tensor:
        return digits.float() / 16 + 0.4 * torch.randn(digits.shape)

    online = nn.Sequential(mlp(64, 256, 128), mlp(128, 256, 32))  # encoder and projector
    predictor = mlp(32, 128, 32)
    target = copy.deepcopy(online).requires_grad_(False)
    rho = CosineDecay(0.99, total=epochs * TRAIN / 64)
    opt = FusedScaledAdamW(
        [
            {"params": online.parameters(), "ema_decay": rho},
            {"params": predictor.parameters()},  # has no average
        ],
        teacher=target,
        model=online,  # names the parameters; the target gets BatchNorm's statistics
    )
    noisy = view(digits)
    results = {"random": neighbours(online[0], noisy, labels)}
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(64):
            one, other = view(digits[rows]), view(digits[rows])
            with torch.no_grad():
                wanted = target(other), target(one)
            found = predictor(online(one)), predictor(online(other))
            opt.zero_grad()
            (-sum(map(Tensor.mean, map(cosine_similarity, found, wanted)))).backward()
            opt.step()  # moves the target, too
    return {**results, "byol": neighbours(online[0], noisy, labels)}


if __name__ == "__main__":
    print(main())
