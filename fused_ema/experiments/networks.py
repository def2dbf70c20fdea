"""Networks of the experiments: timm's backbones, and the heads of BYOL."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from .recipe import Recipe

DIGITS = "resnet-digits"


def backbone(recipe: Recipe, channels: int, classes: int) -> Any:
    """A network with ``classes`` outputs; if that is 0, one that returns features."""
    import timm

    if recipe.model == DIGITS:
        return resnet_for_digits(channels, classes)
    options = {"img_size": recipe.image_size} if recipe.model.startswith("vit") else {}
    model = timm.create_model(recipe.model, in_chans=channels, num_classes=classes, **options)
    if recipe.small_images:
        shrink_stem(model, recipe.model)
    return model


def check_model(recipe: Recipe) -> None:
    """Raise ValueError if timm has no such model."""
    import timm

    if recipe.model != DIGITS and not timm.is_model(recipe.model):
        raise ValueError(f"model={recipe.model!r} is none of timm's; see timm.list_models()")


def resnet_for_digits(channels: int, classes: int) -> nn.Module:
    """A ResNetv2 of two blocks for 8 x 8 images, with 7 k parameters and 32 features."""
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    model = ResNetV2(
        [1, 1],
        (16, 32),
        num_classes=classes,
        in_chans=channels,
        stem_chs=16,
        basic=True,
        norm_layer=BatchNormAct2d,
        conv_layer=create_conv2d,
    )
    model.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
    return cast(nn.Module, model)


def shrink_stem(model: Any, name: str) -> None:
    """Adapt a ResNet of timm to small images: a 3x3 convolution first, and no pooling."""
    if not isinstance(getattr(model, "conv1", None), nn.Conv2d):
        raise ValueError(f"small_images=yes with model={name!r}; allowed: a ResNet of timm")
    first = model.conv1
    model.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A projector or predictor of BYOL (arXiv 2006.07733, section 3.3)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )
