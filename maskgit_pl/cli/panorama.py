"""``maskgit panorama``: images of any width, made by a window that slides over them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maskgit_pl.cli.decoding import add_decoding_arguments, check_settings, decoding_settings
from maskgit_pl.cli.model import add_model_argument, class_words, find_model, naming_flags, open_pipe
from maskgit_pl.cli.outpaint import add_overlap_argument, check_overlap
from maskgit_pl.cli.outputs import check_outputs
from maskgit_pl.cli.showing import add_showing_arguments, recorded_steps, write_decoding, write_images, write_picture

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("panorama", help="generate images of any width", allow_abbrev=False)
    add_model_argument(parser)
    parser.add_argument(
        "--classes", default="all", metavar="A,B,...", help="numbers or names, or all (default: all, at most 10)"
    )
    parser.add_argument("--width", type=int, required=True, metavar="PIXELS", help="of each image")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="of each image (default: the model's)")
    add_overlap_argument(parser)
    add_decoding_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("panorama.png"),
        metavar="FILE.png",
        help="all in one picture (default: panorama.png)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="also write each image into a file of its own")
    add_showing_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generates and writes.

    Raises:
        FileNotFoundError: No such run.
        ValueError: Sizes that are no whole tokens, an unknown class, or a number out of range.
    """
    settings = decoding_settings(args)
    check_overlap(args)
    check_outputs(args)
    folder, outline = find_model(args)
    labels = outline.class_ids(class_words(args.classes, outline.class_names))
    names = [outline.class_names[label] for label in labels]
    from maskgit_pl.editing import check_canvas

    size = outline.image_size
    with naming_flags(args):
        check_canvas(args.height or size, args.width, factor=outline.token_size, least=size)
    outline.check_parallel("panorama")
    check_settings(args, settings, outline)
    from maskgit_pl.imaging import image_grid

    pipe = open_pipe(folder, args)
    with recorded_steps("panorama", args) as (after_step, steps):
        made = pipe.panorama(
            labels,
            args.width,
            height=args.height,
            overlap=args.overlap,
            seed=args.seed,
            batch_size=args.batch,
            output_type="pt",
            callback=after_step,
            **settings,
        )
    images = cast("Tensor", made)  # as "pt" says
    height, width = images.shape[-2:]
    scale = max(1, 84 // height)  # small pictures as large as in the other sheets
    write_picture(image_grid(images, columns=1, row_captions=names, scale=scale), args.out)
    print(f"{args.out}: {len(images)} images of {width} x {height} pixels")
    if args.images is not None:
        write_images(images, labels, args.images, seed=args.seed)
    write_decoding(pipe, steps, args, captions=names, grid=pipe.tokenizer.network.config.grid((height, width)))
    return 0
