"""``maskgit outpaint``: extends an image beyond its borders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maskgit_pl.cli.decoding_flags import add_decoding_arguments, check_seed_and_batch, read_decoding_flags
from maskgit_pl.cli.edit_flags import (
    add_overlap_argument,
    add_variant_arguments,
    check_overlap_flag,
    check_variant_flags,
    list_seeds,
    read_edit_flags,
)
from maskgit_pl.cli.flags import check_outputs, use_flag_names
from maskgit_pl.cli.model import add_model_argument, find_model, open_pipe
from maskgit_pl.cli.outputs import (
    PICTURES,
    add_output_arguments,
    record_steps,
    recording_of,
    wants_decoding,
    write_generated,
)
from maskgit_pl.runs.units import count_text

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.pipeline.editing_canvas import Margins

__all__ = ["add_parser", "run"]

_SIDES = ("left", "right", "up", "down")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "outpaint",
        help="extend an image beyond its borders",
        description="Extend an image beyond its borders: a window slides over a larger canvas and fills it. The number "
        "of pixels to add must be a multiple of the pixels of a token.",
        epilog="Example: maskgit outpaint runs/fashion-mnist-adaln bag.png --up 8 --class Bag --out taller.png",
    )
    add_model_argument(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP file, of any size")
    for side in _SIDES:
        parser.add_argument(
            f"--{side}", type=int, metavar="PIXELS", help="pixels to add on this side (default: that of --all, or 0)"
        )
    parser.add_argument("--all", type=int, metavar="PIXELS", help="pixels to add on each side that is not given")
    add_overlap_argument(parser)
    add_variant_arguments(parser, dilation=0)
    add_decoding_arguments(parser)
    add_output_arguments(parser, out="outpainted.png", default=Path("outpainted.png"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Extends the image and writes the results."""
    added = _read_margins(args)
    check_overlap_flag(args)
    check_seed_and_batch(args)
    check_variant_flags(args)
    check_outputs(args, **PICTURES)
    from maskgit_pl.pipeline.pixels import (
        image_pixels,
        read_image_header,
    )
    from maskgit_pl.pipeline.regions import (
        pixel_region,
        token_mask,
    )

    header = read_image_header(args.image)
    folder, outline = find_model(args)
    label = outline.parse_class(args.class_)
    with use_flag_names(args):
        added.check((header.height, header.width), factor=outline.token_size, least=outline.image_size)
    outline.check_parallel("outpaint")
    decoding = read_decoding_flags(args, outline)
    from maskgit_pl.pipeline.display import describe_settings
    from maskgit_pl.pipeline.imaging_grids import edit_sheet

    image = image_pixels(args.image, channels=outline.channels)
    pipe = open_pipe(folder, args)
    options = {**dict(zip(_SIDES, added.sides, strict=True)), **read_edit_flags(args, label)}
    with record_steps("outpainting", is_recording=wants_decoding(args)) as (after_step, steps):
        made = pipe.outpaint(
            image, overlap=args.overlap, output_type="pt", callback=after_step, decoding=decoding, **options
        )
    variants = cast("Tensor", made)  # output_type "pt"
    # (H + up + down, W + left + right): True outside the image, and the image on the canvas.
    outside, original = added.outside(header.height, header.width), added.pad(image, size=1)
    # With --dilation, tokens along the border of the image are generated again too.
    unknown = token_mask(outside, factor=outline.token_size, dilation=args.dilation)
    region = pixel_region(unknown, factor=outline.token_size, height=outside.shape[0], width=outside.shape[1])
    described, seeds = outline.describe_class(label), list_seeds(args)
    title = f"{args.image.name}: {described}, {describe_settings(decoding)}"
    texts = [f"seed {seed}" for seed in seeds]
    sheet = edit_sheet(original, variants, mask=outside, region=region, title=title, captions=texts)
    summary = (
        f"{count_text(len(variants), 'variant')} of {described}, {variants.shape[-1]} x {variants.shape[-2]} pixels"
    )
    labels, captions = [label] * len(variants), [described] * len(variants)
    recording = recording_of(
        steps, pipe, variants, decoding=decoding, captions=captions, seeds=seeds, requested=outside
    )
    write_generated(variants, args, sheet=sheet, summary=summary, labels=labels, recording=recording)
    return 0


def _read_margins(args: argparse.Namespace) -> Margins:
    """Returns the pixels to add on each side from the flags, checked without the image."""
    from maskgit_pl.pipeline.editing_canvas import Margins  # imports neither torch nor PIL

    given = {side: getattr(args, side) for side in _SIDES}
    sides = {side: (args.all or 0) if pixels is None else pixels for side, pixels in given.items()}
    if not any(sides.values()):
        raise ValueError("one of --left, --right, --up, --down and --all must be > 0 pixels, got none")
    with use_flag_names(args):
        return Margins(**sides)
