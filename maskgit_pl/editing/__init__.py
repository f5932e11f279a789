"""Editing: which tokens of an image are generated again, and how the result is put back into the image.

A part of an image is edited by masking its tokens and decoding them again, for the same class or another one. This
folder holds what that needs beside the decoder, as functions of masks and pixels; ``MaskGIT.inpaint`` puts them
together. PIL and torch are imported when a function needs them, so that the command line refuses a wrong box at once.
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
    check_box,
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
    "check_box",
    "check_canvas",
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
