"""Classifiers of the data set at hand: a small network, or any of timm's; what training keeps is read here again.

``evaluation.classifier_training`` trains them; ``features.ClassifierSpec`` measures with them.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.checks import build_dataclass, check_class_names, check_integer, check_keys, shorten
from maskgit_pl.files import read_json
from maskgit_pl.networks.feature_network import FeatureOutput, FrozenNetwork
from maskgit_pl.networks.weight_file import check_fit, load_weights, read_tensor_header, read_tensors

__all__ = [
    "CONFIG_FILE",
    "MAX_CONFIG_BYTES",
    "SMALL",
    "WEIGHT_FILE",
    "ClassifierSizes",
    "FrozenClassifier",
    "SmallClassifier",
    "TimmClassifier",
    "check_model",
    "create_classifier",
    "describe_classifier",
    "load_classifier",
]

SMALL = "small"
WEIGHT_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_FORMAT, _VERSION = "maskgit_pl.classifier", 1
MAX_CONFIG_BYTES = 8_000_000  # 100,000 classes with names of 80 letters
_LARGEST = {"in_channels": 1024, "image_size": 1024, "num_classes": 100_000, "width": 4096}
_LONGEST_NAME = 80  # letters that are compared with timm's names
_SMALLEST_MAP = 4  # pixels along an edge of the small network's last feature map, at most
_MEAN, _DEVIATION = 0.5, 0.25  # of pixels in [0, 1]; near those of most data


@dataclass(frozen=True)
class ClassifierSizes:
    """The sizes that decide the layers of a classifier.

    Args:
        in_channels: Channels of an image: 1 for grey, 3 for colour.
        image_size: Edge of the square images, in pixels.
        num_classes: Classes.
        model: ``"small"``, or timm's name of a network, e.g. ``resnet50``.
        width: Of the small one: channels of the first convolution; each further one has twice as many, up to 4 times.

    Raises:
        ValueError: A number out of range, or timm has no such network.
    """

    in_channels: int
    image_size: int
    num_classes: int
    model: str = SMALL
    width: int = 24

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            check_integer(f"classifier {name}", getattr(self, name), f"[1, {most}]")
        check_model(self.model)


def check_model(name: str) -> None:
    """Refuses a network that there is not.

    Raises:
        ValueError: With the nearest names.
    """
    if name == SMALL or timm.is_model(name):
        return
    close = difflib.get_close_matches(name[:_LONGEST_NAME], [SMALL, *timm.list_models()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists all"
    raise ValueError(f"classifier model must be {SMALL!r} or a name that timm knows, got {shorten(name)}; {hint}")


class SmallClassifier(nn.Module):
    """Space to depth, convolutions with BatchNorm and max-pooling down to 4 x 4, a mean over places, a linear layer.

    Args:
        sizes: Of the images, and the width.
    """

    def __init__(self, sizes: ClassifierSizes) -> None:
        super().__init__()
        self.sizes = sizes
        halvings = max(0, math.ceil(math.log2(sizes.image_size / 2 / _SMALLEST_MAP)))
        widths = [sizes.width * 2 ** min(level, 2) for level in range(halvings + 1)]
        inputs = [4 * sizes.in_channels, *widths[:-1]]
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(zip(inputs, widths, strict=True)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if level < halvings else []
        self.features = nn.Sequential(nn.PixelUnshuffle(2), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], sizes.num_classes)

    def extra_repr(self) -> str:
        return f"side={self.sizes.image_size}"

    def forward(self, images: Tensor) -> FeatureOutput:
        """(B, 1 or 3, H, W), uint8 or float in [0, 1] -> features (B, F) and logits (B, classes)."""
        x = _prepared(images, channels=self.sizes.in_channels, side=self.sizes.image_size)
        even = F.pad(x, (0, self.sizes.image_size % 2, 0, self.sizes.image_size % 2))
        features: Tensor = self.features(even.contiguous(memory_format=torch.channels_last))  # twice as fast on a CPU
        return FeatureOutput(features, self.head(features))


class TimmClassifier(nn.Module):
    """A network of timm with random weights, for the channels and classes of the data.

    Images stay at their own size where the network takes them; else (transformers, or too many halvings for small
    images) they are resized to the size that timm names for it.

    Args:
        sizes: Of the images, and the network's name.
    """

    def __init__(self, sizes: ClassifierSizes) -> None:
        super().__init__()
        self.sizes = sizes
        model: Any = timm.create_model(
            sizes.model, pretrained=False, in_chans=sizes.in_channels, num_classes=sizes.num_classes
        )
        self.model: nn.Module = model
        self.side = sizes.image_size if _takes(model, sizes) else int(model.pretrained_cfg["input_size"][-1])

    def extra_repr(self) -> str:
        return f"side={self.side}"

    def forward(self, images: Tensor) -> FeatureOutput:
        """(B, 1 or 3, H, W), uint8 or float in [0, 1] -> features (B, F) and logits (B, classes)."""
        x = _prepared(images, channels=self.sizes.in_channels, side=self.side)
        model: Any = self.model  # timm's methods, which nn.Module's type does not have
        last = model.forward_features(x.contiguous(memory_format=torch.channels_last))
        features = model.forward_head(last, pre_logits=True)
        return FeatureOutput(features, model.get_classifier()(features))


class FrozenClassifier(FrozenNetwork):
    """A trained classifier: it stays in evaluation mode, and gradients reach the images alone.

    Args:
        network: With its weights.
        class_names: One for each of its logits.
    """

    def __init__(self, network: SmallClassifier | TimmClassifier, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.class_names = class_names
        self.freeze()

    def forward(self, images: Tensor) -> FeatureOutput:
        """(B, 1 or 3, H, W), uint8 or float in [0, 1] -> features (B, F) and logits (B, classes)."""
        output: FeatureOutput = self.network(images)
        return output


def create_classifier(sizes: ClassifierSizes) -> SmallClassifier | TimmClassifier:
    """Makes the network with random weights."""
    return SmallClassifier(sizes) if sizes.model == SMALL else TimmClassifier(sizes)


def describe_classifier(sizes: ClassifierSizes, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Returns what ``config.json`` says so that the network can be read without the data it was trained on."""
    return {"format": _FORMAT, "version": _VERSION, "network": asdict(sizes), "class_names": list(class_names)}


def load_classifier(folder: Path) -> FrozenClassifier:
    """Reads what ``maskgit train-classifier`` or ``evaluation.classifier_training.obtain_classifier`` has kept.

    Args:
        folder: With ``config.json`` and ``model.safetensors``, e.g. ``runs/RUN/classifier``.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if a file is missing, of another kind or of another version, a value is out of range, or the weights
            do not fit or are not finite.
    """
    sizes, class_names = _read_config(folder)
    weights = folder / WEIGHT_FILE
    with torch.device("meta"):  # without memory, for the file may hold less than its configuration says
        check_fit(create_classifier(sizes), read_tensor_header(weights), f"weights {weights}")
    network = create_classifier(sizes)
    load_weights(network, read_tensors(weights), weights)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch: untyped overload
    return FrozenClassifier(network, class_names)


def _read_config(folder: Path) -> tuple[ClassifierSizes, tuple[str, ...]]:
    file = folder / CONFIG_FILE
    if not file.exists():
        raise ValueError(f"classifier {folder}: no {CONFIG_FILE} there; `maskgit train-classifier` makes such a folder")
    config = read_json(file, max_bytes=MAX_CONFIG_BYTES)
    for key, expected in (("format", _FORMAT), ("version", _VERSION)):
        found = config.get(key)
        if found != expected or isinstance(found, bool):
            raise ValueError(f"classifier {file}: {key} must be {expected!r}, got {shorten(found)}; train it anew")
    where = f"classifier {file}"
    check_keys(where, config, known=config, required=("network", "class_names"))
    sizes = build_dataclass(ClassifierSizes, config["network"], f"{where}: network")
    return sizes, check_class_names(f"{where}: class_names", config["class_names"], sizes.num_classes)


def _prepared(images: Tensor, *, channels: int, side: int) -> Tensor:
    """Prepares images for a network: of its channels, its size, and about zero mean and unit deviation."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    if x.shape[1] != channels:
        x = x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x.mean(1, keepdim=True)
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return (x - _MEAN) / _DEVIATION


@torch.no_grad()
def _takes(model: nn.Module, sizes: ClassifierSizes) -> bool:
    """Returns whether a network runs on images of the data's size."""
    model.eval()
    try:
        model(torch.zeros(1, sizes.in_channels, sizes.image_size, sizes.image_size))
    except (RuntimeError, AssertionError):
        return False
    finally:
        model.train()
    return True
