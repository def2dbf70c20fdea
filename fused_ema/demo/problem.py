"""The demo's problem: a small convolutional network on scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batches = Iterator[tuple[Tensor, Tensor]]


class Digits(NamedTuple):
    """Images ``[n, 1, 8, 8]`` with values in ``[0, 1]``, and their classes ``[n]``."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor

    def to(self, dtype: torch.dtype) -> Digits:
        """A copy with images of another dtype."""
        return self._replace(
            train_images=self.train_images.to(dtype), test_images=self.test_images.to(dtype)
        )


class Score(NamedTuple):
    """Mean cross-entropy, and the share of images that are classified correctly."""

    loss: float
    accuracy: float


def load_digits(train_size: int) -> Digits:
    """Split the 1797 digits, always in the same way, into training and test parts."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    classes = torch.tensor(digits.target)[order]
    return Digits(
        images[:train_size], classes[:train_size], images[train_size:], classes[train_size:]
    )


def network(seed: int) -> nn.Sequential:
    """A network of 38,282 parameters in 8 tensors.

    It is smooth, because a rounding error that switches a ReLU or a maximum would grow at random
    with any optimizer. It has no BatchNorm, whose running statistics would need the batch-size rule
    too.
    """
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.SiLU(),
        nn.Linear(64, 10),
    )


def minibatches(data: Digits, batch: int, epochs: int, seed: int) -> Batches:
    """Shuffled minibatches; the order of the samples is the same for every batch size.

    Raises:
        ValueError: ``batch`` does not divide the training set, so that runs at different batch
            sizes would not see the same number of samples.
    """
    size = len(data.train_images)
    if size % batch:
        raise ValueError(f"batch={batch} does not divide the {size} training images")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for indices in torch.randperm(size, generator=generator).view(-1, batch):
            yield data.train_images[indices], data.train_classes[indices]


@torch.no_grad()
def evaluate(model: nn.Module, data: Digits) -> Score:
    """The model's score on the test part."""
    outputs = model(data.test_images)
    correct = outputs.argmax(1) == data.test_classes
    loss = cross_entropy(outputs, data.test_classes)
    return Score(loss.item(), correct.double().mean().item())
