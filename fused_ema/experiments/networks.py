"""Networks of the experiments: timm's backbones, and the heads of BYOL and DINO."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from .recipe import ImageRecipe

DIGITS = "resnet-digits"


def backbone(recipe: ImageRecipe, channels: int, classes: int) -> Any:
    """A network with ``classes`` outputs; if that is 0, one that returns features."""
    import timm

    if recipe.model == DIGITS:
        return resnet_for_digits(channels, classes)
    options: dict[str, Any] = {}
    if recipe.model.startswith("vit"):
        # views of several sizes, as DINO has them, share the interpolated position embedding
        options = {"img_size": recipe.image_size, "dynamic_img_size": True}
    if recipe.drop_path:
        options["drop_path_rate"] = recipe.drop_path
    model = timm.create_model(recipe.model, in_chans=channels, num_classes=classes, **options)
    if recipe.small_images:
        shrink_stem(model, recipe.model)
    return model


def check_model(recipe: ImageRecipe) -> None:
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


class DinoHead(nn.Module):
    """DINO's head (arXiv 2104.14294): an MLP, L2-normalised, and a last layer of unit rows.

    Args:
        inputs: features of the encoder.
        hidden: width of the MLP's two hidden layers.
        bottleneck: outputs of the MLP.
        outputs: outputs of the last layer.
        norm: BatchNorm after each hidden layer.
    """

    def __init__(
        self, inputs: int, hidden: int, bottleneck: int, outputs: int, *, norm: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (inputs, hidden):
            layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] * norm), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last = nn.Linear(bottleneck, outputs, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the cosines of the MLP's output with each row of the last layer."""
        return linear(normalize(self.mlp(features), dim=1), normalize(self.last.weight, dim=1))
