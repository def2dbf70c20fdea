"""Pseudo-labels from an averaged teacher. python examples/pseudo_labels.py

20 digits have labels and 1,260 have none. The teacher labels those of which it is sure, and the
student learns them from noisier images than the teacher saw.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_ema import FusedScaledAdamW, WarmUpDecay


def main(steps: int = 1000, weight: float = 1.0) -> dict[str, float]:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images, order = images.float() / 16, torch.randperm(len(images))
    labelled, unlabelled, test = order[:20], order[20:1280], order[1280:]

    def noisy(images: Tensor) -> Tensor:
        return images + 0.4 * torch.randn(images.shape)

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return (model(images[test]).argmax(1) == labels[test]).double().mean().item()

    student = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    teacher = copy.deepcopy(student).requires_grad_(False)
    opt = FusedScaledAdamW(
        student.parameters(), lr=2e-3, ema_decay=WarmUpDecay(0.99), teacher=teacher
    )
    for _ in range(steps):
        rows = labelled[torch.randint(len(labelled), (16,))]
        loss = cross_entropy(student(noisy(images[rows])), labels[rows])
        rows = unlabelled[torch.randint(len(unlabelled), (64,))]
        with torch.no_grad():
            sure, pseudo = teacher(images[rows]).softmax(1).max(1)
        losses = cross_entropy(student(noisy(images[rows])), pseudo, reduction="none")
        loss = loss + weight * (losses * (sure > 0.8)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()  # moves the teacher, too
    return {"student": accuracy(student), "teacher": accuracy(teacher)}


if __name__ == "__main__":
    print({"labels alone": main(weight=0.0), "and pseudo-labels": main()})
