"""Output files of the commands that generate images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from maskgit_pl.checks import count_text, height_width
from maskgit_pl.cli.arguments import Output
from maskgit_pl.cli.flags import make_folder
from maskgit_pl.processes import progress_bars

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingConfig, DecodingStep
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["Generated", "Pictures", "record_steps"]


@dataclass(frozen=True)
class Generated:
    """The images of a command, and their decoding.

    Args:
        images: (n, C, H, W) uint8.
        labels: Class of each image; None is "no class".
        seeds: Seed of each image.
        sheet: Picture of all images.
        summary: Text beside the name of that picture.
        steps: Recorded decoding steps of some images; empty without a recording.
        captions: Name of the class of each recorded image.
        recorded: Seed of each recorded image.
        requested: (H, W) bool, the pixels that the user of an edit named; None for no edit.
    """

    images: Tensor
    labels: Sequence[int | None]
    seeds: Sequence[int]
    sheet: Image.Image
    summary: str
    steps: Sequence[DecodingStep]
    captions: Sequence[str]
    recorded: Sequence[int]
    requested: Tensor | None = None


@dataclass(frozen=True)
class Pictures:
    """Files besides the picture of all images.

    Args:
        images: Also write each image to its own file in this folder.
        gif: Also write an animation of the decoding.
        filmstrip: Also write the decoding of the first image step by step.
    """

    images: Annotated[Path, Output("")] | None = None
    gif: Annotated[Path, Output(".gif")] | None = None
    filmstrip: Annotated[Path, Output(".png")] | None = None

    @property
    def show_decoding(self) -> bool:
        """Returns True if a file shows the decoding."""
        return self.gif is not None or self.filmstrip is not None

    def write(self, generated: Generated, out: Path, *, pipe: MaskGIT, decoding: DecodingConfig) -> None:
        """Writes all images as one picture, and the other files."""
        from maskgit_pl.pipeline import display, grids

        make_folder(out.parent)
        grids.save_png(generated.sheet, out)
        print(f"{out}: {generated.summary}")
        if self.images is not None:
            make_folder(self.images)
            grids.save_images(generated.images, generated.labels, self.images, seed=generated.seeds)
            print(f"{self.images}: {count_text(len(generated.images), 'file')}")
        if not generated.steps:
            return
        tokenizer, count = pipe.tokenizer, len(generated.steps[0].tokens)
        size = (generated.images.shape[-2], generated.images.shape[-1])
        grid, decode = tokenizer.network.config.grid(size), tokenizer.decode
        if size != height_width(tokenizer.image_size):  # a canvas of outpaint or panorama
            decode = partial(tokenizer.decode, grid=grid)
        captions, seeds = generated.captions[:count], generated.recorded[:count]
        recording = display.Recording(
            generated.steps, decode, grid, decoding, captions, seeds, generated.requested, pipe.outline.token_size
        )
        for file, content in ((self.gif, count_text(count, "image")), (self.filmstrip, "the first image")):
            if file is not None:
                make_folder(file.parent)
                recording.save(file)
                print(f"{file}: decoding of {content}")


@contextmanager
def record_steps(
    title: str, num_tokens: int, *, is_recording: bool
) -> Iterator[tuple[Callable[[DecodingStep], None], list[DecodingStep]]]:
    """Shows how many tokens are decided, as a bar or as log lines, and records the decoding steps of the first images.

    Args:
        title: Text of the progress bar.
        num_tokens: Number of tokens that are decoded, of all results.
        is_recording: True records steps, False only shows the bar.

    Yields:
        The ``callback`` for a method of ``MaskGIT``, and the list of recorded steps.
    """
    from maskgit_pl.pipeline.display import StepRecorder  # which imports torch

    record = StepRecorder()
    # The bar disappears at the end, so that only the names of the files stay on the terminal.
    with progress_bars() as bars:
        advance = bars(title, num_tokens, unit="tokens")

        def after_step(step: DecodingStep) -> None:
            advance(int(step.was_masked.sum() - step.still_masked.sum()))
            if is_recording:
                record(step)

        yield after_step, record.steps
