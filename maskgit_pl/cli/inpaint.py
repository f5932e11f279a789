"""``maskgit inpaint`` and ``maskgit edit``: a part of an image generated again, as another class with ``edit``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from maskgit_pl.cli.decoding import add_decoding_arguments, check_seed_and_batch, read_decoding
from maskgit_pl.cli.model import add_model_argument, check_at_least, find_model, naming_flags, open_pipe
from maskgit_pl.cli.outputs import (
    add_output_arguments,
    check_outputs,
    recorded_steps,
    wants_decoding,
    write_decoding,
    write_images,
    write_picture,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.shards.images import ImageHeader

__all__ = [
    "add_parser",
    "add_variant_arguments",
    "captions",
    "check_variants",
    "edit_options",
    "run",
    "write_variants",
]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both commands to ``maskgit``."""
    inpaint = subparsers.add_parser("inpaint", help="generate a part of an image anew", allow_abbrev=False)
    edit = subparsers.add_parser("edit", help="generate a part of an image anew, as a class", allow_abbrev=False)
    for parser in (inpaint, edit):
        add_model_argument(parser)
        parser.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP file")
        parser.add_argument(
            "--box",
            metavar="L,T,R,B",
            help="what to generate: left,top,right,bottom in pixels of IMAGE as it is (before --fit), or in percent of "
            "its width and height, such as 10%%,20%%,60%%,80%%",
        )
        parser.add_argument(
            "--mask", type=Path, metavar="FILE.png", help="or: a picture of IMAGE's size, white where to generate"
        )
        parser.add_argument(
            "--fit", action="store_true", help="cut IMAGE to the square in its middle and resize it to the model's size"
        )
        add_variant_arguments(parser, dilation=1, out="edited.png", class_required=parser is edit)
        parser.set_defaults(run=run)


def add_variant_arguments(
    parser: argparse.ArgumentParser, *, dilation: int, out: str, class_required: bool = False
) -> None:
    """Adds the flags of all commands that change an image."""
    parser.add_argument(
        "--class",
        dest="class_",
        required=class_required,
        metavar="NAME",
        help="name or number of its class" + ("" if class_required else " (default: no class)"),
    )
    parser.add_argument("--variants", type=int, default=4, metavar="N", help="results (default: 4)")
    parser.add_argument(
        "--blend",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="soften the seam; --no-blend keeps every pixel outside of the region as it is (default: --blend)",
    )
    parser.add_argument(
        "--dilation",
        type=int,
        default=dilation,
        metavar="N",
        help=f"tokens by which the region grows (default: {dilation})",
    )
    add_decoding_arguments(parser)
    add_output_arguments(parser, out=out, default=Path(out))


def check_variants(args: argparse.Namespace) -> None:
    """Checks the flags of ``add_variant_arguments`` that do not depend on the model.

    Raises:
        ValueError: if a number is out of range, or an output cannot be written.
    """
    check_seed_and_batch(args)
    check_at_least(args, variants=1, dilation=0)
    check_outputs(args)


def edit_options(args: argparse.Namespace, label: int | None) -> dict[str, Any]:
    """Returns the options of ``MaskGIT``'s editing methods that the flags say."""
    return {
        "classes": [label] * args.variants,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dilation": args.dilation,
        "blend": None if args.blend else 0.0,
    }


def write_variants(
    pipe: MaskGIT,
    variants: Tensor,
    args: argparse.Namespace,
    *,
    sheet: Image.Image,
    label: int | None,
    steps: Sequence[DecodingStep],
    details: str,
) -> None:
    """Writes the sheet of an edit, and what ``--images``, ``--gif`` and ``--filmstrip`` ask for.

    Args:
        pipe: The model.
        variants: (n, C, H, W) uint8.
        args: The flags.
        sheet: Picture of the original and the variants.
        label: Class of the variants; None is "no class".
        steps: Decoding steps that were recorded.
        details: Text after the number of variants and their class.
    """
    write_picture(sheet, args.out)
    print(f"{args.out}: {len(variants)} variants of {pipe.outline.describe_class(label)}, {details}")
    write_images(variants, [label] * len(variants), args)
    grid = pipe.tokenizer.network.config.grid((variants.shape[-2], variants.shape[-1]))
    write_decoding(pipe, steps, args, captions=captions(args), grid=grid)


def captions(args: argparse.Namespace) -> list[str]:
    """Returns the text of each variant in pictures."""
    return [f"seed {args.seed + number}" for number in range(args.variants)]


def run(args: argparse.Namespace) -> int:
    """Edits and writes.

    Raises:
        FileNotFoundError: if there is no such run, image or mask.
        ValueError: if it is not an image, a box or mask is wrong, a class is unknown, or a number is out of range.
    """
    check_variants(args)
    header, box = _read_region(args)
    folder, outline = find_model(args)
    label = outline.parse_class(args.class_)
    from maskgit_pl import editing

    size, name = outline.image_size, f"image {args.image}"
    editing.check_fits(header.height, header.width, image_size=size, fit=args.fit, name=name)
    outline.check_parallel("inpaint")
    decoding = read_decoding(args, outline)
    from maskgit_pl.imaging import edit_sheet

    image = editing.image_pixels(args.image, channels=outline.channels)
    mask = (
        editing.mask_pixels(args.mask)
        if box is None
        else editing.box_mask(box, height=header.height, width=header.width)
    )
    image, mask = editing.fitted(image, mask, image_size=size, fit=args.fit, name=name)
    pipe = open_pipe(folder, args)
    with recorded_steps("inpainting", is_recording=wants_decoding(args)) as (after_step, steps):
        made = pipe.inpaint(
            image, mask, output_type="pt", callback=after_step, decoding=decoding, **edit_options(args, label)
        )
    variants = cast("Tensor", made)  # as "pt" says
    unknown = editing.token_mask(mask, factor=outline.token_size, dilation=args.dilation)
    region = editing.pixel_region(unknown, factor=outline.token_size, height=size, width=size)
    title = f"{args.image.name}: {outline.describe_class(label)}"
    sheet = edit_sheet(image, variants, mask=mask, region=region, title=title, captions=captions(args))
    details = f"{int(unknown.sum())} of {unknown.numel()} tokens generated"
    write_variants(pipe, variants, args, sheet=sheet, label=label, steps=steps, details=details)
    return 0


def _read_region(args: argparse.Namespace) -> tuple[ImageHeader, list[int] | None]:
    """Returns the header of the image and the box in pixels, if there is one, checked without the model."""
    if (args.box is None) == (args.mask is None):
        got = "neither" if args.box is None else "both"
        raise ValueError(f"--box, --mask: one of the two is needed, got {got}; they say what to generate")
    from maskgit_pl.editing import check_box, parse_box, read_image_header

    image = read_image_header(args.image)
    if args.box is not None:
        with naming_flags(args):
            box = parse_box(args.box, height=image.height, width=image.width)
            check_box(box, height=image.height, width=image.width)
        return image, box
    mask = read_image_header(args.mask, name="mask")
    if (mask.height, mask.width) != (image.height, image.width):
        raise ValueError(
            f"mask {args.mask}: the image's {image.width} x {image.height} pixels are needed, got "
            f"{mask.width} x {mask.height}; resize the mask"
        )
    return image, None
