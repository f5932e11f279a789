"""``maskgit inpaint``: a part of an image generated anew."""

from __future__ import annotations

import argparse
import re
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maskgit_pl.cli.decoding import add_decoding_arguments, check_settings, decoding_settings
from maskgit_pl.cli.model import add_model_argument, check_at_least, class_of, find_model, naming_flags, open_pipe
from maskgit_pl.cli.outputs import check_outputs
from maskgit_pl.cli.showing import add_showing_arguments, recorded_steps, write_decoding, write_images, write_picture
from maskgit_pl.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.pipeline.outline import Outline
    from maskgit_pl.shards.images import ImageHeader

__all__ = ["add_parser", "add_region_arguments", "add_variant_arguments", "label_of", "read_header", "run"]

_EDGE = re.compile(r"(?P<number>-?[0-9]{1,9}(\.[0-9]{1,9})?)(?P<percent>%)?")  # of a box


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("inpaint", help="generate a part of an image anew", allow_abbrev=False)
    add_region_arguments(parser, class_required=False)
    parser.set_defaults(run=run)


def add_region_arguments(parser: argparse.ArgumentParser, *, class_required: bool) -> None:
    """Adds the flags that say which part of an image is generated anew, and as what."""
    add_model_argument(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP file")
    parser.add_argument(
        "--box",
        metavar="L,T,R,B",
        help="what to generate: left,top,right,bottom in pixels of IMAGE as it is (before --fit), or in percent of its "
        "width and height, such as 10%%,20%%,60%%,80%%",
    )
    parser.add_argument(
        "--mask", type=Path, metavar="FILE.png", help="or: a picture of IMAGE's size, white where to generate"
    )
    parser.add_argument(
        "--fit", action="store_true", help="cut IMAGE to the square in its middle and resize it to the model's size"
    )
    add_variant_arguments(parser, class_required=class_required, dilation=1)


def add_variant_arguments(
    parser: argparse.ArgumentParser, *, class_required: bool, dilation: int, out: str = "edited.png"
) -> None:
    """Adds the flags that all commands have which change an image."""
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
    parser.add_argument(
        "--out", type=Path, default=Path(out), metavar="FILE.png", help=f"all in one picture (default: {out})"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="also write each variant into a file of its own")
    add_showing_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Edits and writes.

    Raises:
        FileNotFoundError: No such run, image or mask.
        ValueError: Not an image, a wrong box or mask, an unknown class, or a number out of range.
    """
    settings = decoding_settings(args)
    header, box = _checked(args)
    folder, outline = find_model(args)
    label, class_name = label_of(outline, args.class_)
    from maskgit_pl import editing

    size, factor, name = outline.image_size, outline.token_size, f"image {args.image}"
    editing.check_fits(header.height, header.width, image_size=size, fit=args.fit, name=name)
    outline.check_parallel("inpaint")
    check_settings(args, settings, outline)
    from maskgit_pl.imaging import edit_sheet

    image = editing.image_pixels(args.image, channels=outline.channels)
    height, width = image.shape[-2:]
    mask = editing.mask_pixels(args.mask) if box is None else editing.box_mask(box, height=height, width=width)
    image, mask = editing.fitted(image, mask, image_size=size, fit=args.fit, name=name)
    pipe = open_pipe(folder, args)
    captions = [f"seed {args.seed + number}" for number in range(args.variants)]
    with recorded_steps("inpainting", args) as (after_step, steps):
        edited = pipe.inpaint(
            image,
            mask,
            classes=[label] * args.variants,
            seed=args.seed,
            dilation=args.dilation,
            blend=None if args.blend else 0.0,
            batch_size=args.batch,
            output_type="pt",
            callback=after_step,
            **settings,
        )
    variants = cast("Tensor", edited)  # as "pt" says
    unknown = editing.token_mask(mask, factor=factor, dilation=args.dilation)
    height, width = mask.shape
    sheet = edit_sheet(
        image,
        variants,
        mask=mask,
        region=editing.pixel_region(unknown, factor=factor, height=height, width=width),
        title=f"{args.image.name}: {class_name}",
        captions=captions,
    )
    write_picture(sheet, args.out)
    tokens = f"{int(unknown.sum())} of {unknown.numel()} tokens"
    print(f"{args.out}: {len(variants)} variants of {class_name}, {tokens} generated")
    if args.images is not None:
        write_images(variants, [label] * len(variants), args.images, seed=args.seed)
    write_decoding(pipe, steps, args, captions=captions)
    return 0


def label_of(outline: Outline, word: str | None) -> tuple[int | None, str]:
    """The class that ``--class`` names, and what to call it; None is no class.

    Raises:
        ValueError: An unknown class, or no class of a model that was trained without that.
    """
    if word is None:
        outline.class_ids([None])
        return None, "no class"
    (label,) = outline.class_ids([class_of(word, outline.class_names)])
    return label, f"class {printable(outline.class_names[label])}"


def _checked(args: argparse.Namespace) -> tuple[ImageHeader, list[int] | None]:
    """Refuses what can be refused without the model; the image's header, and the box in pixels if there is one."""
    if (args.box is None) == (args.mask is None):
        got = "neither" if args.box is None else "both"
        raise ValueError(f"--box, --mask: one of the two is needed, got {got}; they say what to generate")
    check_at_least(args, variants=1, dilation=0)
    check_outputs(args)
    box = None
    image = read_header("image", args.image)
    if args.box is not None:
        from maskgit_pl.editing import check_box

        box = _box(args.box, height=image.height, width=image.width)
        with naming_flags(args):
            check_box(box, height=image.height, width=image.width)
    else:
        mask = read_header("mask", args.mask)
        if (mask.height, mask.width) != (image.height, image.width):
            raise ValueError(
                f"mask {args.mask}: the image's {image.width} x {image.height} pixels are needed, got "
                f"{mask.width} x {mask.height}; resize the mask"
            )
    return image, box


def read_header(kind: str, path: Path) -> ImageHeader:
    """What an image's header says, without torch.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not an image.
    """
    from maskgit_pl.shards import images

    name = printable(path)
    if not path.exists():
        raise FileNotFoundError(f"{kind} {name}: no such file; name a JPEG, PNG or WebP file")
    return images.read_image_header(images.read_image_file(path, name=name), name=name)


def _box(text: str, *, height: int, width: int) -> list[int]:
    """The pixels of ``--box``. Of percentages, left and top are rounded down and right and bottom up."""
    edges = [_EDGE.fullmatch(word.strip()) for word in text.split(",")]
    box = []
    for edge, length, to_pixels in zip(edges, (width, height, width, height), (floor, floor, ceil, ceil), strict=False):
        if edge is None or (edge["percent"] is None and "." in edge["number"]):
            break
        number = edge["number"]
        box.append(int(number) if edge["percent"] is None else to_pixels(Fraction(number) * length / 100))
    if len(edges) != 4 or len(box) != 4:
        raise ValueError(
            f"--box must be left,top,right,bottom in whole pixels or in percent, got {text}; write such as 0,0,14,28 "
            "or 10%,20%,60%,80%"
        )
    return box
