"""Objects that a notebook shows as pictures: generated images as a contact sheet, a decoding as an animation."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.imaging import image_grid, save_animation, save_filmstrip, to_pil
from maskgit_pl.text import printable

__all__ = ["ImageList", "Recording"]

_COLUMNS, _MOST_IMAGES = 8, 64  # of a contact sheet


class ImageList(list[Image.Image]):
    """A list of images of the same size, which a notebook shows as a contact sheet of the first 64."""

    def _repr_png_(self) -> bytes | None:
        if not self or len({(image.size, image.mode) for image in self}) > 1:  # the user changed it
            return None
        pixels = [np.atleast_3d(np.asarray(image)) for image in self[:_MOST_IMAGES]]
        images = rearrange(torch.from_numpy(np.stack(pixels)), "n h w c -> n c h w")
        file = BytesIO()
        image_grid(images, columns=min(_COLUMNS, len(images))).save(file, format="PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Recording:
    """The decoding of a few images, step by step. A notebook shows it as an animation.

    Args:
        steps: Decoding steps of the images.
        decode: Function that decodes tokens (n, N) int64 to images (n, C, H, W) uint8.
        grid: Rows and columns of tokens (h, w).
        captions: Text above each image.
    """

    steps: Sequence[DecodingStep]
    decode: Callable[[Tensor], Tensor]
    grid: tuple[int, int]
    captions: Sequence[str]

    @property
    def images(self) -> ImageList:
        """The images of the last step, those of ``MaskGIT.generate``."""
        return ImageList(to_pil(image) for image in self.decode(self.steps[-1].tokens))

    def save(self, path: Path | str) -> None:
        """Writes an animation of all images (``.gif``), or a filmstrip of the first one (``.png``).

        Raises:
            ValueError: if the name of the file has another ending.
        """
        path = Path(path)
        if path.suffix.lower() == ".gif":
            save_animation(self.steps, self.decode, path, grid=self.grid, captions=self.captions)
        elif path.suffix.lower() == ".png":
            save_filmstrip(self.steps, self.decode, path, grid=self.grid)
        else:
            raise ValueError(f"path must end with .gif (animation) or .png (filmstrip), got {str(path)!r}")

    def __repr__(self) -> str:
        return f"Recording({len(self.steps)} steps of {', '.join(map(printable, self.captions))})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "decoding.gif"
            self.save(file)
            return {"text/plain": repr(self), "image/gif": b64encode(file.read_bytes()).decode()}
