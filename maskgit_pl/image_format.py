"""The size, the channels and the file names of images, as recipes and files give them. Imports no torch.

A size is the side of square images, or (height, width). Equal sides are always one integer, so that a size has
one form in files, digests and names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

from maskgit_pl.checks import check_integer, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CHANNELS",
    "ImageSize",
    "as_image_size",
    "check_channels",
    "check_image_size",
    "height_width",
    "image_file_name",
    "is_image_file_name",
    "pixels_text",
    "plain_size",
]

ImageSize: TypeAlias = int | tuple[int, int]
"""The side of square images, or (height, width), in pixels."""

_FILE_NAME = re.compile(r"(no-class|class-\d{4,})-seed-\d{6,}\.png")  # of ``image_file_name``

CHANNELS = {1: "grey", 3: "RGB"}
"""The numbers of channels of images, and what they hold."""


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns the height and the width of a size."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def as_image_size(size: int | Sequence[int]) -> ImageSize:
    """Returns a size in its one form: the side of a square, else (height, width)."""
    height, width = height_width(size)
    return height if height == width else (height, width)


def plain_size(size: int | Sequence[int]) -> int | list[int]:
    """Returns a size as JSON and YAML restore it: the side of a square, else [height, width]."""
    size = as_image_size(size)
    return size if isinstance(size, int) else list(size)


def pixels_text(size: int | Sequence[int]) -> str:
    """Returns a size for messages: width x height, as PIL and file managers show it."""
    height, width = height_width(size)
    return f"{width} x {height}"


def image_file_name(label: int | None, seed: int) -> str:
    """Returns the name of the PNG file of a generated image, such as ``class-0003-seed-000007.png``.

    Args:
        label: Class of the image; None is "no class".
        seed: Seed of the image.
    """
    name = "no-class" if label is None else f"class-{label:04d}"
    return f"{name}-seed-{seed:06d}.png"


def is_image_file_name(name: str) -> bool:
    """Returns True if a name can be one of ``image_file_name``."""
    return _FILE_NAME.fullmatch(name) is not None


def check_image_size(name: str, size: object, interval: str) -> ImageSize:
    """Checks the size of images.

    Args:
        name: Name of the value for the message, such as a flag.
        size: An integer, or a list or tuple [height, width].
        interval: Range of a side, such as ``"[1, 8192]"``.

    Returns:
        The size in its one form; see ``as_image_size``.

    Raises:
        ValueError: if it is anything else, or a side is out of range.
    """
    if isinstance(size, list | tuple) and len(size) == 2:
        return as_image_size([check_integer(name, side, interval) for side in size])
    if not isinstance(size, int):
        raise ValueError(
            f"{name} must be an integer in {interval}, or [height, width] of two such integers, got {shorten(size)}"
        )
    return check_integer(name, size, interval)


def check_channels(name: str, channels: object) -> int:
    """Checks the number of channels of images.

    Raises:
        ValueError: if it is not 1 or 3.
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels not in CHANNELS:
        known = ", ".join(f"{number} ({what})" for number, what in CHANNELS.items())
        raise ValueError(f"{name} must be one of {known}, got {shorten(channels)}")
    return channels
