"""The files of the commands that generate: their flags, the checks before any work, and what is written and said."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.flags import FOLDER, make_folder

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["PICTURES", "add_output_arguments", "record_steps", "wants_decoding", "write_generated"]

PICTURES = {"out": ".png", "gif": ".gif", "filmstrip": ".png", "images": FOLDER}  # for ``check_outputs``


def add_output_arguments(parser: argparse.ArgumentParser, *, out: str, default: Path | None = None) -> None:
    """Adds the flags that name the files of a command that generates.

    Args:
        parser: The command's.
        out: Name of the picture of all images, for the help.
        default: The same as a path; None if the command chooses it.
    """
    parser.add_argument(
        "--out", type=Path, default=default, metavar="FILE.png", help=f"all in one picture (default: {out})"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="also write each image into a file of its own")
    parser.add_argument("--gif", type=Path, metavar="FILE.gif", help="also write an animation of the decoding")
    parser.add_argument(
        "--filmstrip", type=Path, metavar="FILE.png", help="also write the decoding of the first image, step by step"
    )


def wants_decoding(args: argparse.Namespace) -> bool:
    """Returns whether ``--gif`` or ``--filmstrip`` asks for the decoding."""
    return args.gif is not None or args.filmstrip is not None


@contextmanager
def record_steps(
    title: str, *, is_recording: bool, total: int | None = None
) -> Iterator[tuple[Callable[[DecodingStep], None], list[DecodingStep]]]:
    """Shows progress, and records the steps of the first images.

    Args:
        title: Text of the progress bar.
        is_recording: False only shows progress.
        total: Number of steps of all batches; None if it is not known.

    Yields:
        The callback of ``MaskGIT``'s methods, and the steps.
    """
    from rich.progress import Progress

    from maskgit_pl.imaging import StepRecorder

    record = StepRecorder()
    with Progress(transient=True) as progress:
        bar = progress.add_task(title, total=total)

        def after_step(step: DecodingStep) -> None:
            progress.advance(bar)
            if is_recording:
                record(step)

        yield after_step, record.steps


def write_generated(
    pipe: MaskGIT,
    images: Tensor,
    args: argparse.Namespace,
    *,
    sheet: Image.Image,
    said: str,
    labels: Sequence[int | None],
    steps: Sequence[DecodingStep],
    captions: Sequence[str],
) -> None:
    """Writes all images as one picture, and what ``--images``, ``--gif`` and ``--filmstrip`` ask for.

    Args:
        pipe: The model.
        images: (n, C, H, W) uint8.
        args: The flags of ``add_output_arguments``, and ``--seed``.
        sheet: The picture of all images.
        said: Text about it.
        labels: Class of each image; None is "no class".
        steps: Decoding steps of a few images.
        captions: Text above each image of the animation.
    """
    from maskgit_pl.imaging import save_animation, save_filmstrip, save_images, save_png

    make_folder(args.out.parent)
    save_png(sheet, args.out)
    print(f"{args.out}: {said}")
    if args.images is not None:
        make_folder(args.images)
        save_images(images, labels, args.images, seed=args.seed)
        print(f"{args.images}: {len(images)} files")
    grid = pipe.tokenizer.network.config.grid((images.shape[-2], images.shape[-1]))
    decode = partial(pipe.tokenizer.decode, grid=grid)
    if args.gif is not None:
        make_folder(args.gif.parent)
        save_animation(steps, decode, args.gif, grid=grid, captions=captions)
        print(f"{args.gif}: how {len(steps[0].tokens)} of them are decoded")
    if args.filmstrip is not None:
        make_folder(args.filmstrip.parent)
        save_filmstrip(steps, decode, args.filmstrip, grid=grid)
        print(f"{args.filmstrip}: how the first of them is decoded")
