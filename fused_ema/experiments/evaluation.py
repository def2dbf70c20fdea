"""Scores of a classifier, and of features: k nearest neighbours and a linear probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from .data import Images, loader
from .distributed import Place

BATCH = 512


@torch.no_grad()
def outputs(model: nn.Module, images: Images, place: Place, workers: int) -> tuple[Tensor, Tensor]:
    """The model's outputs for all images, and the classes of the images, both on the CPU.

    The processes share the images. The model is in evaluation mode meanwhile.
    """
    mine = place.group.slice(len(images))
    batches = [
        [(0, i) for i in mine[start : start + BATCH]] for start in range(0, len(mine), BATCH)
    ]
    was_training = model.training
    model.eval()
    found = [
        (model(place.take(views[0])).cpu(), classes)
        for views, classes in loader(images, batches, workers, place.device.type == "cuda")
    ]
    model.train(was_training)
    results, classes = (torch.cat(part) for part in zip(*found, strict=True))
    return place.group.join(results), place.group.join(classes)


def score(model: nn.Module, images: Images, place: Place, workers: int) -> dict[str, float]:
    """Mean cross-entropy, and the share of images that are classified correctly."""
    logits, classes = outputs(model, images, place, workers)
    return {
        "loss": cross_entropy(logits.double(), classes).item(),
        "accuracy": (logits.argmax(1) == classes).double().mean().item(),
    }


Features = tuple[Tensor, Tensor]


def knn(train: Features, test: Features, neighbours: int = 20, temperature: float = 0.07) -> float:
    """Accuracy of a vote of the nearest training images by cosine similarity.

    Each neighbour votes with ``exp(similarity/temperature)`` (Wu et al. 2018, arXiv 1805.01978).

    Args:
        train: features ``[n, d]`` and classes ``[n]``.
        test: features and classes of the test images.
        neighbours: number of images that vote.
        temperature: temperature of the vote.
    """
    keys, classes = normalize(train[0], dim=1), train[1]
    votes = one_hot(classes).float()
    correct = 0
    for features, wanted in zip(test[0].split(BATCH), test[1].split(BATCH), strict=True):
        nearest = (normalize(features, dim=1) @ keys.T).topk(min(neighbours, len(keys)), dim=1)
        weights = (nearest.values / temperature).exp()
        totals = (votes[nearest.indices] * weights[..., None]).sum(1)
        correct += int((totals.argmax(1) == wanted).sum())
    return correct / len(test[1])


def linear_probe(
    train: Features, test: Features, device: torch.device, penalty: float = 1e-4
) -> float:
    """Accuracy of logistic regression on standardised features, fitted by L-BFGS.

    Args:
        train: features ``[n, d]`` and classes ``[n]``.
        test: features and classes of the test images.
        device: device of the fit.
        penalty: weight of the squared weights in the loss.
    """
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-6
    inputs = ((train[0] - mean) / deviation).to(device)
    wanted = train[1].to(device)
    layer = nn.Linear(inputs.shape[1], int(wanted.max()) + 1, device=device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = cross_entropy(layer(inputs), wanted) + penalty * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        found = layer(((test[0] - mean) / deviation).to(device)).argmax(1).cpu()
    return float((found == test[1]).double().mean())
