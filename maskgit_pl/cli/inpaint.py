"""``maskgit inpaint`` and ``maskgit edit``: regenerate part of an image, with ``edit`` as another class."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maskgit_pl.cli.decoding_flags import add_decoding_arguments, check_seed_and_batch, read_decoding_flags
from maskgit_pl.cli.edit_flags import add_variant_arguments, check_variant_flags, list_seeds, read_edit_flags
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
from maskgit_pl.image_format import height_width
from maskgit_pl.runs.units import count_text

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.data.images import ImageHeader

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both commands to ``maskgit``."""
    inpaint = subparsers.add_parser(
        "inpaint",
        help="regenerate part of an image",
        description="Generate the tokens under a box or a mask again, and paste the result into the image.",
        epilog="Example: maskgit inpaint runs/fashion-mnist-adaln sneaker.png --box 0,0,28,14 --out inpainted.png",
    )
    edit = subparsers.add_parser(
        "edit",
        help="turn part of an image into another class",
        description="Turn what is in a box or under a mask into another class, and paste the result into the image.",
        epilog="Example: maskgit edit runs/fashion-mnist-adaln sneaker.png --box 0,4,28,16 --class 'Ankle boot'",
    )
    for parser in (inpaint, edit):
        add_model_argument(parser)
        parser.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP file")
        parser.add_argument(
            "--box",
            metavar="L,T,R,B",
            help="region to generate: left,top,right,bottom in pixels of IMAGE before --fit, or in percent of its "
            "width and height, such as 10%%,20%%,60%%,80%%",
        )
        parser.add_argument(
            "--mask",
            type=Path,
            metavar="FILE.png",
            help="region to generate: a picture of the size of IMAGE, white inside the region; black and transparent "
            "pixels stay",
        )
        parser.add_argument(
            "--fit", action="store_true", help="crop the centre of IMAGE and resize it to the size of the model"
        )
        add_variant_arguments(parser, dilation=1, class_required=parser is edit)
        add_decoding_arguments(parser)
        add_output_arguments(parser, out="edited.png", default=Path("edited.png"))
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Edits the image and writes the results."""
    check_seed_and_batch(args)
    check_variant_flags(args)
    check_outputs(args, **PICTURES)
    # Cheap checks come first: region, model files, size, settings. The weights are loaded after all of them.
    header, box = _read_region(args)
    folder, outline = find_model(args)
    label = outline.parse_class(args.class_)
    from maskgit_pl.pipeline.pixels import (
        check_fits,
        fit_to_model,
        image_pixels,
        mask_pixels,
    )
    from maskgit_pl.pipeline.regions import (
        box_mask,
        pixel_region,
        token_mask,
    )

    size, name = outline.image_size, f"image {args.image}"
    check_fits(header.height, header.width, image_size=size, fit=args.fit, name=name)
    outline.check_parallel("inpaint")
    decoding = read_decoding_flags(args, outline)
    from maskgit_pl.pipeline.display import describe_settings
    from maskgit_pl.pipeline.imaging_grids import edit_sheet

    image = image_pixels(args.image, channels=outline.channels)
    mask = mask_pixels(args.mask) if box is None else box_mask(box, height=header.height, width=header.width)
    image, mask = fit_to_model(image, mask, image_size=size, fit=args.fit, name=name)
    pipe = open_pipe(folder, args)
    with record_steps("inpainting", is_recording=wants_decoding(args)) as (after_step, steps):
        made = pipe.inpaint(
            image, mask, output_type="pt", callback=after_step, decoding=decoding, **read_edit_flags(args, label)
        )
    variants = cast("Tensor", made)  # output_type "pt"
    # The sheet shows the box or mask of the user, and the larger region of whole tokens that was generated.
    unknown = token_mask(mask, factor=outline.token_size, dilation=args.dilation)
    height, width = height_width(size)
    region = pixel_region(unknown, factor=outline.token_size, height=height, width=width)
    described, seeds = outline.describe_class(label), list_seeds(args)
    title = f"{args.image.name}: {described}, {describe_settings(decoding)}"
    texts = [f"seed {seed}" for seed in seeds]
    sheet = edit_sheet(image, variants, mask=mask, region=region, title=title, captions=texts)
    tokens = f"{int(unknown.sum())} of {unknown.numel()} tokens generated"
    summary = f"{count_text(len(variants), 'variant')} of {described}, {tokens}"
    labels, captions = [label] * len(variants), [described] * len(variants)
    recording = recording_of(steps, pipe, variants, decoding=decoding, captions=captions, seeds=seeds, requested=mask)
    write_generated(variants, args, sheet=sheet, summary=summary, labels=labels, recording=recording)
    return 0


def _read_region(args: argparse.Namespace) -> tuple[ImageHeader, list[int] | None]:
    """Returns the header of the image and the box in pixels (None with ``--mask``), checked without the model."""
    if (args.box is None) == (args.mask is None):
        got = "neither" if args.box is None else "both"
        raise ValueError(f"one of --box and --mask must be given, got {got}; they name the region to generate")
    from maskgit_pl.pipeline.pixels import check_mask_file, read_image_header
    from maskgit_pl.pipeline.regions import check_box, parse_box

    image = read_image_header(args.image)
    if args.box is None:
        check_mask_file(args.mask, image)
        return image, None
    with use_flag_names(args):
        box = parse_box(args.box, height=image.height, width=image.width)
        check_box(box, height=image.height, width=image.width)
    return image, box
