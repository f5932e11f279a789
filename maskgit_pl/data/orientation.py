"""EXIF orientation: reading it, and rotating or mirroring an image so that it is upright. Used by ``images``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.data.pillow import PIL_ERRORS, silent_warnings

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["apply_orientation", "find_orientation"]

_ORIENTATION = 0x0112  # EXIF tag: 1 upright, 2 to 8 rotated or mirrored; 5 to 8 swap height and width


def find_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, without decoding pixels; 1 if EXIF is missing or damaged."""
    from PIL import Image

    if image.format == "PNG" and not {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys():
        return 1
    try:
        with silent_warnings():
            # The method of PNG would decode the pixels, to search after them.
            value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except PIL_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    """Returns an image upright.

    Args:
        image: The image as stored.
        orientation: Its EXIF orientation, 1 to 8.
    """
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
