"""Options of ``MaskGIT``'s methods: names, types, and the checks that come before any work.

A method takes the options of its dataclass and the settings of ``DecodingConfig`` as keyword arguments. torch is
imported only by ``as_output``: the command line makes the same checks before it loads anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union, get_args

from einops import rearrange

from maskgit_pl.checks import check_choice, check_number
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.pipeline.classes import Classes
from maskgit_pl.registry import nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from _typeshed import DataclassInstance
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep

__all__ = [
    "SETTINGS",
    "EditOptions",
    "GenerateOptions",
    "Images",
    "OutputType",
    "Seeds",
    "StepCallback",
    "as_output",
    "check_output_type",
    "read_options",
    "replace_settings",
    "seed_list",
]

OutputType = Literal["pil", "pt", "np"]
Images: TypeAlias = Union[list["Image.Image"], "Tensor", "npt.NDArray[np.uint8]"]
Seeds: TypeAlias = int | Sequence[int]
StepCallback: TypeAlias = Callable[["DecodingStep"], object]
Options = TypeVar("Options", bound="DataclassInstance")

# Settings that replace one argument of a plug-in: name -> (field of DecodingConfig, argument, range).
_ARGUMENTS = {
    "guidance_scale": ("guidance", "scale", "[0, 10000]"),
    "choice_temperature": ("token_selector", "choice_temperature", "[0, inf)"),
}
SETTINGS = (*(field.name for field in dataclasses.fields(DecodingConfig)), *_ARGUMENTS)
"""Names of all settings of decoding: the fields of ``DecodingConfig``, ``guidance_scale``, ``choice_temperature``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of a generation beside the settings of decoding.

    Args:
        seed: Result i has seed + i; or one seed for each, in [0, 2**32).
        negative_classes: Classes that guidance pushes away from: one for all results, or one for each, an index or a
            name; "no class" by default.
        batch_size: Results decoded at a time, at least 1; it changes no result.
        callback: Called after each step of each batch.

    Raises:
        ValueError: if ``batch_size`` is below 1.
    """

    seed: Seeds = 0
    negative_classes: int | str | Classes | None = None
    batch_size: int = 64
    callback: StepCallback | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: at least 1 is needed, got {self.batch_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditOptions(GenerateOptions):
    """Options of an edit beside the settings of decoding.

    Args:
        dilation: Tokens by which the region grows on each side, at least 0. By default 1 inside an image, as in the
            released code (the seam then lies outside of the mask), and 0 beyond its borders.
        blend: Blur of the seam in pixels; 0 leaves every pixel outside of the region as it was, bit by bit. None is
            the released code's, ``editing.seam_radius``.
        fit: True cuts images and masks of another size to the square in the middle and resizes it.
    """

    dilation: int | None = None
    blend: float | None = None
    fit: bool = False


def read_options(kind: type[Options], given: Mapping[str, Any], own: DecodingConfig) -> tuple[Options, DecodingConfig]:
    """Splits keyword arguments into options and settings of decoding.

    Args:
        kind: Dataclass of the options.
        given: Fields of ``kind``, names of ``SETTINGS``, and ``decoding``.
        own: The model's own decoding; the settings replace parts of it.

    Returns:
        The options, and how to decode.

    Raises:
        TypeError: if a name is none of them. The message names the nearest one.
        ValueError: if a value is out of range.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    _check_names(given, [*names, *SETTINGS, "decoding"])
    options = kind(**{name: value for name, value in given.items() if name in names})
    return options, replace_settings(own, {name: value for name, value in given.items() if name not in names})


def replace_settings(own: DecodingConfig, settings: Mapping[str, Any]) -> DecodingConfig:
    """Returns a way of decoding with some settings replaced.

    ``tokens_per_step`` without ``num_steps`` sets both; another ``num_steps`` without a list removes that of ``own``.

    Args:
        own: What is replaced.
        settings: Values by names of ``SETTINGS``; None keeps the setting. ``decoding`` stands in place of ``own``.

    Raises:
        TypeError: if there is no such setting.
        ValueError: if a value is out of range.
    """
    _check_names(settings, [*SETTINGS, "decoding"])
    given = {name: value for name, value in settings.items() if value is not None}
    config: DecodingConfig = given.pop("decoding", own)
    if "tokens_per_step" in given:
        given.setdefault("num_steps", len(given["tokens_per_step"]))
    elif given.get("num_steps", config.num_steps) != config.num_steps:
        given["tokens_per_step"] = None
    for name, (part, argument, interval) in _ARGUMENTS.items():
        if name in given:
            value = check_number(name, given.pop(name), interval)
            given[part] = _with_argument(given.get(part, getattr(config, part)), argument, value)
    return dataclasses.replace(config, **given)


def _check_names(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"option {name!r}: {nearest(name, set(known))}")


def _with_argument(spec: str | dict[str, Any] | None, argument: str, value: float) -> str | dict[str, Any]:
    """Returns the spec of a plug-in with one argument replaced."""
    if spec is None:  # an autoregressive model, whose decoder refuses it
        return {argument: value}
    if not isinstance(spec, str | Mapping):  # the registry says what is wrong with it
        return spec
    return {**({"name": spec} if isinstance(spec, str) else spec), argument: value}


def seed_list(seed: Seeds, count: int) -> list[int]:
    """Returns the seed of each of ``count`` results.

    Raises:
        ValueError: if one is out of range, or a list has another length.
    """
    seeds = [seed + number for number in range(count)] if isinstance(seed, int) else [int(value) for value in seed]
    if len(seeds) != count:
        raise ValueError(f"seed: one number, or one for each of the {count} images, is needed, got {len(seeds)}")
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"seed: numbers in [0, 2**32) are needed, got {min(seeds)} to {max(seeds)}")
    return seeds


def check_output_type(output_type: str) -> None:
    """Checks the form of images that is asked for.

    Raises:
        ValueError: if there is no such form. The message names the nearest one.
    """
    check_choice("output_type", output_type, get_args(OutputType))


def as_output(output_type: OutputType, images: Tensor) -> Images:
    """Returns (n, C, H, W) uint8 images in the form that is asked for."""
    from maskgit_pl.imaging import to_pil

    if output_type == "pt":
        return images
    if output_type == "np":
        pixels: npt.NDArray[np.uint8] = rearrange(images.numpy(), "n c h w -> n h w c")
        return pixels
    return [to_pil(image) for image in images]
