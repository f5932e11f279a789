"""Networks whose features and logits compare images: timm models and classifiers.

``features`` registers them by name, for metrics and the perceptual loss. Classifiers of the training data set are a
small network or one of timm's. ``evaluation.classifier`` trains them, and ``load_classifier`` reads a trained one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from maskgit_pl.checks import (
    ImageSize,
    build_dataclass,
    check_channels,
    check_class_names,
    check_image_size,
    check_integer,
    check_keys,
    height_width,
    plain_size,
)
from maskgit_pl.files import read_json
from maskgit_pl.networks.vqgan import to_unit_range
from maskgit_pl.networks.weights import load_network, read_weights, tensors_digest
from maskgit_pl.text import did_you_mean, shorten

SMALL = "small"
WEIGHT_FILE, CONFIG_FILE = "model.safetensors", "config.json"
FORMAT, _VERSION = "maskgit_pl.classifier", 1
MAX_CONFIG_BYTES = 8_000_000  # 100,000 classes with names of 80 letters

_LARGEST = {"num_classes": 100_000, "width": 4096}
_LARGEST_IMAGE = 1024
_LONGEST_NAME = 80  # letters that are compared with timm's names
_SMALLEST_MAP = 4  # largest side of the small network's last feature map, in pixels
_MEAN, _DEVIATION = 0.5, 0.25  # of pixels in [0, 1]; near those of most data


class FeatureOutput(NamedTuple):
    """The output of a feature network.

    Attributes:
        features: (B, F) float, pooled, before the classifier.
        logits: (B, C) float.
        spatial: (B, S) float: some channels of a feature map, place by place, for sFID, which Inception gives;
            None leaves it out.
    """

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None


class FrozenNetwork(nn.Module):
    """A network that is never trained: its weights take no gradients, and it stays in evaluation mode."""

    def freeze(self) -> None:
        """Freezes the weights; the last call of ``__init__``, when all modules exist."""
        self.requires_grad_(requires_grad=False)
        self.eval()

    @override
    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(mode=False)


class FeatureNetwork(FrozenNetwork):
    """A frozen timm classifier with its input normalisation; gradients reach the images.

    Args:
        model: A timm model with ``forward_features``, ``forward_head`` and ``get_classifier``.
        size: Side in pixels to which images are resized.
        mean: Mean of each colour in the model's training, for pixels in [0, 1].
        std: Standard deviation of each colour in the model's training.
    """

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor  # (1, 3, 1, 1)

    def __init__(self, model: nn.Module, *, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.freeze()

    def extra_repr(self) -> str:
        return f"size={self.size}"

    def forward(self, images: Tensor) -> FeatureOutput:
        """Returns features and logits.

        Args:
            images: (B, 1 or 3, H, W), uint8 or float in [0, 1]; grey images are repeated to three colours.
        """
        x = _to_unit_range(images)
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return _run_timm(self.model, (x - self.mean) / self.std)


@dataclass(frozen=True)
class ClassifierSizes:
    """The sizes that decide the layers of a classifier.

    Args:
        in_channels: Channels of the images: 1 for grey, 3 for colour.
        image_size: Side of square images, or (height, width), in pixels.
        num_classes: Number of classes.
        model: ``"small"``, or the name of a model in timm, such as ``resnet50``.
        width: Channels of the small network's first convolution; the next has twice, all others four times as many.
    """

    in_channels: int
    image_size: ImageSize
    num_classes: int
    model: str = SMALL
    width: int = 24

    def __post_init__(self) -> None:
        check_channels("classifier in_channels", self.in_channels)
        for name, most in _LARGEST.items():
            check_integer(f"classifier {name}", getattr(self, name), f"[1, {most}]")
        size = check_image_size("classifier image_size", self.image_size, f"[1, {_LARGEST_IMAGE}]")
        object.__setattr__(self, "image_size", size)
        check_model(self.model)


class SmallClassifier(nn.Module):
    """The small classifier: space to depth, convolutions with BatchNorm and max-pooling down to 4 x 4, a linear layer.

    Args:
        sizes: Sizes of images and network.
    """

    def __init__(self, sizes: ClassifierSizes) -> None:
        super().__init__()
        self.sizes = sizes
        # Space to depth halves once; then as many poolings as reach a map of at most 4 x 4. Poolings round up.
        halvings = max(0, math.ceil(math.log2(max(height_width(sizes.image_size)) / 2 / _SMALLEST_MAP)))
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
        """Returns features (B, F) and logits (B, num_classes) of images (B, C, H, W), uint8 or float in [0, 1]."""
        x = _prepare(images, channels=self.sizes.in_channels, size=height_width(self.sizes.image_size))
        # Space to depth needs even sides. Channels-last is twice as fast on a CPU.
        even = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        features: Tensor = self.features(even.contiguous(memory_format=torch.channels_last))
        return FeatureOutput(features, self.head(features))


class TimmClassifier(nn.Module):
    """A timm model with random weights, for the channels and classes of the data.

    Images keep their size if the model runs on it; otherwise (transformers, or too many halvings for small
    images) they are resized to the size that timm gives for the model.

    Args:
        sizes: Sizes of the images, and the name of the model.
    """

    def __init__(self, sizes: ClassifierSizes) -> None:
        import timm

        super().__init__()
        self.sizes = sizes
        model: Any = timm.create_model(
            sizes.model, pretrained=False, in_chans=sizes.in_channels, num_classes=sizes.num_classes
        )
        self.model: nn.Module = model
        native_size = int(model.pretrained_cfg["input_size"][-1])
        self.size: ImageSize = sizes.image_size if _can_run(model, sizes) else native_size

    def extra_repr(self) -> str:
        return f"side={self.size}"

    def forward(self, images: Tensor) -> FeatureOutput:
        """Returns features (B, F) and logits (B, num_classes) of images (B, C, H, W), uint8 or float in [0, 1]."""
        x = _prepare(images, channels=self.sizes.in_channels, size=height_width(self.size))
        return _run_timm(self.model, x.contiguous(memory_format=torch.channels_last))


class FrozenClassifier(FrozenNetwork):
    """A trained classifier, frozen in evaluation mode; gradients reach the images only.

    Args:
        network: Network with its weights.
        class_names: Name of each logit.
    """

    def __init__(self, network: SmallClassifier | TimmClassifier, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.class_names = class_names
        self.freeze()

    def forward(self, images: Tensor) -> FeatureOutput:
        """Returns features (B, F) and logits (B, num_classes) of images (B, C, H, W), uint8 or float in [0, 1]."""
        output: FeatureOutput = self.network(images)
        return output


def create_classifier(sizes: ClassifierSizes) -> SmallClassifier | TimmClassifier:
    """Builds the network with random weights."""
    return SmallClassifier(sizes) if sizes.model == SMALL else TimmClassifier(sizes)


def describe_classifier(sizes: ClassifierSizes, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the content of ``config.json``, with which the network is loaded without its data."""
    network = {**asdict(sizes), "image_size": plain_size(sizes.image_size)}
    return {"format": FORMAT, "version": _VERSION, "network": network, "class_names": list(class_names)}


def load_classifier(folder: Path) -> FrozenClassifier:
    """Loads a classifier that ``maskgit train-classifier`` or ``evaluation.classifier.obtain_classifier`` saved.

    Args:
        folder: Folder with ``config.json`` and ``model.safetensors``, such as ``runs/RUN/classifier``.
    """
    sizes, class_names = _read_config(folder)
    file = folder / WEIGHT_FILE
    network = load_network(partial(create_classifier, sizes), read_weights(file, thing="classifier"), file)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch: untyped overload
    return FrozenClassifier(network, class_names)


def _read_config(folder: Path) -> tuple[ClassifierSizes, tuple[str, ...]]:
    file = folder / CONFIG_FILE
    if not file.exists():
        raise ValueError(f"classifier {folder} has no {CONFIG_FILE}; `maskgit train-classifier` makes such a folder")
    config = read_json(file, max_bytes=MAX_CONFIG_BYTES)
    where, given = f"classifier {file}", (config.get("format"), config.get("version"))
    if given != (FORMAT, _VERSION):
        raise ValueError(f"{where} must have format and version {(FORMAT, _VERSION)}, got {given}; train it again")
    check_keys(where, config, known=config, required=("network", "class_names"))
    sizes = build_dataclass(ClassifierSizes, config["network"], f"{where}: network")
    return sizes, check_class_names(f"{where}: class_names", config["class_names"], sizes.num_classes)


def check_model(name: str) -> None:
    """Checks that a classifier of a name exists; see ``check_timm_model``."""
    if name != SMALL:
        check_timm_model("classifier model", name, others=(SMALL,))


def check_timm_model(what: str, name: str, *, others: tuple[str, ...] = ()) -> None:
    """Checks that timm has a model of a name."""
    import timm  # takes half a second, which most runs need not spend

    if not timm.is_model(name):
        names = " or ".join([*map(repr, others), "a name that timm knows"])
        hint = did_you_mean(name[:_LONGEST_NAME], [*others, *timm.list_models()]) or "timm.list_models() lists all"
        raise ValueError(f"{what} must be {names}, got {shorten(name)}; {hint}")


def weights_digest(network: nn.Module) -> str:
    """Returns the sha256 of a network's layers, weights and buffers; equal digests mean equal features."""
    named = sorted([*network.named_parameters(), *network.named_buffers()])
    return tensors_digest(named, prefix=repr(network))


def _to_unit_range(images: Tensor) -> Tensor:
    """Returns images, uint8 or float in [0, 1], as float32 in [0, 1]: resizing has no bfloat16 kernel on a CPU."""
    return to_unit_range(images) if images.dtype == torch.uint8 else images.float()


def _run_timm(model: Any, x: Tensor) -> FeatureOutput:
    """Returns the features before the classifier of a timm model, and the logits of these."""
    # These methods are not those of the type nn.Module.
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    return FeatureOutput(features, model.get_classifier()(features))


def _prepare(images: Tensor, *, channels: int, size: tuple[int, int]) -> Tensor:
    """Returns images with a network's channels and size, of about zero mean and unit deviation."""
    x = _to_unit_range(images)
    # Grey images are repeated to three channels; colours become their mean.
    if x.shape[1] != channels:
        x = x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x.mean(1, keepdim=True)
    if x.shape[-2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    return (x - _MEAN) / _DEVIATION


@torch.no_grad()
def _can_run(model: nn.Module, sizes: ClassifierSizes) -> bool:
    """Returns True if a model runs on images of the data's size."""
    model.eval()  # BatchNorm needs no batch then, and keeps its statistics
    try:
        model(torch.zeros(1, sizes.in_channels, *height_width(sizes.image_size)))
    except NotImplementedError:  # an operation without shapes on the meta device: the size is not known
        raise
    except (RuntimeError, AssertionError):
        return False
    finally:
        model.train()
    return True
