"""Perceptual distances by name: what the perceptual loss of stage 1 compares images with.

``lpips`` and those of other packages (entry point group ``maskgit_pl.perceptual_networks``) compare two images
themselves. Any feature network (``timm``, ``classifier`` ...) compares them by its logits or its pooled features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from maskgit_pl.checks import shorten
from maskgit_pl.networks.feature_network import FrozenNetwork
from maskgit_pl.networks.features import FeatureNetworkSpec, feature_networks
from maskgit_pl.registry import Registry, nearest

__all__ = [
    "FeatureDistance",
    "PerceptualOutput",
    "PerceptualSpec",
    "build_perceptual",
    "create_distance",
    "perceptual_networks",
]

PerceptualOutput = Literal["logits", "features"]


class PerceptualSpec(Protocol):
    """A registered perceptual distance: a frozen dataclass of the values in a recipe, which builds the module."""

    @property
    def min_image_size(self) -> int:
        """The smallest side of an image that the network supports, in pixels."""
        ...

    def create(self) -> nn.Module:
        """Builds the frozen module: two (B, C, H, W) float images in [0, 1] to distances (B,), float in [0, inf)."""
        ...


def _check_spec(name: str, spec: PerceptualSpec) -> None:
    if not callable(getattr(spec, "create", None)) or not isinstance(getattr(spec, "min_image_size", None), int):
        raise ValueError(
            f"perceptual network {name!r} must have a method create() and an int min_image_size, got {shorten(spec)}"
        )


perceptual_networks: Registry[PerceptualSpec] = Registry(
    "perceptual network",
    "maskgit_pl.perceptual_networks",
    check=_check_spec,
    modules=("maskgit_pl.networks.lpips",),
)


class FeatureDistance(FrozenNetwork):
    """The mean squared difference of an output of a feature network, for each pair of images.

    Args:
        network: Feature network.
        output: Output that is compared.
    """

    def __init__(self, network: nn.Module, output: PerceptualOutput) -> None:
        super().__init__()
        self.network = network
        self.output = output
        self.freeze()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Returns (B,) float32 distances of images (B, C, H, W) float in [0, 1]."""
        # Constants, such as the real images, keep no activations: frozen weights take no gradients.
        ours, theirs = (getattr(self.network(part), self.output).float() for part in (images, others))
        out: Tensor = (ours - theirs).square().flatten(1).mean(1)
        return out


def build_perceptual(
    spec: str | Mapping[str, Any], output: PerceptualOutput = "logits"
) -> PerceptualSpec | FeatureNetworkSpec:
    """Builds the spec of a perceptual distance, or of the feature network of that name.

    Args:
        spec: Name, or mapping with the key ``name`` and arguments.
        output: Output of a feature network that is compared.

    Raises:
        ValueError: if the name or an argument is unknown or wrong, or a distance by itself is to compare ``features``.
    """
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if name in perceptual_networks.names():
        if output != "logits":
            raise ValueError(f"output must be left out with network {name!r}, which compares images, got {output!r}")
        return perceptual_networks.build(spec)
    known = [*perceptual_networks.names(), *feature_networks.names()]
    if isinstance(name, str) and name not in known:
        raise ValueError(f"unknown perceptual network {shorten(name)}: {nearest(name, known)}")
    return feature_networks.build(spec)


def create_distance(spec: str | Mapping[str, Any], output: PerceptualOutput = "logits") -> nn.Module:
    """Builds the frozen module of a perceptual distance: two (B, C, H, W) float images in [0, 1] to (B,) float32.

    Raises:
        ValueError: if its weights cannot be read.
    """
    built = build_perceptual(spec, output)
    network = built.create()
    is_distance = not hasattr(built, "knows_classes")  # which feature networks have
    return network if is_distance else FeatureDistance(network, output)
