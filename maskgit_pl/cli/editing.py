"""``maskgit inpaint``, ``edit``, ``outpaint`` and ``panorama``: generate parts of images, and images of other sizes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maskgit_pl.checks import count_text, height_width, pixels_text
from maskgit_pl.cli.flags import check_outputs, use_flag_names
from maskgit_pl.cli.generation_flags import (
    add_classes_argument,
    add_decoding_arguments,
    add_model_argument,
    add_overlap_argument,
    add_variant_arguments,
    check_overlap_flag,
    check_seed_and_batch,
    check_variant_flags,
    find_model,
    list_seeds,
    open_pipe,
    read_decoding_flags,
    read_edit_flags,
)
from maskgit_pl.cli.outputs import (
    PICTURES,
    add_output_arguments,
    record_steps,
    recording_of,
    wants_decoding,
    write_generated,
)

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.data.images import ImageHeader
    from maskgit_pl.pipeline.regions import Margins

__all__ = ["add_inpaint_parser", "add_outpaint_parser", "add_panorama_parser"]

_SIDES = ("left", "right", "up", "down")
_TILE_SIZE = 84  # pixels: enlarges small images as the other sheets do (``pipeline.grids.TILE_SIZE``)


def add_inpaint_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``inpaint`` and ``edit`` to ``maskgit``; ``edit`` generates another class."""
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
        parser.set_defaults(run=_run_inpaint)


def _run_inpaint(args: argparse.Namespace) -> int:
    """Edits the image and writes the results."""
    check_seed_and_batch(args)
    check_variant_flags(args)
    check_outputs(args, **PICTURES)
    # Cheap checks come first: region, model files, size, settings. The weights are loaded after all of them.
    header, box = _read_region(args)
    folder, outline = find_model(args)
    label = outline.parse_class(args.class_)
    from maskgit_pl.pipeline.pixels import check_fits, fit_to_model, image_pixels, mask_pixels
    from maskgit_pl.pipeline.regions import box_mask, pixel_region, token_mask

    size, name = outline.image_size, f"image {args.image}"
    check_fits(header.height, header.width, image_size=size, fit=args.fit, name=name)
    outline.check_parallel("inpaint")
    decoding = read_decoding_flags(args, outline)
    from maskgit_pl.pipeline.display import describe_settings
    from maskgit_pl.pipeline.grids import edit_sheet

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


def add_outpaint_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=_run_outpaint)


def _run_outpaint(args: argparse.Namespace) -> int:
    """Extends the image and writes the results."""
    added = _read_margins(args)
    check_overlap_flag(args)
    check_seed_and_batch(args)
    check_variant_flags(args)
    check_outputs(args, **PICTURES)
    from maskgit_pl.pipeline.pixels import image_pixels, read_image_header
    from maskgit_pl.pipeline.regions import pixel_region, token_mask

    header = read_image_header(args.image)
    folder, outline = find_model(args)
    label = outline.parse_class(args.class_)
    with use_flag_names(args):
        added.check((header.height, header.width), factor=outline.token_size, least=outline.image_size)
    outline.check_parallel("outpaint")
    decoding = read_decoding_flags(args, outline)
    from maskgit_pl.pipeline.display import describe_settings
    from maskgit_pl.pipeline.grids import edit_sheet

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
    from maskgit_pl.pipeline.regions import Margins  # imports neither torch nor PIL

    given = {side: getattr(args, side) for side in _SIDES}
    sides = {side: (args.all or 0) if pixels is None else pixels for side, pixels in given.items()}
    if not any(sides.values()):
        raise ValueError("one of --left, --right, --up, --down and --all must be > 0 pixels, got none")
    with use_flag_names(args):
        return Margins(**sides)


def add_panorama_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=_run_panorama)


def _run_panorama(args: argparse.Namespace) -> int:
    """Generates the images and writes them."""
    check_overlap_flag(args)
    check_seed_and_batch(args)
    check_outputs(args, **PICTURES)
    folder, outline = find_model(args)
    labels = outline.parse_classes(args.classes)
    from maskgit_pl.pipeline.regions import check_canvas

    # The size and the settings are checked before torch is imported.
    height = outline.least_canvas[0] if args.height is None else args.height
    with use_flag_names(args):
        check_canvas(height, args.width, factor=outline.token_size, least=outline.image_size)
    outline.check_parallel("panorama")
    decoding = read_decoding_flags(args, outline)
    from maskgit_pl.pipeline.display import describe_settings
    from maskgit_pl.pipeline.grids import add_title, image_grid

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
