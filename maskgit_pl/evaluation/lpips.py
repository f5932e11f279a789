"""LPIPS, from torchmetrics' layers and a local file of torchvision's backbone; no other distance has its name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from maskgit_pl.networks.weight_file import load_weights, read_weights
from maskgit_pl.registry import nearest

__all__ = ["LPIPS", "load_lpips"]

_URL = "https://download.pytorch.org/models/"
# torchvision's file, which ends with the first digits of its sha256, and the smallest images that the network takes.
_BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", 31),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 17),
    "vgg": ("vgg16-397923af.pth", 16),
}


class LPIPS(nn.Module):
    """The learned perceptual distance of pairs of images.

    Args:
        backbone: ``alex``, ``squeeze`` or ``vgg``.
        network: (B, 3, H, W) and the same, in [0, 1] -> (B, 1, 1, 1).

    Source: Zhang et al., arXiv:1801.03924.
    """

    def __init__(self, backbone: str, network: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = network

    @property
    def label(self) -> str:
        """After which the number is named, e.g. ``lpips/vgg``."""
        return f"lpips/{self.backbone}"

    @torch.no_grad()
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two times (B, 1 or 3, H, W) float in [0, 1] -> (B,) float32.

        Raises:
            ValueError: if the images are too small for the network.
        """
        least = _BACKBONES[self.backbone][1]
        if min(images.shape[-2:]) < least:
            raise ValueError(
                f"{self.label}: images of at least {least} pixels are needed, got {tuple(images.shape[-2:])}; "
                "vgg takes 16 or more"
            )
        colours = [part.expand(-1, 3, -1, -1) for part in (images, others)]
        distances: Tensor = self.network(*colours, normalize=True)
        return distances.flatten()


def load_lpips(text: str, *, sha256: str | None = None, device: torch.device | str = "cpu") -> LPIPS:
    """Loads LPIPS with the backbone's weights of a file.

    Args:
        text: ``vgg=FILE``, ``alex=FILE`` or ``squeeze=FILE``, the file being torchvision's.
        sha256: First digits of the file's; None is torchvision's own file.
        device: Where the network works.

    Raises:
        ValueError: Another backbone, or the file is missing or another one.
    """
    backbone, _, place = text.partition("=")
    if backbone not in _BACKBONES:
        raise ValueError(f"lpips {text!r}: a backbone of LPIPS is needed, {nearest(backbone, _BACKBONES)}")
    name = _BACKBONES[backbone][0]
    if not place or not Path(place).is_file():
        raise ValueError(
            f"lpips {text!r}: it is written {backbone}=FILE, and the file is {_URL}{name}; without it there is no LPIPS"
        )
    digits = Path(name).stem.rpartition("-")[2] if sha256 is None else sha256
    state = read_weights(Path(place), thing=f"lpips {backbone!r}", sha256=digits)
    network = _NoTrainLpips(net=backbone, pnet_rand=True)  # type: ignore[arg-type]  # one of its names
    parameters = dict(network.net.named_parameters())
    wanted = {key: _name_in_file(key) for key in parameters}
    if any(name not in state or state[name].shape != parameters[key].shape for key, name in wanted.items()):
        raise ValueError(f"lpips {backbone!r} weights: torchvision's {name} is needed, got {place} with other tensors")
    load_weights(network.net, {key: state[name] for key, name in wanted.items()}, f"lpips {backbone!r} {place}")
    return LPIPS(backbone, network).eval().to(device)


def _name_in_file(key: str) -> str:
    """Returns a name in torchvision: ``slice2.3.weight``, ``slices.1.3.squeeze.weight`` are layer 3 of ``features``."""
    parts = key.split(".")
    return ".".join(["features", *parts[2 if parts[0] == "slices" else 1 :]])
