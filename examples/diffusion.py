"""A diffusion model of digits, sampled with the average. python examples/diffusion.py

The network removes noise of any strength. Its loss is noisy, so the average is better than the
weights. Euler steps then turn noise into digits: about as far from the training digits as new ones.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_ema import FusedScaledAdamW, PowerDecay

SIGMA_DATA = 0.37  # of the digits in [0, 1]


class Denoiser(nn.Module):
    """Gives the clean images of noisy ones, preconditioned as by Karras et al. 2022."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(65, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 64))
        )

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        total = (sigma**2 + SIGMA_DATA**2).sqrt()
        skip, out = SIGMA_DATA**2 / total**2, sigma * SIGMA_DATA / total
        return skip * noisy + out * self.net(torch.cat([noisy / total, sigma.log() / 4], 1))


def loss_of(model: Denoiser, images: Tensor) -> Tensor:
    sigma = (1.2 * torch.randn(len(images), 1) - 1.2).exp()
    weight = 1 / sigma**2 + 1 / SIGMA_DATA**2
    noisy = images + sigma * torch.randn(images.shape)
    return (weight * (model(noisy, sigma) - images) ** 2).mean()


@torch.no_grad()
def sample(model: Denoiser, count: int, steps: int = 20) -> Tensor:
    sigmas = torch.cat([torch.logspace(0.5, -2, steps), torch.zeros(1)])
    x = sigmas[0] * torch.randn(count, 64)
    for now, then in pairwise(sigmas):
        x = x + (then - now) * (x - model(x, now.expand(count, 1))) / now
    return x


def main(steps: int = 1500) -> dict[str, float]:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    images = images[torch.randperm(len(images))]
    train, test = images[:1280], images[1280:]
    model = Denoiser()
    opt = FusedScaledAdamW(
        model.parameters(), lr=3e-3, ema_decay=PowerDecay.from_sigma_rel(0.1), model=model
    )
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, train[torch.randint(len(train), (64,))]).backward()
        opt.step()

    @torch.no_grad()
    def test_loss() -> float:
        torch.manual_seed(1)
        return loss_of(model, test.repeat(20, 1)).item()

    results = {"weights": test_loss()}
    with opt.ema_weights():
        results["average"] = test_loss()
        samples = sample(model, count=100)

    def distance(others: Tensor) -> float:
        return torch.cdist(others, train).amin(1).mean().item()

    return {**results, "samples to train": distance(samples), "test to train": distance(test)}


if __name__ == "__main__":
    print(main())
