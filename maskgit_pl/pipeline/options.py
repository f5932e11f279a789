"""The classes of a model (``ClassIndex``), the wishes of a call (``Request``), and names, types and checks of options.

The command line makes flags of the decoding settings, so that nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, Union

from maskgit_pl.checks import check_integer, check_number, check_seed, plain_list, plain_number
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.sampling import Temperature
from maskgit_pl.registry import nearest
from maskgit_pl.text import shorten

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.pretrained.networks import NegativeModelLike, PretrainedTransformer

Classes: TypeAlias = int | str | Sequence[int | str | None]
OutputType = Literal["pil", "pt", "np"]
Images: TypeAlias = Union[list["Image.Image"], "Tensor", "npt.NDArray[np.uint8]"]
Seeds: TypeAlias = int | Sequence[int]
StepCallback: TypeAlias = Callable[["DecodingStep"], object]

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
        tokens_per_step: Number of tokens decided at each step, in place of the mask schedule.
        mask_schedule: Mask schedule: a name such as cosine, or a mapping (default: that of the training).
        random_start: Probability of a random code in place of a mask token in the first step, for distilled models.
        guidance_scale: Scale of the guidance schedule, at least 0; 0 switches guidance off.
        choice_temperature: Scale of the Gumbel noise on the confidence; 0 keeps the most confident tokens.
    """

    num_steps: int | None
    token_selector: str | dict[str, Any] | None
    guidance: str | dict[str, Any] | None
    sampling_temperature: Temperature | None
    top_k: int | None
    tokens_per_step: tuple[int, ...] | None
    mask_schedule: str | dict[str, Any] | None
    random_start: float | None
    guidance_scale: float | None
    choice_temperature: float | None


SETTINGS = tuple(DecodingSettings.__annotations__)
"""The names of all decoding settings: the fields of ``DecodingConfig``, ``guidance_scale``, ``choice_temperature``."""
# Settings that replace one argument of a plug-in: name -> (field of DecodingConfig, argument, range).
_ARGUMENTS = {
    "guidance_scale": ("guidance", "scale", "[0, 10000]"),
    "choice_temperature": ("token_selector", "choice_temperature", "[0, inf)"),
}


class DecodingKeywords(DecodingSettings, total=False):
    """Decoding settings, and ``decoding`` in place of the model's own, which single settings override."""

    decoding: DecodingConfig | None


class GenerateKeywords(DecodingKeywords, total=False):
    """Keyword arguments of ``MaskGIT.generate`` and of the editing methods.

    Args:
        seed: Seed of the first result in [0, 2**32), 0 by default; result i has seed + i. Or a list with one for each.
        negative_class: Index or name of the class that guidance moves away from; "no class" by default.
        negative_model: Weaker model of the same tokens from which guidance moves away, in place of "no
            class": a run or pretrained folder, a repository of the Hub, or a ``MaskGIT`` on the same device.
            By default the pipeline's own, if it has one.
        vectors: (n, C) float array or tensor with the vector of each result, or (C,) for all, for a model
            that was trained with vectors of C values.
        batch_size: Number of results decoded at a time, 64 by default. It changes no token.
        callback: Called with a ``decoding.DecodingStep`` after each decoding step of each batch.
    """

    seed: Seeds
    negative_class: int | str | None
    negative_model: NegativeModelLike | None
    vectors: npt.ArrayLike | Tensor | None
    batch_size: int
    callback: StepCallback | None


@dataclasses.dataclass(frozen=True)
class ClassIndex:
    """The classes of a model, by which calls and commands name them.

    Args:
        names: Names of the classes in the order of their labels.
        null_label: Label of "no class"; None if the model was trained without it.
    """

    names: tuple[str, ...]
    null_label: int | None

    def labels(self, classes: Classes) -> list[int]:
        """Returns the labels of classes given by index or by name; None is "no class".

        Args:
            classes: A list of indices in [0, number of classes), names and None; or a single index or name.
        """
        choices = plain_list(classes)
        if choices is None:  # a single class
            choices = [plain_number(classes)]
        if not choices:
            raise ValueError("classes must have at least one class, got none")
        return [self._label(name_or_label) for name_or_label in choices]

    def parse(self, word: str) -> int:
        """Returns the label of the class of a command line argument. Class names take precedence over indices."""
        return self.labels(self._read_word(word))[0]

    def parse_list(self, text: str, *, max_shown: int = 10) -> list[int]:
        """Returns the labels of a comma-separated list of classes. See ``labels`` for errors.

        Args:
            text: Indices or names, or ``all`` for at most ``max_shown`` classes, evenly spread.
            max_shown: Maximum number of classes of ``all``.
        """
        if text == "all" and text not in self.names:
            count = min(len(self.names), max_shown)
            return [number * len(self.names) // count for number in range(count)]
        words = [word.strip() for word in text.split(",")]
        if "" in words:
            raise ValueError(f"classes must have a name between commas, got {shorten(text)}; leave out the extra comma")
        return self.labels(list(map(self._read_word, words)))

    def _read_word(self, word: str) -> int | str:
        return int(word) if word not in self.names and _INTEGER.fullmatch(word) else word

    def _label(self, choice: object) -> int:
        names = self.names
        if choice is None:
            if self.null_label is None:
                raise ValueError(
                    "class must not be None: the model was trained without a null class (class_dropout 0); name a class"
                )
            return self.null_label
        if isinstance(choice, bool) or not isinstance(choice, int | str):
            raise TypeError(f"class must be an index or a name, got {shorten(choice)} ({type(choice).__name__})")
        if isinstance(choice, int):
            if not 0 <= choice < len(names):
                raise ValueError(f"class must be an index in [0, {len(names)}) or a name, got {shorten(choice)}")
            return choice
        # An exact match wins; without one, the case of letters is ignored.
        labels = [label for label, name in enumerate(names) if name == choice]
        labels = labels or [label for label, name in enumerate(names) if name.casefold() == choice.casefold()]
        if not labels:
            # 1,000 names of ImageNet would fill the terminal: only close ones are listed.
            close = difflib.get_close_matches(choice, names, n=5, cutoff=0.3)
            listed = names if len(names) <= _MAX_LISTED else close
            raise ValueError(f"unknown class {choice!r}: {nearest(choice, listed)}")
        if len(labels) > 1:
            raise ValueError(f"class {choice!r} is the name of several classes; give one of the indices {labels}")
        return labels[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The results that a call of ``MaskGIT`` makes, checked.

    Attributes:
        labels: Label of each result.
        seeds: Seed of each result, in [0, 2**32).
        decoding: Decoding settings of all results.
        negative_label: Label that guidance moves away from; None is "no class".
        negative_model: Weaker model from which guidance moves away; None for guidance by classes.
        vectors: (n, C) float32, vector of each result; None for a model without vectors.
        batch_size: Number of results decoded at a time.
        callback: Called after each decoding step of each batch.
    """

    labels: list[int]
    seeds: list[int]
    decoding: DecodingConfig
    negative_label: int | None = None
    negative_model: PretrainedTransformer | None = None
    vectors: Tensor | None = None
    batch_size: int = 64
    callback: StepCallback | None = None

    @classmethod
    def of(cls, index: ClassIndex, default: DecodingConfig, classes: Classes, options: Mapping[str, Any]) -> Request:
        """Reads the arguments of a method of ``MaskGIT``, without ``negative_model`` and ``vectors``.

        Args:
            index: Classes of the model.
            default: Decoding settings of the model.
            classes: Classes of the results as indices or names.
            options: Keyword arguments of the method: ``GenerateKeywords``.
        """
        for name in options:
            if name not in GenerateKeywords.__annotations__:
                meant = {"temperature": "sampling_temperature"}.get(name, name)  # that of the softmax, as elsewhere
                raise TypeError(f"option {name!r}: {nearest(meant, GenerateKeywords.__annotations__)}")
        settings = {name: options[name] for name in ("decoding", *SETTINGS) if name in options}
        labels, negative_class = index.labels(classes), options.get("negative_class")
        return cls(
            labels=labels,
            seeds=seeds_of(options.get("seed", 0), len(labels)),
            decoding=replace_settings(default, settings),
            negative_label=None if negative_class is None else index.labels(negative_class)[0],
            batch_size=check_integer("batch_size", options.get("batch_size", 64), "[1, inf)"),
            callback=options.get("callback"),
        )

    def batches(self, rows: Sequence[int] | None = None) -> list[Sequence[int]]:
        """Returns the indices of the results, or ``rows``, in parts of at most ``batch_size``."""
        rows = range(len(self.labels)) if rows is None else rows
        return [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]

    def part(self, rows: Sequence[int]) -> Request:
        """Returns the request for some of the results."""
        return dataclasses.replace(
            self,
            labels=[self.labels[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            vectors=None if self.vectors is None else self.vectors[list(rows)],
        )


def replace_settings(default: DecodingConfig, settings: Mapping[str, Any]) -> DecodingConfig:
    """Returns decoding settings with some of them replaced.

    ``tokens_per_step`` without ``num_steps`` sets both. A new ``num_steps`` removes the ``tokens_per_step`` of
    ``default``, which has another length; a ``mask_schedule`` removes it, too, because it would have no effect
    beside the list.

    Args:
        default: Settings to start from.
        settings: New values by the names of ``SETTINGS``. None keeps a setting. ``decoding`` replaces ``default``.
    """
    changes = {name: value for name, value in settings.items() if value is not None}
    config: DecodingConfig = changes.pop("decoding", default)
    # The list has one number for each step, so that it must agree with num_steps. It takes the place of the schedule.
    if "tokens_per_step" in changes:
        if "mask_schedule" in changes:
            raise ValueError(
                "mask_schedule must be left out with tokens_per_step, which takes its place, got "
                f"{shorten(changes['mask_schedule'])}; give one of the two"
            )
        changes = {"num_steps": len(changes["tokens_per_step"]), **changes}
    elif "mask_schedule" in changes or changes.get("num_steps", config.num_steps) != config.num_steps:
        changes["tokens_per_step"] = None
    # guidance_scale and choice_temperature are arguments of plug-ins: they go into the spec of the plug-in.
    for name, (part, argument, interval) in _ARGUMENTS.items():
        if name in changes:
            value = check_number(name, plain_number(changes.pop(name)), interval)
            changes[part] = _with_argument(changes.get(part, getattr(config, part)), argument, value)
    return dataclasses.replace(config, **changes)


def _with_argument(spec: str | dict[str, Any] | None, argument: str, value: float) -> str | dict[str, Any]:
    """Returns the spec of a plug-in with one argument replaced."""
    if spec is None:  # an autoregressive model, whose decoder raises the error
        return {argument: value}
    return {**({"name": spec} if isinstance(spec, str) else spec), argument: value}


def seeds_of(seed: Seeds, count: int) -> list[int]:
    """Returns the seed of each of ``count`` results."""
    seeds = plain_list(seed)
    if seeds is not None:
        if len(seeds) != count:
            raise ValueError(f"seed must be one number or one for each of the {count} images, got {len(seeds)}")
        return [check_seed("seed", number) for number in seeds]
    first = check_seed("seed", plain_number(seed))
    if first + count > 2**32:
        raise ValueError(f"seed and the seeds after it must be in [0, 2**32), got {first} to {first + count - 1}")
    return list(range(first, first + count))
