"""``maskgit panorama``: generates images of any width, window by window."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maskgit_pl.cli.decoding_flags import add_decoding_arguments, check_seed_and_batch, read_decoding_flags
from maskgit_pl.cli.edit_flags import add_overlap_argument, check_overlap_flag
from maskgit_pl.cli.flags import check_outputs, use_flag_names
from maskgit_pl.cli.model import add_classes_argument, add_model_argument, find_model, open_pipe
from maskgit_pl.cli.outputs import (
    PICTURES,
    add_output_arguments,
    record_steps,
    recording_of,
    wants_decoding,
    write_generated,
)
from maskgit_pl.image_format import pixels_text
from maskgit_pl.runs.units import count_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_parser", "run"]

_TILE_SIZE = 84  # pixels: enlarges small images as the other sheets do (imaging.layout.TILE_SIZE)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "panorama",
        help="generate images of any width",
        description="Generate images that are larger than those of the training: a window slides over a canvas of "
        "tokens and fills it.",
        epilog="Example: maskgit panorama runs/fashion-mnist-adaln --classes Bag --width 112",
    )
    add_model_argument(parser)
    add_classes_argument(parser)
    parser.add_argument("--width", type=int, required=True, metavar="PIXELS", help="width of each image")
    parser.add_argument(
        "--height", type=int, metavar="PIXELS", help="height of each image (default: that of the model's images)"
    )
    add_overlap_argument(parser)
    add_decoding_arguments(parser)
    add_output_arguments(parser, out="panorama.png", default=Path("panorama.png"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generates the images and writes them."""
    check_overlap_flag(args)
    check_seed_and_batch(args)
    check_outputs(args, **PICTURES)
    folder, outline = find_model(args)
    labels = outline.parse_classes(args.classes)
    from maskgit_pl.pipeline.editing_canvas import check_canvas

    # The size and the settings are checked before torch is imported.
    height = outline.least_canvas[0] if args.height is None else args.height
    with use_flag_names(args):
        check_canvas(height, args.width, factor=outline.token_size, least=outline.image_size)
    outline.check_parallel("panorama")
    decoding = read_decoding_flags(args, outline)
    from maskgit_pl.pipeline.display import describe_settings
    from maskgit_pl.pipeline.grids import add_title
    from maskgit_pl.pipeline.imaging_grids import image_grid

    pipe = open_pipe(folder, args)
    with record_steps("panorama", is_recording=wants_decoding(args)) as (after_step, steps):
        made = pipe.panorama(
            labels,
            args.width,
            height=height,
            overlap=args.overlap,
            output_type="pt",
            seed=args.seed,
            batch_size=args.batch_size,
            callback=after_step,
            decoding=decoding,
        )
    images = cast("Tensor", made)  # output_type "pt"
    names, seeds = [outline.class_names[label] for label in labels], [args.seed + row for row in range(len(labels))]
    captions = [f"{name}, seed {seed}" for name, seed in zip(names, seeds, strict=True)]
    sheet = image_grid(images, columns=1, row_captions=captions, scale=max(1, _TILE_SIZE // height))
    summary = f"{count_text(len(images), 'image')} of {args.width} x {height} pixels"
    size = outline.image_size
    title = f"{args.width} x {height} pixels in windows of {pixels_text(size)}: {describe_settings(decoding)}"
    recording = recording_of(steps, pipe, images, decoding=decoding, captions=names, seeds=seeds)
    sheet = add_title(sheet, title)
    write_generated(images, args, sheet=sheet, summary=summary, labels=labels, recording=recording)
    return 0
