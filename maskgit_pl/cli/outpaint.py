"""``maskgit outpaint``: an image goes on beyond its borders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maskgit_pl.cli.decoding import check_settings, decoding_settings
from maskgit_pl.cli.inpaint import add_variant_arguments, label_of, read_header
from maskgit_pl.cli.model import add_model_argument, check_at_least, find_model, naming_flags, open_pipe
from maskgit_pl.cli.outputs import check_outputs
from maskgit_pl.cli.showing import recorded_steps, write_decoding, write_images, write_picture

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.editing import Margins
    from maskgit_pl.shards.images import ImageHeader

__all__ = ["add_overlap_argument", "add_parser", "check_overlap", "run"]

_SIDES = ("left", "right", "up", "down")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("outpaint", help="go on with an image beyond its borders", allow_abbrev=False)
    add_model_argument(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP file, of any size")
    for side in _SIDES:
        parser.add_argument(f"--{side}", type=int, default=0, metavar="PIXELS", help="to add on this side")
    parser.add_argument("--all", type=int, metavar="PIXELS", help="to add on each side that is not named")
    add_overlap_argument(parser)
    add_variant_arguments(parser, class_required=False, dilation=0, out="outpainted.png")
    parser.set_defaults(run=run)


def add_overlap_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says how much of a window is known before it is decoded."""
    parser.add_argument(
        "--overlap", type=float, default=0.5, metavar="S", help="share of a window that is known first (default: 0.5)"
    )


def check_overlap(args: argparse.Namespace) -> None:
    """Refuses a share that no window can have.

    Raises:
        ValueError: It is not in (0, 1).
    """
    if not 0 < args.overlap < 1:
        raise ValueError(f"--overlap: a share in (0, 1) is needed, got {args.overlap}")


def run(args: argparse.Namespace) -> int:
    """Outpaints and writes.

    Raises:
        FileNotFoundError: No such run or image.
        ValueError: Not an image, sizes that are no whole tokens, an unknown class, or a number out of range.
    """
    settings = decoding_settings(args)
    header, added = _checked(args)
    folder, outline = find_model(args)
    label, class_name = label_of(outline, args.class_)
    with naming_flags(args):
        added.check((header.height, header.width), factor=outline.token_size, least=outline.image_size)
    outline.check_parallel("outpaint")
    check_settings(args, settings, outline)
    from maskgit_pl import editing
    from maskgit_pl.imaging import edit_sheet

    image = editing.image_pixels(args.image, channels=outline.channels)
    pipe = open_pipe(folder, args)
    captions = [f"seed {args.seed + number}" for number in range(args.variants)]
    with recorded_steps("outpainting", args) as (after_step, steps):
        made = pipe.outpaint(
            image,
            left=added.left,
            right=added.right,
            up=added.up,
            down=added.down,
            classes=[label] * args.variants,
            overlap=args.overlap,
            seed=args.seed,
            dilation=args.dilation,
            blend=None if args.blend else 0.0,
            batch_size=args.batch,
            output_type="pt",
            callback=after_step,
            **settings,
        )
    variants = cast("Tensor", made)  # as "pt" says
    outside = added.outside(*image.shape[-2:])
    title = f"{args.image.name}: {class_name}"
    page = edit_sheet(
        added.padded(image, size=1), variants, mask=outside, region=outside, title=title, captions=captions
    )
    write_picture(page, args.out)
    height, width = variants.shape[-2:]
    print(f"{args.out}: {len(variants)} variants of {class_name}, {width} x {height} pixels")
    if args.images is not None:
        write_images(variants, [label] * len(variants), args.images, seed=args.seed)
    write_decoding(pipe, steps, args, captions=captions, grid=pipe.tokenizer.network.config.grid((height, width)))
    return 0


def _checked(args: argparse.Namespace) -> tuple[ImageHeader, Margins]:
    """Refuses what can be refused without the model; the image's header, and the pixels of each side."""
    sides = {side: getattr(args, side) or (args.all or 0) for side in _SIDES}
    for side, pixels in sides.items():
        if pixels < 0:
            raise ValueError(f"--{side}: at least 0 pixels are needed, got {pixels}")
    if not any(sides.values()):
        raise ValueError("--left, --right, --up, --down, --all: pixels to add are needed, got none")
    check_at_least(args, variants=1, dilation=0)
    check_overlap(args)
    check_outputs(args)
    from maskgit_pl.editing import Margins  # imports neither torch nor PIL

    return read_header("image", args.image), Margins(**sides)
