"""Pictures for people: pixels, grids of images, figures of decoding. Pillow and torch only, no Lightning."""

from maskgit_pl.imaging.decoding_figures import decoding_filmstrip, decoding_frames, shown_steps
from maskgit_pl.imaging.grids import edit_sheet, image_grid, reconstruction_grid, save_gif, save_png
from maskgit_pl.imaging.pixels import to_pil, to_unit_range

__all__ = [
    "decoding_filmstrip",
    "decoding_frames",
    "edit_sheet",
    "image_grid",
    "reconstruction_grid",
    "save_gif",
    "save_png",
    "shown_steps",
    "to_pil",
    "to_unit_range",
]
