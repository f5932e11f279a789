"""The orientation that EXIF gives an image, and the picture as it is to be seen. Used by ``images``."""

from __future__ import annotations

import struct
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PIL_ERRORS", "apply_orientation", "find_orientation"]

# What PIL raises on files that are damaged or hostile.
PIL_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error)
_ORIENTATION = 0x0112  # EXIF tag: 1 upright, 2 to 8 turned or mirrored; from 5 on height and width change places


def find_orientation(image: Image.Image) -> int:
    """Returns EXIF's 1 to 8, found without decoding; 1 where EXIF is missing or spoilt."""
    if image.format == "PNG" and not {"exif", "xmp"} & image.info.keys():
        return 1  # getexif would decode the pixels to look behind them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_ORIENTATION, 1)
    except PIL_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    """Returns a picture upright that was stored with an orientation of EXIF."""
    from PIL.Image import Transpose

    undoing = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image if orientation == 1 else image.transpose(undoing[orientation])
