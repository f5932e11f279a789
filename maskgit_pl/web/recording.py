"""``Playback``: the decoding steps of a result with their images, as the page shows, scrubs and saves them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.imaging import confidence_panel, save_animation, save_filmstrip, to_pil, token_panel

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.pipeline import MaskGIT

__all__ = ["Frame", "Playback", "decode", "record"]

_SIZE = 320  # pixels of the longer edge of a panel


@dataclass(frozen=True)
class Frame:
    """The pictures of one decoding step.

    Args:
        caption: Number of the step, and counts of its tokens.
        tokens: The image with masked tokens in grey, and new ones in a frame.
        confidence: Confidence of each token, from dark (0) to bright (1).
        image: The image of all tokens of the step.
    """

    caption: str
    tokens: Image.Image
    confidence: Image.Image
    image: Image.Image


@dataclass(frozen=True)
class Playback:
    """The decoding steps of one image.

    Args:
        steps: Steps so far, of one image.
        images: Decoded tokens of each step, (1, C, H, W) uint8.
        grid: Rows and columns of tokens (h, w).
        num_steps: Number of decoding steps T.
    """

    steps: tuple[DecodingStep, ...]
    images: tuple[Tensor, ...]
    grid: tuple[int, int]
    num_steps: int

    def frame(self, number: int) -> Frame:
        """Returns the pictures of a step, counted from 1. A number out of range gives the nearest step."""
        place = min(max(1, number), len(self.steps)) - 1
        step, image = self.steps[place], self.images[place][0]
        tokens = token_panel(step, 0, image, self.grid, size=_SIZE)
        confidence = confidence_panel(step.confidence[0], image, self.grid, size=_SIZE)
        return Frame(self._describe(step), tokens, confidence, to_pil(image))

    def save(self, pipe: MaskGIT, folder: Path) -> list[Path]:
        """Writes ``decoding.gif`` and ``filmstrip.png``.

        Args:
            pipe: Model that decoded the image.
            folder: Existing folder.
        """
        decode_tokens = partial(pipe.tokenizer.decode, grid=self.grid)
        animation, filmstrip = folder / "decoding.gif", folder / "filmstrip.png"
        save_animation(self.steps, decode_tokens, animation, grid=self.grid, captions=())
        save_filmstrip(self.steps, decode_tokens, filmstrip, grid=self.grid)
        return [animation, filmstrip]

    def _describe(self, step: DecodingStep) -> str:
        still, was = int(step.still_masked.sum()), int(step.was_masked.sum())
        decided = f"{step.still_masked.numel() - still} of {step.still_masked.numel()} tokens decided"
        return f"Step {step.step + 1} of {self.num_steps}: {decided}, {was - still} in this step"


def decode(pipe: MaskGIT, label: int, *, seed: int, settings: dict[str, Any]) -> Iterator[Playback]:
    """Decodes an image, and yields the recording after each step.

    Args:
        pipe: The model.
        label: Index of the class.
        seed: Seed in [0, 2**32).
        settings: Keyword arguments of ``MaskGIT.generate`` that are decoding settings.

    Raises:
        ValueError: if a setting is out of range, or the model does not support it.
    """
    decoding = pipe.decoding_with(**settings)
    pipe.check_decoding(decoding)
    found = Playback((), (), pipe.tokenizer.grid, decoding.num_steps)
    for step in pipe.steps([label], seed=seed, decoding=decoding):
        image = pipe.tokenizer.decode(step.tokens)
        found = replace(found, steps=(*found.steps, step), images=(*found.images, image))
        yield found


def record(pipe: MaskGIT, steps: Sequence[DecodingStep], *, grid: tuple[int, int], num_steps: int) -> Playback:
    """Returns the recording of the first image of recorded steps.

    Args:
        pipe: The model.
        steps: Steps of an edit, from ``imaging.StepRecorder(max_images=1)``.
        grid: Rows and columns of tokens of the whole image.
        num_steps: Number of decoding steps T.
    """
    images = tuple(pipe.tokenizer.decode(step.tokens, grid=grid) for step in steps)
    return Playback(tuple(steps), images, grid, num_steps)
