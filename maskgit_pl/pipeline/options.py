"""Options of the methods of ``MaskGIT``: their names, types and checks.

A method takes the fields of its options class and the decoding settings as keyword arguments. The command line makes
flags of them, so that only ``as_output`` imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar, Union, get_args

from einops import rearrange

from maskgit_pl.checks import check_choice, check_integer, check_number, check_seed, plain_list, plain_number, shorten
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.sampling import DrawMethod, Temperature
from maskgit_pl.pipeline.regions import check_blend, check_dilation
from maskgit_pl.registry import nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from _typeshed import DataclassInstance
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.pipeline.negative import NegativeModelLike

__all__ = [
    "MAX_RESULTS",
    "SETTINGS",
    "Classes",
    "DecodingKeywords",
    "DecodingSettings",
    "EditKeywords",
    "EditOptions",
    "GenerateKeywords",
    "GenerateOptions",
    "Images",
    "OutputType",
    "Seeds",
    "StepCallback",
    "as_output",
    "check_output_type",
    "class_ids",
    "parse_class",
    "parse_classes",
    "read_options",
    "replace_settings",
    "seed_list",
]

Classes: TypeAlias = int | str | Sequence[int | str | None]
OutputType = Literal["pil", "pt", "np"]
Images: TypeAlias = Union[list["Image.Image"], "Tensor", "npt.NDArray[np.uint8]"]
Seeds: TypeAlias = int | Sequence[int]
StepCallback: TypeAlias = Callable[["DecodingStep"], object]
Options = TypeVar("Options", bound="DataclassInstance")

MAX_RESULTS = 10_000
"""The largest number of images of one class or edit at a time: 2 GB of RGB pixels for images of 256 x 256."""
_MAX_LISTED = 20  # with more classes, an error lists the nearest names only
_INTEGER = re.compile(r"-?[0-9]{1,18}")


class DecodingSettings(TypedDict, total=False):
    """Decoding settings as keyword arguments. What is left out, or None, is the model's own.

    Args:
        num_steps: T, number of decoding steps.
        token_selector: Token selector: a name such as halton, or a mapping such as {"name": "remdm", "eta": 0.1}.
        guidance: Guidance schedule: a name such as cosine, or a mapping such as {"name": "linear", "scale": 2}.
        sampling_temperature: Softmax temperature of the codes; A,B goes from A at the first step to B at the last.
        top_k: Sample from the N most likely codes only.
        top_p: Sample from the most likely codes with a total probability of X only.
        tokens_per_step: Number of tokens decided at each step, in place of the mask schedule.
        mask_schedule: Mask schedule: a name such as cosine, or a mapping (default: that of the training).
        draw_method: Method by which codes are drawn: gumbel (nearly the same images in all precisions) or inverse_cdf.
        guidance_scale: Scale of the guidance schedule, at least 0; 0 switches guidance off.
        choice_temperature: Scale of the Gumbel noise on the confidence; 0 keeps the most confident tokens.
    """

    num_steps: int | None
    token_selector: str | dict[str, Any] | None
    guidance: str | dict[str, Any] | None
    sampling_temperature: Temperature | None
    top_k: int | None
    top_p: float | None
    tokens_per_step: tuple[int, ...] | None
    mask_schedule: str | dict[str, Any] | None
    draw_method: DrawMethod | None
    guidance_scale: float | None
    choice_temperature: float | None


# Settings that replace one argument of a plug-in: name -> (field of DecodingConfig, argument, range).
_ARGUMENTS = {
    "guidance_scale": ("guidance", "scale", "[0, 10000]"),
    "choice_temperature": ("token_selector", "choice_temperature", "[0, inf)"),
}
SETTINGS = tuple(DecodingSettings.__annotations__)
"""The names of all decoding settings: the fields of ``DecodingConfig``, ``guidance_scale``, ``choice_temperature``."""


class DecodingKeywords(DecodingSettings, total=False):
    """Decoding settings, and ``decoding`` in place of the model's own, which single settings override."""

    decoding: DecodingConfig | None


class GenerateKeywords(DecodingKeywords, total=False):
    """Keyword arguments of ``MaskGIT.generate``: decoding settings, and the fields of ``GenerateOptions``."""

    seed: Seeds
    negative_classes: int | str | Classes | None
    negative_model: NegativeModelLike | None
    vectors: npt.ArrayLike | Tensor | None
    batch_size: int
    callback: StepCallback | None


class EditKeywords(GenerateKeywords, total=False):
    """Keyword arguments of the editing methods: those of ``generate``, and the fields of ``EditOptions``."""

    dilation: int | None
    blend: float | None
    fit: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of ``MaskGIT.generate`` besides the decoding settings.

    Args:
        seed: Seed of the first result in [0, 2**32), result i has seed + i; or a list with one seed for each.
        negative_classes: Index or name of the class that guidance moves away from, or a list with one for each result;
            "no class" by default.
        negative_model: Weaker model of the same tokens from which guidance moves away, in place of "no class": a run or
            pretrained folder, a repository of the Hub, or a ``MaskGIT`` on the same device. By default the pipeline's
            own, if it has one.
        vectors: (n, C) float array or tensor with the vector of each result, or (C,) for all, for a model that was
            trained with vectors of C values.
        batch_size: Number of results decoded at a time, at least 1. It changes no token.
        callback: Called with a ``decoding.DecodingStep`` after each decoding step of each batch.

    Raises:
        ValueError: if ``batch_size`` is not an integer >= 1.
        TypeError: if ``callback`` is not a function.
    """

    seed: Seeds = 0
    negative_classes: int | str | Classes | None = None
    negative_model: NegativeModelLike | None = None
    vectors: npt.ArrayLike | Tensor | None = None
    batch_size: int = 64
    callback: StepCallback | None = None

    def __post_init__(self) -> None:
        batch_size = check_integer("batch_size", plain_number(self.batch_size), "[1, inf)")
        object.__setattr__(self, "batch_size", batch_size)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be a function of a DecodingStep, got {shorten(self.callback)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditOptions(GenerateOptions):
    """Options of the editing methods besides the decoding settings.

    Args:
        dilation: Number of tokens by which the region grows on each side, at least 0. By default 1 inside an image, as
            in the released code (the seam then lies outside the mask), and 0 beyond its borders.
        blend: Standard deviation of the blur of the seam in pixels, in [0, 65536]. 0 keeps every pixel outside the
            region bit by bit. None is the blur of the released code, ``pipeline.regions.seam_radius``.
        fit: True crops images and masks of another size to their central part with the model's shape, and resizes it.

    Raises:
        ValueError: if a number is out of range.
        TypeError: if ``fit`` is not a bool.
    """

    dilation: int | None = None
    blend: float | None = None
    fit: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dilation is not None:
            object.__setattr__(self, "dilation", check_dilation(self.dilation))
        if self.blend is not None:
            object.__setattr__(self, "blend", check_blend(self.blend))
        if not isinstance(self.fit, bool):
            raise TypeError(f"fit must be True or False, got {shorten(self.fit)}")


def read_options(kind: type[Options], given: Mapping[str, Any], own: DecodingConfig) -> tuple[Options, DecodingConfig]:
    """Splits keyword arguments into options and decoding settings.

    Args:
        kind: Dataclass of the options.
        given: Keyword arguments: fields of ``kind``, names of ``SETTINGS``, and ``decoding``.
        own: Default decoding settings of the model.

    Returns:
        The options and the decoding settings.

    Raises:
        TypeError: if a name is unknown. The message names the nearest one.
        ValueError: if a value is out of range.
    """
    # One namespace for both, so that a mistyped option is never taken for a setting.
    names = [field.name for field in dataclasses.fields(kind)]
    _check_names(given, [*names, *SETTINGS, "decoding"])
    options = kind(**{name: value for name, value in given.items() if name in names})
    return options, replace_settings(own, {name: value for name, value in given.items() if name not in names})


def replace_settings(own: DecodingConfig, settings: Mapping[str, Any]) -> DecodingConfig:
    """Returns decoding settings with some of them replaced.

    ``tokens_per_step`` without ``num_steps`` sets both. A new ``num_steps`` removes the ``tokens_per_step`` of ``own``,
    which has another length; a ``mask_schedule`` removes it, too, because it would have no effect beside the list.

    Args:
        own: Settings to start from.
        settings: New values by the names of ``SETTINGS``. None keeps a setting. ``decoding`` replaces ``own``.

    Raises:
        TypeError: if a setting is unknown, or ``decoding`` is not a ``DecodingConfig``.
        ValueError: if a value is out of range, or both ``mask_schedule`` and ``tokens_per_step`` are given.
    """
    _check_names(settings, [*SETTINGS, "decoding"])
    given = {name: value for name, value in settings.items() if value is not None}
    config = given.pop("decoding", own)
    if not isinstance(config, DecodingConfig):
        raise TypeError(
            f"decoding must be a DecodingConfig, got {shorten(config)}; give single settings as options, or a file to "
            "from_pretrained"
        )
    # The list has one number for each step, so that it must agree with num_steps. It takes the place of the schedule.
    if "tokens_per_step" in given:
        if "mask_schedule" in given:
            raise ValueError(
                "mask_schedule must be left out with tokens_per_step, which takes its place, got "
                f"{shorten(given['mask_schedule'])}; give one of the two"
            )
        counts = plain_list(given["tokens_per_step"])
        if counts is not None:
            given = {"num_steps": len(counts), **given, "tokens_per_step": counts}
    elif "mask_schedule" in given or (
        isinstance(steps := plain_number(given.get("num_steps")), int) and steps != config.num_steps
    ):
        given["tokens_per_step"] = None
    # guidance_scale and choice_temperature are arguments of plug-ins: they go into the spec of the plug-in.
    for name, (part, argument, interval) in _ARGUMENTS.items():
        if name in given:
            value = check_number(name, plain_number(given.pop(name)), interval)
            given[part] = _with_argument(given.get(part, getattr(config, part)), argument, value)
    return dataclasses.replace(config, **given)


def class_ids(classes: Classes, names: Sequence[str], *, null_label: int | None) -> list[int]:
    """Returns the labels of classes given by index or by name; None is "no class".

    Args:
        classes: A list of indices in [0, number of classes), names and None; or a single index or name.
        names: Names of all classes in order.
        null_label: Label of "no class"; None if the model was trained without it.

    Raises:
        ValueError: if the list is empty, a class is unknown, a name belongs to several classes, or None is given to
            a model that was trained without "no class".
        TypeError: if a class is neither an integer nor a string.
    """
    given = plain_list(classes)
    if given is None:  # a single class
        given = [plain_number(classes)]
        if not isinstance(given[0], str | int):
            raise TypeError(f"classes must be class indices or names, got {shorten(classes)}")
    if not given:
        raise ValueError("classes must have at least one class, got none")
    return [_class_id(wanted, names, null_label) for wanted in given]


def parse_class(word: str, names: Sequence[str]) -> int | str:
    """Returns the class of a command line argument. Class names take precedence over indices."""
    return int(word) if word not in names and _INTEGER.fullmatch(word) else word


def parse_classes(text: str, names: Sequence[str], *, max_shown: int) -> list[int | str]:
    """Returns the classes of a comma-separated list. ``all`` gives at most ``max_shown`` classes, evenly spread."""
    if text == "all" and text not in names:
        shown = min(len(names), max_shown)
        return [number * len(names) // shown for number in range(shown)]
    return [parse_class(word, names) for word in map(str.strip, text.split(",")) if word]


def seed_list(seed: Seeds, count: int) -> list[int]:
    """Returns the seed of each of ``count`` results.

    Raises:
        ValueError: if a seed is no integer in [0, 2**32), or the length of a list is not ``count``.
    """
    given = plain_list(seed)
    if given is not None:
        if len(given) != count:
            raise ValueError(f"seed must be one number or one for each of the {count} images, got {len(given)}")
        return [check_seed("seed", each) for each in given]
    first = check_seed("seed", plain_number(seed))
    if first + count > 2**32:
        raise ValueError(f"seed and the seeds after it must be in [0, 2**32), got {first} to {first + count - 1}")
    return list(range(first, first + count))


def check_output_type(output_type: str) -> None:
    """Checks that ``output_type`` is one of ``OutputType``.

    Raises:
        ValueError: if it is not. The message names the nearest one.
    """
    check_choice("output_type", output_type, get_args(OutputType))


def as_output(output_type: OutputType, images: Tensor) -> Images:
    """Converts (n, C, H, W) uint8 images to ``output_type``."""
    if output_type == "pt":
        return images
    if output_type == "np":
        pixels: npt.NDArray[np.uint8] = rearrange(images.numpy(), "n c h w -> n h w c")
        return pixels
    from maskgit_pl.pipeline.display import ImageList
    from maskgit_pl.pipeline.grids import to_pil

    return ImageList(to_pil(image) for image in images)


def _check_names(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"option {name!r}: {nearest(name, set(known))}")


def _with_argument(spec: str | dict[str, Any] | None, argument: str, value: float) -> str | dict[str, Any]:
    """Returns the spec of a plug-in with one argument replaced."""
    if spec is None:  # an autoregressive model, whose decoder raises the error
        return {argument: value}
    if not isinstance(spec, str | Mapping):  # the registry raises the error for it
        return spec
    return {**({"name": spec} if isinstance(spec, str) else spec), argument: value}


def _class_id(wanted: object, names: Sequence[str], null_label: int | None) -> int:
    if wanted is None:
        if null_label is None:
            raise ValueError(
                "class must not be None: the model was trained without a null class (class_dropout 0); name a class"
            )
        return null_label
    if isinstance(wanted, str):
        return _find_class(wanted, names)
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise TypeError(f"class must be an index or a name, got {shorten(wanted)} ({type(wanted).__name__})")
    if not 0 <= wanted < len(names):
        raise ValueError(f"class must be an index in [0, {len(names)}) or a name, got {shorten(wanted)}")
    return wanted


def _find_class(wanted: str, names: Sequence[str]) -> int:
    # An exact match wins; without one, the case of letters is ignored.
    found = [number for number, name in enumerate(names) if name == wanted]
    found = found or [number for number, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if not found:
        # 1,000 names of ImageNet would fill the terminal: only close ones are listed.
        close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.3)
        raise ValueError(f"unknown class {wanted!r}: {nearest(wanted, names if len(names) <= _MAX_LISTED else close)}")
    if len(found) > 1:
        raise ValueError(f"class {wanted!r} is the name of several classes; give one of the indices {found}")
    return found[0]
