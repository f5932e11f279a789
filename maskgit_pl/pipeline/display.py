"""Objects that a notebook shows as pictures: generated images as a contact sheet, a decoding as an animation."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from maskgit_pl.checks import check_integer
from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.errors import printable
from maskgit_pl.pipeline.decoding_figures import decoding_filmstrip, decoding_frames, number_windows, select_steps
from maskgit_pl.pipeline.grids import image_grid, save_gif, save_png, to_pil

__all__ = ["ImageList", "Recording", "describe_settings"]

_COLUMNS, _MOST_IMAGES = 8, 64  # of a contact sheet
_FRAME, _ANIMATION, _SHORTEST = 600, 9600, 40  # milliseconds: a frame, at most all frames together, at least a frame


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
        steps: Decoding steps of the images, so far.
        decode: Function that decodes tokens (n, N) int64 to images (n, C, H, W) uint8.
        grid: Rows and columns of tokens (h, w).
        decoding: Decoding settings, which the head line names.
        captions: Name of the class of each image.
        seeds: Seed of each image.
        requested: (H, W) bool, the pixels that the user of an edit named; None for no edit.
        token_size: Height and width of a token in pixels; None is the smallest that gives ``grid``.
    """

    steps: Sequence[DecodingStep]
    decode: Callable[[Tensor], Tensor]
    grid: tuple[int, int]
    decoding: DecodingConfig
    captions: Sequence[str]
    seeds: Sequence[int]
    requested: Tensor | None = None
    token_size: int | None = None
    # Images by the identity of the tokens of a step: each is decoded once, in recordings too that
    # ``dataclasses.replace`` makes, with more steps or with others. The step is kept, so that no other one gets its id.
    _decoded: dict[int, tuple[DecodingStep, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def images(self) -> ImageList:
        """The images of the last step, those of ``MaskGIT.generate``."""
        return ImageList(to_pil(image) for image in self.images_at(len(self.steps) - 1))

    @property
    def title(self) -> str:
        """The head line of the first image: its class, its seed and the settings."""
        return f"{self.captions[0]}, seed {self.seeds[0]}: {describe_settings(self.decoding)}"

    @property
    def token_pixels(self) -> int:
        """The height and width of a token in the images."""
        size = self.images_at(0).shape[-2:]
        return self.token_size or max(math.ceil(side / count) for side, count in zip(size, self.grid, strict=True))

    def images_at(self, number: int) -> Tensor:
        """Returns the images of all tokens of a step in [0, number of steps), (n, C, H, W) uint8.

        Raises:
            ValueError: if there is no such step.
        """
        self._check_steps()
        check_integer("number", number, f"[0, {len(self.steps)})")
        step = self.steps[number]
        if id(step) not in self._decoded:
            self._decoded[id(step)] = step, self.decode(step.tokens)
        return self._decoded[id(step)][1]

    def save(self, path: Path | str) -> None:
        """Writes an animation of all images (``.gif``), or a filmstrip of the first one (``.png``).

        An animation has at most 64 steps and ten seconds, a filmstrip at most 12 steps.

        Raises:
            ValueError: if the name of the file has another ending, or there are no steps.
        """
        self._check_steps()
        path = Path(path)
        if path.suffix.lower() == ".gif":
            captions = [f"{name}, seed {seed}" for name, seed in zip(self.captions, self.seeds, strict=True)]
            frames = decoding_frames(
                **self._shown("animation"),
                title=describe_settings(self.decoding),
                num_steps=self.decoding.num_steps,
                captions=captions,
            )
            # More frames are shown for a shorter time each, so that the animation stays under ten seconds.
            save_gif(frames, path, milliseconds=max(_SHORTEST, min(_FRAME, _ANIMATION // len(frames))))
        elif path.suffix.lower() == ".png":
            save_png(self.filmstrip(), path)
        else:
            raise ValueError(f"path must end with .gif (animation) or .png (filmstrip), got {str(path)!r}")

    def filmstrip(self, title: str | None = None) -> Image.Image:
        """Draws at most 12 steps of the first image below a head line, which is ``self.title`` by default."""
        return decoding_filmstrip(**self._shown("filmstrip"), title=self.title if title is None else title)

    def _shown(self, kind: Literal["animation", "filmstrip"]) -> dict[str, Any]:
        """Returns the arguments of both figures: only the steps that they show are decoded."""
        numbers, windows = select_steps(len(self.steps), kind), number_windows(self.steps)
        return {
            "steps": [self.steps[number] for number in numbers],
            "images": [self.images_at(number) for number in numbers],
            "windows": [windows[number] for number in numbers],
            "token_size": self.token_pixels,
            "requested": self.requested,
        }

    def _check_steps(self) -> None:
        if not self.steps:
            raise ValueError("a recording must have at least one decoding step, got none; decode images first")

    def __repr__(self) -> str:
        return f"Recording({len(self.steps)} steps of {', '.join(map(printable, self.captions))})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "decoding.gif"
            self.save(file)
            return {"text/plain": repr(self), "image/gif": b64encode(file.read_bytes()).decode()}


def describe_settings(decoding: DecodingConfig) -> str:
    """Returns the number of steps and the token selector with its arguments, for head lines of pictures."""
    steps = f"{decoding.num_steps} step{'s' if decoding.num_steps != 1 else ''}"
    if decoding.token_selector is None:
        return f"{steps}, one token each, in raster order"
    spec = {"name": decoding.token_selector} if isinstance(decoding.token_selector, str) else decoding.token_selector
    arguments = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in spec.items()
        if name != "name"
    )
    return f"{steps}, token selector {spec['name']}{f' ({arguments})' if arguments else ''}"
