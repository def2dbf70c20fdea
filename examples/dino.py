"""DINO (Caron et al. 2021): the student learns from its own average. python examples/dino.py

Two noisy views of a digit should fall into the same cluster. Labels are used only to look at the
clusters at the end: each gets the label that most of its training digits have.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_ema import CosineDecay, FusedScaledAdamW

TRAIN, CLUSTERS = 1280, 64


def purity(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How often a test digit has the label that most of its cluster has in training."""
    with torch.no_grad():
        clusters = network(images).argmax(1)
    votes = torch.zeros(CLUSTERS, 10)
    votes.index_put_((clusters[:TRAIN], labels[:TRAIN]), torch.ones(TRAIN), accumulate=True)
    return (votes.argmax(1)[clusters[TRAIN:]] == labels[TRAIN:]).double().mean().item()


def main(epochs: int = 20, kappa: float = 1.0) -> dict[str, float]:
    torch.manual_seed(0)
    digits, labels = map(torch.tensor, load_digits(return_X_y=True))

    def view(digits: Tensor) -> Tensor:
        return digits.float() / 16 + 0.2 * torch.randn(digits.shape)

    student = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, CLUSTERS, bias=False))
    teacher = copy.deepcopy(student).requires_grad_(False)
    steps = epochs * TRAIN / 32
    opt = FusedScaledAdamW(
        student.parameters(),
        lr=2e-3,
        ema_decay=CosineDecay(0.99, total=steps),
        teacher=teacher,
        kappa=kappa,
    )
    results = {"random": purity(student, digits.float() / 16, labels)}
    center, center_decay = torch.zeros(CLUSTERS), 0.9**kappa  # it is an average, too
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(int(32 * kappa)):
            views = view(digits[rows]), view(digits[rows])
            with torch.no_grad():
                outputs = [teacher(x) for x in views]
                wanted = [((y - center) / 0.04).softmax(1) for y in outputs]
                center.lerp_(torch.cat(outputs).mean(0), 1 - center_decay)
            logits = [student(x) / 0.1 for x in views]
            loss = cross_entropy(logits[0], wanted[1]) + cross_entropy(logits[1], wanted[0])
            opt.zero_grad()
            loss.backward()
            opt.step()  # moves the teacher, too
    return {**results, "dino": purity(teacher, digits.float() / 16, labels)}


if __name__ == "__main__":
    print(main())
