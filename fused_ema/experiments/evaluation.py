"""Scores of a classifier, and of features: k nearest neighbours and a linear probe.

Each process holds the outputs of its share of the images. What they exchange is small: sums, and
the nearest neighbours of blocks of test images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from .data import Data, Images, loader
from .distributed import Group, Place

BATCH = 512
SCORES = ("knn", "probe")
ALONE = Group()
Features = tuple[Tensor, Tensor]


@torch.no_grad()
def outputs(model: nn.Module, images: Images, place: Place, workers: int) -> Features:
    """The model's outputs for this process's share of the images, and their classes.

    Both are on the place's device. The model is in evaluation mode meanwhile.
    """
    mine = place.group.slice(len(images))
    batches = [
        [(0, i) for i in mine[start : start + BATCH]] for start in range(0, len(mine), BATCH)
    ]
    was_training = model.training
    model.eval()
    found = [
        (model(place.take(views[0])), place.take(classes))
        for views, classes in loader(images, batches, workers, place.device.type == "cuda")
    ]
    model.train(was_training)
    results, classes = (torch.cat(part) for part in zip(*found, strict=True))
    return results, classes


def score(model: nn.Module, images: Images, place: Place, workers: int) -> dict[str, float]:
    """Mean cross-entropy, and the share of images that are classified correctly."""
    logits, classes = outputs(model, images, place, workers)
    loss = cross_entropy(logits.double(), classes, reduction="sum")
    correct = (logits.argmax(1) == classes).sum()
    totals = place.group.total(torch.stack((loss, correct.double()))) / len(images)
    return dict(zip(("loss", "accuracy"), totals.tolist(), strict=True))


def feature_scores(encoder: nn.Module, data: Data, place: Place, workers: int) -> dict[str, float]:
    """Accuracy of the features by k nearest neighbours and by a linear probe."""
    train = outputs(encoder, data.plain, place, workers)
    test = outputs(encoder, data.test, place, workers)
    found = knn(train, test, group=place.group), linear_probe(train, test, group=place.group)
    return dict(zip(SCORES, found, strict=True))


def knn(
    train: Features,
    test: Features,
    neighbours: int = 20,
    temperature: float = 0.07,
    group: Group = ALONE,
) -> float:
    """Accuracy of a vote of the nearest training images by cosine similarity.

    Each neighbour votes with ``exp(similarity/temperature)`` (Wu et al. 2018, arXiv 1805.01978).
    All processes look at all test images, each among its own training images.

    Args:
        train: features ``[n, d]`` and classes ``[n]`` of this process's training images.
        test: features and classes of its test images.
        neighbours: number of images that vote.
        temperature: temperature of the vote.
        group: the processes that share the images.
    """
    keys, classes = normalize(train[0], dim=1), train[1]
    number = max(group.gather(int(classes.max()))) + 1
    queries, wanted = group.join(test[0]).to(keys), group.join(test[1]).to(classes)
    correct = 0
    for features, right in zip(queries.split(BATCH), wanted.split(BATCH), strict=True):
        mine = (normalize(features, dim=1) @ keys.T).topk(min(neighbours, len(keys)), dim=1)
        values = group.join(mine.values.T).T.to(keys)
        voters = group.join(classes[mine.indices].T).T.to(classes)
        nearest = values.topk(min(neighbours, values.shape[1]), dim=1)
        totals = keys.new_zeros(len(features), number)
        weights = (nearest.values / temperature).exp()
        totals.scatter_add_(1, voters.gather(1, nearest.indices), weights)
        correct += int((totals.argmax(1) == right).sum())
    return correct / len(wanted)


def linear_probe(
    train: Features, test: Features, penalty: float = 1e-4, group: Group = ALONE
) -> float:
    """Accuracy of logistic regression on standardised features, fitted by L-BFGS.

    Args:
        train: features ``[n, d]`` and classes ``[n]`` of this process's training images.
        test: features and classes of its test images.
        penalty: weight of the squared weights in the loss.
        group: the processes that share the images.
    """
    inputs, wanted = train
    size = sum(group.gather(len(inputs)))
    mean = group.total(inputs.sum(0)) / size
    deviation = (group.total((inputs - mean).square().sum(0)) / (size - 1)).sqrt() + 1e-6
    inputs = (inputs - mean) / deviation
    number = max(group.gather(int(wanted.max()))) + 1
    layer = nn.Linear(inputs.shape[1], number, device=inputs.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = cross_entropy(layer(inputs), wanted, reduction="sum") / size
        loss = loss + penalty * layer.weight.square().sum() / group.world
        loss.backward()
        for parameter in layer.parameters():
            parameter.grad = group.total(parameter.grad)
        return group.total(loss.detach())

    optimizer.step(closure)
    with torch.no_grad():
        found = layer((test[0] - mean) / deviation).argmax(1)
    right = torch.stack(((found == test[1]).sum(), torch.tensor(len(found)).to(found)))
    correct, total = group.total(right).tolist()
    return float(correct / total)
