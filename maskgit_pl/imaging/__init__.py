"""Pictures: conversions of pixels, grids of images, and figures of decoding. Uses Pillow and torch, no Lightning."""

from maskgit_pl.imaging.decoding_figures import (
    confidence_panel,
    decoding_filmstrip,
    decoding_frames,
    number_windows,
    select_steps,
    token_panel,
    undrawn_tokens,
)
from maskgit_pl.imaging.grids import (
    draw_mask,
    edit_sheet,
    image_grid,
    reconstruction_grid,
    save_gif,
    save_images,
    save_png,
)
from maskgit_pl.imaging.pixels import to_pil, to_unit_range
from maskgit_pl.imaging.recording import StepRecorder

__all__ = [
    "StepRecorder",
    "confidence_panel",
    "decoding_filmstrip",
    "decoding_frames",
    "draw_mask",
    "edit_sheet",
    "image_grid",
    "number_windows",
    "reconstruction_grid",
    "save_gif",
    "save_images",
    "save_png",
    "select_steps",
    "to_pil",
    "to_unit_range",
    "token_panel",
    "undrawn_tokens",
]
