"""Settings of a generation or an edit: names, types, and the checks that come before any work.

torch is imported by ``as_output`` alone: the command line makes the same checks before it loads anything.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, Union, get_args

from einops import rearrange

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.registry import nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep

__all__ = [
    "Classes",
    "DecodingSettings",
    "EditOptions",
    "GenerateOptions",
    "Images",
    "OutputType",
    "Seeds",
    "StepCallback",
    "as_output",
    "check_options",
    "class_ids",
    "seed_list",
    "with_settings",
]

OutputType = Literal["pil", "pt", "np"]
Images: TypeAlias = Union[list["Image.Image"], "Tensor", "npt.NDArray[np.uint8]"]
Classes: TypeAlias = int | str | Sequence[int | str | None]
Seeds: TypeAlias = int | Sequence[int]
StepCallback: TypeAlias = Callable[["DecodingStep"], object]

_FEW_NAMES = 20  # up to so many an error lists all of them


class DecodingSettings(TypedDict, total=False):
    """How to decode; what is left out or None is the model's own.

    Attributes:
        decoding: All of it at once, in place of the model's own; the others change parts of it.
        num_steps: T, at least 1 and at most the number of tokens; more steps, more care.
        guidance_scale: Of the guidance schedule, at least 0; 0 is none.
        guidance: Name or mapping of a guidance schedule.
        choice_temperature: How much chance decides which tokens to keep, at least 0.
        token_selector: Name or mapping of a token selector.
        sampling_temperature: A number of at least 0, or two for the first and the last step.
        top_k: Only so many of the likeliest codes are drawn.
        top_p: Only the likeliest codes that make up this probability are drawn, in (0, 1].
        tokens_per_step: How many tokens each step decides; T numbers that sum to the number of tokens.
        mask_schedule: Name or mapping of a mask schedule in place of the one of the training.
        context_cache: 1 is exact; above, known tokens are computed only every so many steps, which is approximate.
    """

    decoding: DecodingConfig | None
    num_steps: int | None
    guidance_scale: float | None
    guidance: str | dict[str, Any] | None
    choice_temperature: float | None
    token_selector: str | dict[str, Any] | None
    sampling_temperature: float | tuple[float, float] | None
    top_k: int | None
    top_p: float | None
    tokens_per_step: Sequence[int] | None
    mask_schedule: str | dict[str, Any] | None
    context_cache: int | None


class GenerateOptions(DecodingSettings, total=False):
    """What may be said of a generation.

    Attributes:
        seed: Result i has seed + i, or one seed for each; in [0, 2**32). 0 by default.
        negative_classes: What guidance pushes away from: one class for all results, or one for each, an id or a name;
            by default "no class".
        batch_size: Results decoded at a time, 64 by default; it changes no result.
        callback: Called after each step of each batch.
    """

    seed: Seeds
    negative_classes: int | str | Classes | None
    batch_size: int
    callback: StepCallback | None


class EditOptions(GenerateOptions, total=False):
    """What may be said of an edit.

    Attributes:
        dilation: Tokens by which the region grows on each side, at least 0. 1 by default, as in the released code: the
            seam then lies outside of the mask.
        blend: Blur of the seam in pixels; 0 leaves every pixel outside of the region as it was, bit by bit. None, the
            default, is the released code's, ``editing.seam_radius``.
        fit: Whether to cut images and masks of another size to the square in the middle and to resize it.
    """

    dilation: int
    blend: float | None
    fit: bool


def check_options(options: Mapping[str, Any], kind: type[GenerateOptions], output_type: str) -> None:
    """Refuses names that are no options, and an unknown output type, with the nearest ones.

    Raises:
        TypeError: An unknown option.
        ValueError: An unknown output type, or a batch size below 1.
    """
    known = [*DecodingSettings.__annotations__, *GenerateOptions.__annotations__, *kind.__annotations__]
    for name in options:
        if name not in known:
            raise TypeError(f"option {name!r}: {nearest(name, set(known))}")
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type {output_type!r}: {nearest(str(output_type), get_args(OutputType))}")
    if options.get("batch_size", 1) < 1:
        raise ValueError(f"batch_size: at least 1 is needed, got {options['batch_size']}")


def with_settings(own: DecodingConfig, settings: Mapping[str, Any]) -> DecodingConfig:
    """A way of decoding with some settings replaced; arguments as of ``DecodingSettings``, other names pass."""
    config: DecodingConfig = settings.get("decoding") or own
    given = {name: settings[name] for name in DecodingSettings.__annotations__ if settings.get(name) is not None}
    fields = {field.name for field in dataclasses.fields(DecodingConfig)}
    changes = {name: value for name, value in given.items() if name in fields}
    if "tokens_per_step" in changes:
        changes["tokens_per_step"] = tuple(changes["tokens_per_step"])
        changes.setdefault("num_steps", len(changes["tokens_per_step"]))
    elif "num_steps" in changes and changes["num_steps"] != config.num_steps:
        changes["tokens_per_step"] = None  # a list of the model's own is one for other steps
    guidance = changes.get("guidance", config.guidance)
    selector = changes.get("token_selector", config.token_selector)
    return dataclasses.replace(
        config,
        **changes
        | {
            "guidance": _replaced(guidance, "scale", given.get("guidance_scale")),
            "token_selector": _replaced(selector, "choice_temperature", given.get("choice_temperature")),
        },
    )


def _replaced(spec: str | dict[str, Any], key: str, value: float | None) -> str | dict[str, Any]:
    """A registry spec with one argument replaced; as it is where the value is None."""
    if value is None or not isinstance(spec, str | Mapping):  # what is neither the registry refuses
        return spec
    return {**({"name": spec} if isinstance(spec, str) else spec), key: value}


def seed_list(seed: Seeds, count: int) -> list[int]:
    """The seed of each of ``count`` results.

    Raises:
        ValueError: Out of range, or a list of another length.
    """
    seeds = [seed + number for number in range(count)] if isinstance(seed, int) else [int(value) for value in seed]
    if len(seeds) != count:
        raise ValueError(f"seed: one number, or one for each of the {count} images, is needed, got {len(seeds)}")
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"seed: numbers in [0, 2**32) are needed, got {min(seeds)} to {max(seeds)}")
    return seeds


def class_ids(classes: Classes, names: Sequence[str], *, null_label: int | None) -> list[int]:
    """Labels of classes given by id or by name, or None for "no class".

    Args:
        classes: What was asked for: a list, or one id or name.
        names: Of all classes.
        null_label: What stands for "no class"; None where the model has none.

    Raises:
        ValueError: None given, unknown, a name of several classes, or "no class" of a model that has no such row.
        TypeError: Neither a number, a name nor a list of them.
    """
    if isinstance(classes, str | Integral):  # numpy's integers too
        classes = [classes]
    if not isinstance(classes, Iterable):
        raise TypeError(f"classes: numbers or names are needed, got {classes!r}")
    classes = list(classes)
    if len(classes) == 0:
        raise ValueError("classes: at least one is needed, got none")
    return [_class_id(wanted, names, null_label) for wanted in classes]


def _class_id(wanted: int | str | None, names: Sequence[str], null_label: int | None) -> int:
    if wanted is None:
        if null_label is None:
            raise ValueError(
                "class None: this model has no null class (it was trained with class_dropout 0); name a class"
            )
        return null_label
    if isinstance(wanted, str):
        return _class_called(wanted, names)
    if isinstance(wanted, bool) or not hasattr(wanted, "__index__"):
        raise TypeError(f"class {wanted!r}: a number or a name is needed, got {type(wanted).__name__}")
    number = wanted.__index__()  # numpy's integers too
    if not 0 <= number < len(names):
        raise ValueError(f"class {number}: a number in [0, {len(names)}) or a name is needed")
    return number


def _class_called(wanted: str, names: Sequence[str]) -> int:
    found = [number for number, name in enumerate(names) if name == wanted]
    found = found or [number for number, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if not found:
        close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.3)
        raise ValueError(f"class {wanted!r}: {nearest(wanted, names if len(names) <= _FEW_NAMES else close)}")
    if len(found) > 1:
        raise ValueError(f"class {wanted!r}: the name of classes {found}; use one of the numbers")
    return found[0]


def as_output(output_type: OutputType, images: Tensor) -> Images:
    """(n, C, H, W) uint8 in the form that was asked for."""
    from maskgit_pl.imaging import to_pil

    if output_type == "pt":
        return images
    if output_type == "np":
        pixels: npt.NDArray[np.uint8] = rearrange(images.numpy(), "n c h w -> n h w c")
        return pixels
    return [to_pil(image) for image in images]
