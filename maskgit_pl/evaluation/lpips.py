"""LPIPS: the layers of torchmetrics with a backbone from a local torchvision file.

``reconstruction`` measures tokenizers with it. Nothing is downloaded: without the file there is no LPIPS.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from maskgit_pl.networks.weight_file import load_weights, read_weights
from maskgit_pl.registry import nearest

__all__ = ["LPIPS", "load_lpips"]

_URL = "https://download.pytorch.org/models/"
# Name of torchvision's weight file, which ends with the first digits of its SHA-256, and the minimum edge of the images
# in pixels: smaller ones vanish in the pooling layers.
_BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", 31),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 17),
    "vgg": ("vgg16-397923af.pth", 16),
}


class LPIPS(nn.Module):
    """The learned perceptual distance of pairs of images.

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

    @property
    def label(self) -> str:
        """The name of the metric, e.g. ``lpips/vgg``."""
        return f"lpips/{self.backbone}"

    @torch.no_grad()
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Computes the distance of each pair of images.

        Args:
            images: (B, 1 or 3, H, W) float in [0, 1].
            others: Images of the same shape.

        Returns:
            (B,) float32, in [0, inf).

        Raises:
            ValueError: if the images are too small for the network.
        """
        least = _BACKBONES[self.backbone][1]
        if min(images.shape[-2:]) < least:
            raise ValueError(
                f"{self.label}: the edges of images must be >= {least} pixels, got {tuple(images.shape[-2:])}; "
                "vgg accepts images from 16 pixels"
            )
        colours = [part.expand(-1, 3, -1, -1) for part in (images, others)]  # grey images get 3 equal channels
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
    name = _BACKBONES[backbone][0]
    if not place or not Path(place).is_file():
        raise ValueError(
            f"lpips must be {backbone}=FILE with an existing file, got {text!r}; download the file from {_URL}{name}"
        )
    # torch.save files may run code when they are read: only a file with the right SHA-256 is opened.
    digits = Path(name).stem.rpartition("-")[2] if sha256 is None else sha256
    state = read_weights(Path(place), thing=f"lpips {backbone!r}", sha256=digits)
    # torchmetrics ships the weights w. pnet_rand makes a random backbone, so that torchvision downloads nothing.
    network = _NoTrainLpips(net=backbone, pnet_rand=True)  # type: ignore[arg-type]  # one of its names
    parameters = dict(network.net.named_parameters())
    # torchmetrics splits torchvision's ``features`` into slices; their parameters have other names there.
    wanted = {key: _name_in_file(key) for key in parameters}
    if any(name not in state or state[name].shape != parameters[key].shape for key, name in wanted.items()):
        raise ValueError(f"lpips {backbone!r}: weights must be torchvision's {name}, got {place} with other tensors")
    load_weights(network.net, {key: state[name] for key, name in wanted.items()}, f"lpips {backbone!r} {place}")
    return LPIPS(backbone, network).eval().to(device)


def _name_in_file(key: str) -> str:
    """Returns the torchvision name of a parameter of torchmetrics.

    Layer 3 of torchvision's ``features`` is ``slice2.3`` in AlexNet and VGG, and ``slices.1.3`` in SqueezeNet.
    """
    parts = key.split(".")
    return ".".join(["features", *parts[2 if parts[0] == "slices" else 1 :]])
