"""``Outline``: classes, sizes and default settings of a model, by which requests are checked.

``MaskGIT`` has it from its networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from maskgit_pl.checks import ImageSize, height_width
from maskgit_pl.decoding import DecodingConfig, check_parallel
from maskgit_pl.errors import printable
from maskgit_pl.pipeline.options import (
    Classes,
    DecodingKeywords,
    class_ids,
    parse_class,
    parse_classes,
    replace_settings,
)

__all__ = ["Outline"]


@dataclass(frozen=True)
class Outline:
    """Classes, sizes and default settings of a model, by which requests are checked.

    Args:
        class_names: Names of the classes in order.
        null_label: Label of "no class"; None if the model was trained without it.
        num_tokens: N, the number of tokens per image.
        is_autoregressive: True if the model draws one token after the other.
        decoding: Default decoding settings.
        image_size: Size of the images: a side, or (height, width), in pixels.
        token_size: Height and width of a token in pixels.
        channels: C, channels of the images.
        condition_dim: Size of the vector of an image; 0 for a model without vectors.
    """

    class_names: tuple[str, ...]
    null_label: int | None
    num_tokens: int
    is_autoregressive: bool
    decoding: DecodingConfig
    image_size: ImageSize
    token_size: int
    channels: int
    condition_dim: int = 0

    @property
    def least_canvas(self) -> tuple[int, int]:
        """The height and width of the smallest canvas in pixels: the image size, in whole tokens."""
        height, width = height_width(self.image_size)
        return -(-height // self.token_size) * self.token_size, -(-width // self.token_size) * self.token_size

    def class_ids(self, classes: Classes) -> list[int]:
        """Returns the labels of classes given by index or by name. See ``options.class_ids`` for errors."""
        return class_ids(classes, self.class_names, null_label=self.null_label)

    def parse_class(self, word: str | None) -> int | None:
        """Returns the label of the class of a command line argument. None is "no class" and stays None.

        Raises:
            ValueError: if the class is unknown, or None is given to a model that was trained without "no class".
        """
        (label,) = self.class_ids([None if word is None else parse_class(word, self.class_names)])
        return None if word is None else label

    def parse_classes(self, text: str, *, max_shown: int = 10) -> list[int]:
        """Returns the labels of a comma-separated list of classes. See ``class_ids`` for errors.

        Args:
            text: Indices or names, or ``all`` for at most ``max_shown`` classes, evenly spread.
            max_shown: Maximum number of classes of ``all``.
        """
        return self.class_ids(parse_classes(text, self.class_names, max_shown=max_shown))

    def describe_class(self, label: int | None) -> str:
        """Returns ``class NAME`` or ``no class``, for messages and titles."""
        return "no class" if label is None else f"class {printable(self.class_names[label])}"

    def decoding_with(self, **settings: Unpack[DecodingKeywords]) -> DecodingConfig:
        """Returns the default settings with some of them replaced. See ``options.replace_settings``."""
        return replace_settings(self.decoding, settings)

    def check_parallel(self, task: str) -> None:
        """Raises for an autoregressive model. See ``decoding.check_parallel``."""
        check_parallel(task, is_autoregressive=self.is_autoregressive)

    def check_decoding(self, decoding: DecodingConfig, *, has_negative_class: bool = True) -> None:
        """Raises if the model cannot use decoding settings. See ``DecodingConfig.check``."""
        decoding.check(self.num_tokens, is_autoregressive=self.is_autoregressive, has_negative_class=has_negative_class)
