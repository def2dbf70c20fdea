"""Images and classes: scikit-learn's digits, or any folder in torchvision's ImageFolder layout.

A sample is identified by a token of the epoch and by its index. Its random numbers depend only on
those two, so that it is the same for every batch size, number of processes and resumed run.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from ..demo.problem import load_digits
from .networks import check_model
from .recipe import ImageRecipe

T = TypeVar("T")
Key = tuple[int, int]
Views = tuple[Tensor, ...]
Transform = Callable[[Any], Tensor]

# Training digits among the 1797, divisible by powers of two up to 512; the rest is for testing.
DIGITS_TRAIN_SIZE = 1536


class Images(Protocol):
    """A data set that gives batches of views of images and their classes."""

    def __len__(self) -> int: ...

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Views, Tensor]: ...


class Data(NamedTuple):
    """Training images in augmented views, and both parts without augmentation.

    Attributes:
        train: the training images, in ``views`` augmented views each.
        plain: the training images without augmentation, one view.
        test: the test images without augmentation, one view.
        classes: number of classes.
        channels: number of channels of an image.
    """

    train: Images
    plain: Images
    test: Images
    classes: int
    channels: int


def load(recipe: ImageRecipe, views: int) -> Data:
    """Load the data that the recipe names; with ``views`` > 1, augment as BYOL or DINO do.

    Raises:
        ValueError: there is no such model or folder, or it is damaged or too small.
    """
    check_model(recipe)
    if recipe.data == "digits":
        return digits(recipe.train_size or DIGITS_TRAIN_SIZE, views)
    return folder(recipe, views)


def digits(train_size: int, views: int) -> Data:
    """The 1797 digits of 8 x 8 pixels; those that are not for training are the test part."""
    if not 0 < train_size < 1797:
        raise ValueError(f"train_size={train_size} is out of range; allowed: 1 to 1796 digits")
    found = load_digits(train_size)
    images, test_images = found.train_images, found.test_images
    if views > 1:
        # random features already classify nine of ten unchanged digits
        images, test_images = misplaced(images), misplaced(test_images)
    return Data(
        Digits(images, found.train_classes, views),
        Digits(images, found.train_classes),
        Digits(test_images, found.test_classes),
        classes=10,
        channels=1,
    )


class Digits(Dataset[Any]):
    """Digits in memory, each with its own shift, turn, size and contrast in every epoch.

    Args:
        images: ``[n, 1, 8, 8]`` in ``[0, 1]``.
        classes: ``[n]``.
        views: number of distorted views, which differ strongly if there are several; 0: one view of
            the images as they are.
    """

    def __init__(self, images: Tensor, classes: Tensor, views: int = 0) -> None:
        self.images, self.classes, self.views = images, classes, views
        self.views_of = lru_cache(maxsize=1)(self._views_of)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Views, Tensor]:
        rows = torch.tensor([index for _, index in keys])
        if not self.views:
            return (self.images[rows],), self.classes[rows]
        (token,) = {token for token, _ in keys}
        return tuple(view[rows] for view in self.views_of(token)), self.classes[rows]

    def _views_of(self, token: int) -> Views:
        """All images in an epoch's distortions, at once, which small batches gain most from."""
        generator = torch.Generator().manual_seed(token)
        shape = (len(self), self.views, 7)
        chances = torch.rand(shape, generator=generator, dtype=self.images.dtype) * 2 - 1
        strong = self.views > 1
        return tuple(distorted(self.images, chances[:, k], strong) for k in range(self.views))


def misplaced(images: Tensor) -> Tensor:
    """Each image moved, turned and resized at random, but the same at every call."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(len(images), 7, generator=generator, dtype=images.dtype) - 0.5
    return distorted(images, chances, strong=True)


def distorted(images: Tensor, chances: Tensor, strong: bool) -> Tensor:
    """Images ``[n, 1, 8, 8]`` moved by up to a pixel, turned, resized, and in another contrast.

    Args:
        images: the images to distort; not modified.
        chances: ``[n, 7]`` in ``[-1, 1]``, one distortion each.
        strong: distort as much as two views of BYOL need.
    """
    turn, shift, resize, contrast = (0.35, 0.3, 0.25, 0.4) if strong else (0.17, 0.12, 0.1, 0.0)
    angle, size = turn * chances[:, 0], 1 + resize * chances[:, 1]
    stretch = 1 + resize / 2 * chances[:, 2]
    cos, sin = angle.cos() * size, angle.sin() * size
    rows = [cos * stretch, -sin, shift * chances[:, 3], sin, cos / stretch, shift * chances[:, 4]]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    scale = 1 + contrast * chances[:, 5].view(-1, 1, 1, 1)
    return moved * scale + contrast / 4 * chances[:, 6].view(-1, 1, 1, 1)


def folder(recipe: ImageRecipe, views: int) -> Data:
    """A folder with ``train`` and ``val`` or ``test`` parts, each with a folder for each class."""
    from torchvision.datasets import ImageFolder

    root = recipe.data_root
    if root is None:
        raise ValueError("data_root=none with data=folder; allowed: a folder of images")
    parts = {part: _checked(root, part) for part in ("train", _test_part(root))}
    found = [ImageFolder(str(path)) for path in parts.values()]
    train, test = (part.samples for part in found)
    if found[0].classes != found[1].classes:
        odd = sorted(set(found[0].classes) ^ set(found[1].classes))
        raise ValueError(
            f"data_root={root}: class {odd[0]!r} is in one of {' and '.join(parts)} only"
        )
    if recipe.train_size is not None:
        train = first_of_shuffle(train, recipe.train_size)
    plain = plain_transform(recipe.image_size)
    return Data(
        Folder(train, *augmentations(recipe.image_size, views, recipe.local_size)),
        Folder(train, plain),
        Folder(test, plain),
        classes=len(found[0].classes),
        channels=3,
    )


class Folder(Dataset[Any]):
    """Images in files.

    Args:
        samples: path and class of each image.
        transforms: one transform for each view.
    """

    def __init__(self, samples: list[tuple[str, int]], *transforms: Transform) -> None:
        self.samples, self.transforms = samples, transforms

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Views, Tensor]:
        views = zip(*(self._views(*key) for key in keys), strict=True)
        classes = torch.tensor([self.samples[index][1] for _, index in keys])
        return tuple(torch.stack(view) for view in views), classes

    def _views(self, token: int, index: int) -> Views:
        image = opened(self.samples[index][0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed(token, index))
            return tuple(transform(image) for transform in self.transforms)


def opened(path: str) -> Any:
    """Open an image in RGB.

    Raises:
        ValueError: the file is not an image, or is cut off.
    """
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def plain_transform(size: int) -> Transform:
    """Resize, crop the middle, normalise."""
    from torchvision.transforms import v2

    resize = size if size < 64 else round(size / 0.875)
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [v2.Resize(resize, bicubic), v2.CenterCrop(size), *_normalised()]
    return cast(Transform, v2.Compose(steps))


def augmentations(size: int, views: int, local_size: int) -> list[Transform]:
    """One augmentation for each view: supervised training's for one, BYOL's for two.

    The views from the third on are DINO's local crops, of side ``local_size``.
    """
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    flip = v2.RandomHorizontalFlip()
    if views == 1:
        crop = (
            v2.Compose([v2.Resize(size), v2.RandomCrop(size, padding=size // 8)])
            if size < 64
            else v2.RandomResizedCrop(size, interpolation=bicubic)
        )
        return [v2.Compose([crop, flip, *_normalised()])]
    # BYOL, arXiv 2006.07733, appendix B; DINO, arXiv 2104.14294: its crops are larger or smaller
    least = 0.2 if size < 64 else 0.08
    whole = (least if views == 2 else 0.25, 1.0)
    chances = [(size, whole, 1.0, 0.0), (size, whole, 0.1, 0.2)]
    chances += [(local_size, (0.05, 0.25), 0.5, 0.0)] * (views - 2)
    result = []
    for side, scale, blurred, solarized in chances:
        crop = v2.RandomResizedCrop(side, scale, interpolation=bicubic)
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        steps = [crop, flip, jitter, v2.RandomGrayscale(0.2)]
        if size >= 64:  # small images are not blurred
            steps.append(v2.RandomApply([Blur(0.1, 2.0)], p=blurred))
        steps.append(v2.RandomSolarize(128, p=solarized))
        result.append(v2.Compose([*steps, *_normalised()]))
    return result


class Blur(nn.Module):
    """A Gaussian blur of a PIL image, with a random radius; far faster than torchvision's."""

    def __init__(self, least: float, most: float) -> None:
        super().__init__()
        self.least, self.most = least, most

    def forward(self, image: Any) -> Any:
        """Return the blurred image."""
        from PIL import ImageFilter

        radius = torch.empty(()).uniform_(self.least, self.most).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


def _normalised() -> list[Any]:
    from torchvision.transforms import v2

    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), _norm()]


def _norm() -> Any:
    from torchvision.transforms import v2

    # ImageNet's means and deviations
    return v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _test_part(root: Path) -> str:
    return next((part for part in ("val", "test") if (root / part).is_dir()), "val")


def _checked(root: Path, part: str) -> Path:
    """The folder of a part, after a check that all classes have images that are not empty."""
    path = root / part
    if not path.is_dir():
        raise ValueError(
            f"data_root={root}: there is no folder {part}; allowed: train/CLASS/* and val/CLASS/* "
            "or test/CLASS/*"
        )
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"data_root={root}: {part} holds no class folders")
    for folder in classes:
        images = sorted(entry for entry in folder.iterdir() if entry.is_file())
        if not images:
            raise ValueError(f"data_root={root}: {part}/{folder.name} holds no images")
        empty = next((image for image in images if image.stat().st_size == 0), None)
        if empty is not None:
            raise ValueError(f"data_root={root}: {empty.relative_to(root)} is an empty file")
        opened(str(images[0]))
    return path


def first_of_shuffle(samples: list[Any], size: int) -> list[Any]:
    """``size`` of the samples in random order, the same at every call.

    Raises:
        ValueError: there are fewer.
    """
    if not 0 < size <= len(samples):
        raise ValueError(f"train_size={size} is out of range; allowed: 1 to {len(samples)} images")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    return [samples[index] for index in order[:size].tolist()]


def epoch_keys(size: int, seed: int, epoch: int) -> list[Key]:
    """The training images of an epoch in their order, the same for every batch size."""
    token = mixed(seed, epoch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(token))
    return [(token, index) for index in order.tolist()]


def loader(images: Images, batches: Sequence[Sequence[Key]], workers: int, pin: bool) -> Any:
    """Batches of views and classes, read ahead by ``workers`` processes."""
    return DataLoader(
        cast(Dataset[Any], images),
        batch_sampler=cast(Any, batches),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_leave_stopping_to_the_trainer,
        # its own generator: the loader draws from it at every start, and a resumed run starts again
        generator=torch.Generator().manual_seed(0),
    )


def _as_it_is(batch: T) -> T:
    return batch


def _leave_stopping_to_the_trainer(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def usable(size: int, batches: Sequence[int]) -> int:
    """Number of images used in an epoch: the largest that every batch size divides.

    So all runs see the same number of images; different images are left out in each epoch.

    Raises:
        ValueError: there are too few for one batch of each size.
    """
    unit = math.lcm(*batches)
    if size < unit:
        raise ValueError(
            f"{size} training images are too few for batches of {sorted(set(batches))}; allowed: "
            f"at least {unit}, which all of them divide"
        )
    return size // unit * unit


def mixed(*numbers: int) -> int:
    """Hash several numbers to one seed."""
    result = 0
    for number in numbers:
        result = (result * 1_000_003 + number + 1) % (2**63)
    return result
