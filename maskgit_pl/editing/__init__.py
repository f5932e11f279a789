"""Editing: functions that turn boxes and masks into tokens to regenerate, and paste the result into the image.

An edit masks some tokens of an image and decodes them again, for the same class or another one. The functions of this
folder work on masks and pixels; ``pipeline.edit.Editor`` joins them with the decoder. PIL and torch are imported inside
the functions, so that the command line checks a box without them.
"""

from maskgit_pl.editing.canvas import Margins, Window, check_canvas, check_overlap, windows
from maskgit_pl.editing.pixels import (
    ImageLike,
    MaskLike,
    check_fits,
    check_mask_file,
    fit_to_model,
    image_pixels,
    mask_pixels,
    read_image_header,
)
from maskgit_pl.editing.regions import (
    Box,
    box_mask,
    check_blend,
    check_box,
    check_dilation,
    composite,
    first_step,
    parse_box,
    pixel_region,
    seam,
    seam_radius,
    token_mask,
)

__all__ = [
    "Box",
    "ImageLike",
    "Margins",
    "MaskLike",
    "Window",
    "box_mask",
    "check_blend",
    "check_box",
    "check_canvas",
    "check_dilation",
    "check_fits",
    "check_mask_file",
    "check_overlap",
    "composite",
    "first_step",
    "fit_to_model",
    "image_pixels",
    "mask_pixels",
    "parse_box",
    "pixel_region",
    "read_image_header",
    "seam",
    "seam_radius",
    "token_mask",
    "windows",
]
