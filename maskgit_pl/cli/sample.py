"""``maskgit sample``: images of classes, as a picture, as files, as an animation of their decoding, or by thousands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.bulk import add_bulk_arguments, check_bulk, device_of_rank, generate_bulk
from maskgit_pl.cli.decoding import add_decoding_arguments, check_settings, decoding_settings
from maskgit_pl.cli.model import add_model_argument, check_at_least, class_of, class_words, find_model, open_pipe
from maskgit_pl.cli.outputs import check_outputs
from maskgit_pl.cli.showing import add_showing_arguments, write_decoding, write_images, write_picture

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.outline import Outline

__all__ = ["add_parser", "run"]

_PER_CLASS = 8
_ANIMATED = 4  # images side by side in an animation
_OUT = Path("samples.png")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("sample", help="generate images of classes", allow_abbrev=False)
    add_model_argument(parser)
    parser.add_argument(
        "--classes", default="all", metavar="A,B,...", help="numbers or names, or all (default: all, at most 10)"
    )
    parser.add_argument("--per-class", type=int, metavar="N", help="images of each class (default: 8)")
    add_decoding_arguments(parser)
    parser.add_argument("--negative-class", metavar="NAME", help="what guidance pushes away from (default: no class)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="all in one picture, or FILE.npz with --num-images (default: samples.png)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="also write each image into a file of its own")
    add_showing_arguments(parser)
    add_bulk_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generates and writes.

    Raises:
        FileNotFoundError: No such run.
        ValueError: An unknown class or a number out of range.
    """
    decoding = decoding_settings(args)
    share = check_bulk(args)
    check_at_least(args, per_class=1)
    if share is None:
        args.out = args.out or _OUT
        check_outputs(args)
    else:
        check_outputs(args, out=".npz")
    folder, outline = find_model(args)
    classes, negative = _labels(args, outline)
    check_settings(args, decoding, outline, pushes_away=negative is not None)
    settings: dict[str, Any] = {**decoding}
    if negative is not None:
        settings["negative_classes"] = negative
    pipe = open_pipe(folder, args, device=device_of_rank() if share else None)
    if share is not None:
        generate_bulk(pipe, classes, args, settings, rank=share[0], world_size=share[1])
    else:
        _write(pipe, classes, args, settings)
    return 0


def _labels(args: argparse.Namespace, outline: Outline) -> tuple[list[int], int | None]:
    """The labels of ``--classes``, and that of ``--negative-class``."""
    names = outline.class_names
    everything = args.num_images is not None and args.classes == "all" and "all" not in names
    classes = outline.class_ids(range(len(names)) if everything else class_words(args.classes, names))
    if args.negative_class is None:
        return classes, None
    return classes, outline.class_ids([class_of(args.negative_class, names)])[0]


def _write(pipe: MaskGIT, classes: list[int], args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Generates ``--per-class`` images of each class and writes what was asked for."""
    from maskgit_pl.imaging import image_grid

    per_class = args.per_class or _PER_CLASS
    labels = [label for label in classes for _ in range(per_class)]
    images = _generate(pipe, labels, args, settings)
    names = [pipe.class_names[label] for label in classes]
    write_picture(image_grid(images, columns=per_class, row_captions=names), args.out)
    print(f"{args.out}: {len(images)} images of {len(classes)} classes, {_num_steps(pipe, settings)} steps each")
    if args.images is not None:
        write_images(images, labels, args.images, seed=args.seed)
    if args.gif is not None or args.filmstrip is not None:
        first_of_class = [number * per_class for number in range(min(_ANIMATED, len(classes)))]
        chosen = first_of_class if len(classes) > 1 else list(range(min(_ANIMATED, per_class)))
        steps = pipe.steps([labels[row] for row in chosen], seed=[args.seed + row for row in chosen], **settings)
        write_decoding(pipe, list(steps), args, captions=[pipe.class_names[labels[row]] for row in chosen])


def _generate(pipe: MaskGIT, labels: list[int], args: argparse.Namespace, settings: dict[str, Any]) -> Tensor:
    from rich.progress import Progress

    batches = -(-len(labels) // args.batch)
    with Progress(transient=True) as progress:
        bar = progress.add_task("sampling", total=batches * _num_steps(pipe, settings))
        return pipe.generate(
            labels,
            seed=args.seed,
            batch_size=args.batch,
            output_type="pt",
            callback=lambda step: progress.advance(bar),
            **settings,
        )


def _num_steps(pipe: MaskGIT, settings: dict[str, Any]) -> int:
    return pipe.decoding_with(**settings).num_steps
