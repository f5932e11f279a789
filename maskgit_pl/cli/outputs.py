"""The files that commands write: their names and folders are checked before any work; pictures and their words after.

Used by the commands that generate and by those that plot.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.pipeline import MaskGIT

__all__ = [
    "add_output_arguments",
    "check_outputs",
    "made_folder",
    "recorded_steps",
    "wants_decoding",
    "write_decoding",
    "write_images",
    "write_picture",
]

_FOLDER = ""
_PICTURES = {"out": ".png", "gif": ".gif", "filmstrip": ".png", "images": _FOLDER}


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


def check_outputs(args: argparse.Namespace, **endings: str) -> None:
    """Refuses outputs that cannot be written, or whose name says another format than what is written.

    Args:
        args: The flags. One that was left out (None) is not checked.
        endings: The ending of each flag's file, an empty one for a folder; by default those of the commands that
            generate: ``out``, ``gif``, ``filmstrip`` and ``images``.

    Raises:
        ValueError: if a name has another ending, two flags name the same file, a file is named where there is a folder
            or the other way round, or the nearest folder that exists cannot be written to.
    """
    named: dict[Path, str] = {}
    for name, ending in (endings or _PICTURES).items():
        path: Path | None = getattr(args, name)
        if path is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if path.suffix.lower() != ending and ending != _FOLDER:
            raise ValueError(f"{flag} must end in {ending}, got {path}")
        if path.absolute() in named:
            raise ValueError(f"{flag} must differ from {named[path.absolute()]}, got {path} for both")
        named[path.absolute()] = flag
        _check_place(flag, path, is_folder=ending == _FOLDER)


def _check_place(flag: str, path: Path, *, is_folder: bool) -> None:
    if path.exists() and path.is_dir() != is_folder:
        here, wanted = ("file", "folder") if is_folder else ("folder", "file")
        raise ValueError(f"{flag} must be a {wanted}, got the {here} {path}")
    folder = path if is_folder else path.parent
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions do not say it of every file system
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} must lie in a folder that can be written to, got {path} ({existing}: {error.strerror})"
        ) from error


def made_folder(folder: Path) -> None:
    """Makes a folder that is not there, and says so."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder}: new folder")


@contextmanager
def recorded_steps(
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


def wants_decoding(args: argparse.Namespace) -> bool:
    """Returns whether ``--gif`` or ``--filmstrip`` asks for the decoding."""
    return args.gif is not None or args.filmstrip is not None


def write_decoding(
    pipe: MaskGIT,
    steps: Sequence[DecodingStep],
    args: argparse.Namespace,
    *,
    captions: Sequence[str],
    grid: tuple[int, int] | None = None,
) -> None:
    """Writes the animation and the filmstrip that ``--gif`` and ``--filmstrip`` ask for.

    Args:
        pipe: The model.
        steps: Steps of a run over a few images.
        args: The flags.
        captions: Text above each image of the animation.
        grid: Rows and columns of tokens, if the images are not of the model's own size.
    """
    from maskgit_pl.imaging import save_animation, save_filmstrip

    grid = grid or pipe.tokenizer.grid
    decode = partial(pipe.tokenizer.decode, grid=grid)
    if args.gif is not None:
        made_folder(args.gif.parent)
        save_animation(steps, decode, args.gif, grid=grid, captions=captions)
        print(f"{args.gif}: how {len(steps[0].tokens)} of them are decoded")
    if args.filmstrip is not None:
        made_folder(args.filmstrip.parent)
        save_filmstrip(steps, decode, args.filmstrip, grid=grid)
        print(f"{args.filmstrip}: how the first of them is decoded")


def write_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG; a folder that is not there is made, and named."""
    from maskgit_pl.imaging import save_png

    made_folder(path.parent)
    save_png(picture, path)


def write_images(images: Tensor, labels: Sequence[int | None], args: argparse.Namespace) -> None:
    """Writes each image into a file of its own if ``--images`` asks for it; see ``imaging.save_images``."""
    from maskgit_pl.imaging import save_images

    if args.images is None:
        return
    made_folder(args.images)
    save_images(images, labels, args.images, seed=args.seed)
    print(f"{args.images}: {len(images)} files")
