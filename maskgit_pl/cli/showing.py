"""What the commands that generate write beside their images: how they were decoded, as a GIF and as a filmstrip."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from maskgit_pl.cli.outputs import made_folder

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.pipeline import MaskGIT

    _AfterStep: TypeAlias = Callable[[DecodingStep], None]

__all__ = ["add_showing_arguments", "recorded_steps", "write_decoding", "write_gif", "write_images", "write_picture"]

_SHOWN = 4  # images side by side in an animation
_FRAME, _ANIMATION, _SHORTEST = 600, 9600, 40  # milliseconds: of a frame, of all of them at most, of a frame at least


def add_showing_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ask for pictures of the decoding."""
    parser.add_argument("--gif", type=Path, metavar="FILE.gif", help="also write an animation of the decoding")
    parser.add_argument(
        "--filmstrip", type=Path, metavar="FILE.png", help="also write the decoding of the first image, step by step"
    )


@contextmanager
def recorded_steps(
    title: str, args: argparse.Namespace
) -> Iterator[tuple[Callable[[DecodingStep], None], list[DecodingStep]]]:
    """Shows progress, and keeps the steps of the first images where a picture of them is asked for.

    Yields:
        What is to be called after each step, and the steps of the first batch.
    """
    from rich.progress import Progress

    kept: list[DecodingStep] = []
    first: list[int] = []  # the size of the first batch, once it is known
    with Progress(transient=True) as progress:
        bar = progress.add_task(title, total=None)

        def after_step(step: DecodingStep) -> None:
            progress.advance(bar)
            first[:] = first or [len(step.tokens)]
            wanted = args.gif is not None or args.filmstrip is not None
            done = bool(kept) and not bool(kept[-1].still_masked.any())
            if wanted and not done and len(step.tokens) == first[0]:
                kept.append(_part(step, _SHOWN))

        yield after_step, kept


def write_decoding(
    pipe: MaskGIT,
    steps: Sequence[DecodingStep],
    args: argparse.Namespace,
    *,
    captions: Sequence[str],
    grid: tuple[int, int] | None = None,
) -> None:
    """Writes what the flags of ``add_showing_arguments`` ask for.

    Args:
        pipe: The model.
        steps: Of a run of at most four images.
        args: The flags.
        captions: One for each image of the animation.
        grid: Rows and columns of tokens, of another picture than the model's own.
    """
    if not steps:
        return
    from maskgit_pl.imaging import decoding_filmstrip, shown_steps

    grid = grid or pipe.tokenizer.grid
    if args.gif is not None:
        write_gif(pipe, steps, args.gif, captions=captions, grid=grid)
        print(f"{args.gif}: how {len(steps[0].tokens)} of them are decoded")
    if args.filmstrip is not None:
        shown = shown_steps(steps, "filmstrip")
        images = [pipe.tokenizer.decode(step.tokens[:1], grid=grid) for step in shown]
        write_picture(decoding_filmstrip(shown, images, grid=grid), args.filmstrip)
        print(f"{args.filmstrip}: how the first of them is decoded")


def write_gif(
    pipe: MaskGIT, steps: Sequence[DecodingStep], path: Path, *, captions: Sequence[str], grid: tuple[int, int]
) -> None:
    """Writes an animation of a decoding; arguments as of ``write_decoding``."""
    from maskgit_pl.imaging import decoding_frames, save_gif, shown_steps

    shown = shown_steps(steps, "animation")
    images = [pipe.tokenizer.decode(step.tokens, grid=grid) for step in shown]
    captions = captions[: len(images[0])]
    frames = decoding_frames(shown, images, grid=grid, captions=captions, num_steps=len(steps))
    made_folder(path.parent)
    save_gif(frames, path, milliseconds=max(_SHORTEST, min(_FRAME, _ANIMATION // len(frames))))


def write_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG; a folder that is not there is made, and named."""
    from maskgit_pl.imaging import save_png

    made_folder(path.parent)
    save_png(picture, path)


def write_images(images: Tensor, labels: Sequence[int | None], folder: Path, *, seed: int) -> None:
    """Writes each image into a file that its class and seed name; arguments as of ``image_grid`` and ``generate``."""
    from maskgit_pl.imaging import save_png, to_pil

    made_folder(folder)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = "no-class" if label is None else f"class-{label:04d}"
        save_png(to_pil(image), folder / f"{name}-seed-{seed + number:06d}.png")
    print(f"{folder}: {len(images)} files")


def _part(step: DecodingStep, count: int) -> DecodingStep:
    """The step of the first images alone."""
    tensors = {field.name: getattr(step, field.name)[:count] for field in fields(step) if field.name != "step"}
    return replace(step, **tensors)
