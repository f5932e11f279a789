"""Output files of the commands that generate images: their flags, and the functions that write them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.checks import count_text, height_width
from maskgit_pl.cli.flags import FOLDER, make_folder

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingConfig, DecodingStep
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.display import Recording

__all__ = ["PICTURES", "add_output_arguments", "record_steps", "recording_of", "wants_decoding", "write_generated"]

PICTURES = {"out": ".png", "gif": ".gif", "filmstrip": ".png", "images": FOLDER}  # for ``check_outputs``


def add_output_arguments(parser: argparse.ArgumentParser, *, out: str, default: Path | None = None) -> None:
    """Adds the flags of the files that a command writes.

    Args:
        parser: Parser of the command.
        out: Default of ``--out`` as the help shows it.
        default: Default of ``--out``; None if the command chooses it.
    """
    parser.add_argument(
        "--out", type=Path, default=default, metavar="FILE.png", help=f"picture of all images (default: {out})"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="also write each image to its own file in this folder"
    )
    parser.add_argument("--gif", type=Path, metavar="FILE.gif", help="also write an animation of the decoding")
    parser.add_argument(
        "--filmstrip", type=Path, metavar="FILE.png", help="also write the decoding of the first image step by step"
    )


def wants_decoding(args: argparse.Namespace) -> bool:
    """Returns True if ``--gif`` or ``--filmstrip`` is given."""
    return args.gif is not None or args.filmstrip is not None


@contextmanager
def record_steps(
    title: str, *, is_recording: bool, total: int | None = None
) -> Iterator[tuple[Callable[[DecodingStep], None], list[DecodingStep]]]:
    """Shows a progress bar, and records the decoding steps of the first images.

    Args:
        title: Text of the progress bar.
        is_recording: True records steps, False only shows the bar.
        total: Number of steps of all batches; None if it is unknown.

    Yields:
        The ``callback`` for a method of ``MaskGIT``, and the list of recorded steps.
    """
    from rich.progress import Progress

    from maskgit_pl.pipeline.decoding_figures import StepRecorder

    record = StepRecorder()
    # The bar disappears at the end, so that only the names of the files stay on the terminal.
    with Progress(transient=True) as progress:
        bar = progress.add_task(title, total=total)

        def after_step(step: DecodingStep) -> None:
            progress.advance(bar)
            if is_recording:
                record(step)

        yield after_step, record.steps


def recording_of(
    steps: Sequence[DecodingStep],
    pipe: MaskGIT,
    images: Tensor,
    *,
    decoding: DecodingConfig,
    captions: Sequence[str],
    seeds: Sequence[int],
    requested: Tensor | None = None,
) -> Recording | None:
    """Returns the recording of the first images; None without steps.

    Args:
        steps: Decoding steps of ``record_steps``.
        pipe: Model that decodes tokens.
        images: (n, C, H, W) uint8.
        decoding: Decoding settings, which the pictures of the decoding name.
        captions: Name of the class of at least each recorded image.
        seeds: Seed of at least each recorded image.
        requested: (H, W) bool, the pixels that the user of an edit named; None for no edit.
    """
    if not steps:
        return None
    from maskgit_pl.pipeline.display import Recording

    size, tokenizer, count = (images.shape[-2], images.shape[-1]), pipe.tokenizer, len(steps[0].tokens)
    grid, decode = tokenizer.network.config.grid(size), tokenizer.decode
    if size != height_width(tokenizer.image_size):  # a canvas of outpaint or panorama
        decode = partial(tokenizer.decode, grid=grid)
    return Recording(steps, decode, grid, decoding, captions[:count], seeds[:count], requested, pipe.outline.token_size)


def write_generated(
    images: Tensor,
    args: argparse.Namespace,
    *,
    sheet: Image.Image,
    summary: str,
    labels: Sequence[int | None],
    recording: Recording | None,
) -> None:
    """Writes all images as one picture, and the files of ``--images``, ``--gif`` and ``--filmstrip``.

    Args:
        images: (n, C, H, W) uint8.
        args: Flags of ``add_output_arguments``, and ``--seed``: one number, or the seed of each image.
        sheet: Picture of all images.
        summary: Text printed beside the name of that picture.
        labels: (n) classes; None is "no class".
        recording: Decoding of the first images; None without ``--gif`` and ``--filmstrip``.
    """
    from maskgit_pl.pipeline.grids import save_images, save_png

    make_folder(args.out.parent)
    save_png(sheet, args.out)
    print(f"{args.out}: {summary}")
    if args.images is not None:
        make_folder(args.images)
        save_images(images, labels, args.images, seed=args.seed)
        print(f"{args.images}: {count_text(len(images), 'file')}")
    if recording is None:
        return
    for file, shown in ((args.gif, count_text(len(recording.seeds), "image")), (args.filmstrip, "the first image")):
        if file is not None:
            make_folder(file.parent)
            recording.save(file)
            print(f"{file}: decoding of {shown}")
