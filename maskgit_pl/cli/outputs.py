"""Output files of the commands that generate images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from maskgit_pl.checks import count_text
from maskgit_pl.cli.arguments import Output
from maskgit_pl.cli.flags import make_folder
from maskgit_pl.processes import named_bars

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.pipeline.display import Recording


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

    def write(
        self,
        out: Path,
        sheet: Image.Image,
        summary: str,
        *,
        images: Tensor,
        labels: Sequence[int | None],
        seeds: Sequence[int],
        recording: Recording | None,
    ) -> None:
        """Writes all images as one picture, and the other files.

        Args:
            out: File of the picture.
            sheet: Picture of all images.
            summary: Text beside its name.
            images: (n, C, H, W) uint8.
            labels: Class of each image; None is "no class".
            seeds: Seed of each image.
            recording: Decoding of the first images; None if no file shows it.
        """
        from maskgit_pl.pipeline import grids

        make_folder(out.parent)
        grids.save_png(sheet, out)
        print(f"{out}: {summary}")
        if self.images is not None:
            make_folder(self.images)
            grids.save_images(images, labels, self.images, seeds=seeds)
            print(f"{self.images}: {count_text(len(images), 'file')}")
        for file in (self.gif, self.filmstrip):
            if file is not None and recording is not None:
                make_folder(file.parent)
                recording.save(file)
                count = count_text(len(recording.captions), "image")
                print(f"{file}: decoding of {count if file == self.gif else 'the first image'}")


@contextmanager
def record_steps(title: str, count: int) -> Iterator[tuple[Callable[[DecodingStep], None], list[DecodingStep]]]:
    """Shows how many tokens are decided, as a bar or as log lines, and records the decoding steps of the first images.

    Args:
        title: Text of the progress bar.
        count: Number of results, each with as many masked tokens as the first one.

    Yields:
        The ``callback`` for a method of ``MaskGIT``, and the list of recorded steps.
    """
    from maskgit_pl.pipeline.display import StepRecorder  # which imports torch

    record = StepRecorder()
    # The bar disappears at the end, so that only the names of the files stay on the terminal.
    with named_bars("tokens") as advance:

        def after_step(step: DecodingStep) -> None:
            record(step)
            total = count * int(record.steps[0].was_masked[0].sum())
            advance(title, int(step.was_masked.sum() - step.still_masked.sum()), total)

        yield after_step, record.steps
