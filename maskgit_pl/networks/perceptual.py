"""Perceptual distances by name: what the perceptual loss of stage 1 compares images with.

``lpips`` (also a measurement of reconstructions) and the distances of other packages (entry point group
``maskgit_pl.perceptual_networks``) compare two images themselves. Any feature network (``timm``, ``classifier`` ...)
compares them by its logits or its pooled features. Nothing is downloaded: LPIPS has the layers that torchmetrics ships,
and a backbone from a local torchvision file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from maskgit_pl.checks import check_choice, shorten
from maskgit_pl.networks.feature_networks import FrozenNetwork
from maskgit_pl.networks.features import FeatureNetworkSpec, feature_networks
from maskgit_pl.networks.weights import load_weights, read_weights
from maskgit_pl.registry import Registry, nearest

__all__ = [
    "LPIPS",
    "FeatureDistance",
    "LPIPSSpec",
    "PerceptualOutput",
    "PerceptualSpec",
    "build_perceptual",
    "create_distance",
    "load_lpips",
    "perceptual_networks",
]

PerceptualOutput = Literal["logits", "features"]

_URL = "https://download.pytorch.org/models/"
# Torchvision's weight files, whose names end with the first digits of their SHA-256.
_BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "vgg": "vgg16-397923af.pth",
}


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
)


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


@perceptual_networks.register("lpips")
@dataclass(frozen=True)
class LPIPSSpec:
    """LPIPS, the learned distance of layers of a classifier; see ``LPIPS``.

    Attributes:
        weights: Path of torchvision's weight file of the backbone. torchmetrics ships the weights of the layers.
        backbone: ``vgg`` (that of taming-transformers and LlamaGen), ``alex`` or ``squeeze``.
        sha256: First digits of the file's sha256; None for those of torchvision's file.

    Raises:
        ValueError: if the backbone is unknown.
    """

    weights: str
    backbone: Literal["vgg", "alex", "squeeze"] = "vgg"
    sha256: str | None = None

    _MIN_SIZES: ClassVar[Mapping[str, int]] = {"alex": 31, "squeeze": 17, "vgg": 16}

    def __post_init__(self) -> None:
        check_choice("backbone", self.backbone, sorted(self._MIN_SIZES))

    @property
    def min_image_size(self) -> int:
        """The smallest side of an image that does not vanish in the pooling layers, in pixels."""
        return self._MIN_SIZES[self.backbone]

    def create(self) -> nn.Module:
        """Builds the module.

        Raises:
            ValueError: if the file is missing, or is not torchvision's.
        """
        return _read_lpips(self.backbone, Path(self.weights), sha256=self.sha256)


class LPIPS(FrozenNetwork):
    """The learned perceptual distance of pairs of images; gradients reach the images.

    ::

        distance = sum over layers l of mean over pixels of sum over channels c of w_lc (f_lc(x) - f_lc(y))^2

    Here f_l are features of unit length over the channels, and w_l are learned weights.

    Args:
        backbone: ``alex``, ``squeeze`` or ``vgg``.
        network: Two (B, 3, H, W) float tensors in [0, 1] -> (B, 1, 1, 1).

    Source: Zhang et al., arXiv:1801.03924.
    """

    def __init__(self, backbone: str, network: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = network
        self.freeze()

    @property
    def label(self) -> str:
        """The name of the metric, e.g. ``lpips/vgg``."""
        return f"lpips/{self.backbone}"

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Computes the distance of each pair of images.

        Args:
            images: (B, C, H, W) float in [0, 1] with C = 1 or 3.
            others: Images of the same shape.

        Returns:
            (B,) float32, in [0, inf).

        Raises:
            ValueError: if the images are too small for the network.
        """
        least = LPIPSSpec("", self.backbone).min_image_size  # type: ignore[arg-type]  # one of its names
        if min(images.shape[-2:]) < least:
            raise ValueError(
                f"{self.label}: the edges of images must be >= {least} pixels, got {tuple(images.shape[-2:])}; "
                "vgg accepts images from 16 pixels"
            )
        # Grey images get 3 equal channels.
        colours = [part.float().expand(-1, 3, -1, -1) for part in (images, others)]
        distances: Tensor = self.network(*colours, normalize=True)
        return distances.flatten()


def load_lpips(text: str, *, sha256: str | None = None, device: torch.device | str = "cpu") -> LPIPS:
    """Loads LPIPS with the weights of a backbone from a file.

    Args:
        text: ``vgg=FILE``, ``alex=FILE`` or ``squeeze=FILE``, where FILE is torchvision's weight file.
        sha256: First hex digits of the file's SHA-256; None for those of torchvision's file.
        device: Device of the network.

    Raises:
        ValueError: if the backbone is unknown, the file is missing, or the file is not torchvision's.
    """
    backbone, _, place = text.partition("=")
    if backbone not in _BACKBONES:
        raise ValueError(f"lpips {text!r}: unknown backbone {backbone!r}; {nearest(backbone, _BACKBONES)}")
    if not place or not Path(place).is_file():
        raise ValueError(f"lpips must be {backbone}=FILE with an existing file, got {text!r}; {_way_out(backbone)}")
    return _read_lpips(backbone, Path(place), sha256=sha256).to(device)


def _read_lpips(backbone: str, file: Path, *, sha256: str | None = None) -> LPIPS:
    """Builds LPIPS with the weights of a backbone from torchvision's file; see ``load_lpips``."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips  # imports torchvision

    if not file.is_file():
        raise ValueError(f"lpips {backbone!r} weights must be an existing file, got {file}; {_way_out(backbone)}")
    name = _BACKBONES[backbone]
    # torch.save files may run code when they are read: only a file with the right SHA-256 is opened.
    digits = Path(name).stem.rpartition("-")[2] if sha256 is None else sha256
    state = read_weights(file, thing=f"lpips {backbone!r}", sha256=digits)
    # torchmetrics ships the weights w. pnet_rand makes a random backbone, so that torchvision downloads nothing.
    network = _NoTrainLpips(net=backbone, pnet_rand=True)  # type: ignore[arg-type]  # one of its names
    parameters = dict(network.net.named_parameters())
    # torchmetrics splits torchvision's ``features`` into slices; their parameters have other names there.
    wanted = {key: _name_in_file(key) for key in parameters}
    if any(name not in state or state[name].shape != parameters[key].shape for key, name in wanted.items()):
        raise ValueError(f"lpips {backbone!r}: weights must be torchvision's {name}, got {file} with other tensors")
    load_weights(network.net, {key: state[name] for key, name in wanted.items()}, f"lpips {backbone!r} {file}")
    return LPIPS(backbone, network).eval()


def _way_out(backbone: str) -> str:
    return f"download the file from {_URL}{_BACKBONES[backbone]}"


def _name_in_file(key: str) -> str:
    """Returns the torchvision name of a parameter of torchmetrics.

    Layer 3 of torchvision's ``features`` is ``slice2.3`` in AlexNet and VGG, and ``slices.1.3`` in SqueezeNet.
    """
    parts = key.split(".")
    return ".".join(["features", *parts[2 if parts[0] == "slices" else 1 :]])
