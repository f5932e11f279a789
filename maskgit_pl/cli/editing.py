"""``maskgit inpaint``, ``edit``, ``outpaint`` and ``panorama``: generate parts of images, and images of other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack, cast

from maskgit_pl.checks import check_integer, count_text, height_width, pixels_text
from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import ModelFlags, Run, check_one_of
from maskgit_pl.cli.outputs import Generated, Pictures, record_steps
from maskgit_pl.pipeline.options import MAX_RESULTS, DecodingSettings

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.decoding import DecodingConfig, DecodingStep
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["edit", "inpaint", "outpaint", "panorama"]

ImageFile = Annotated[Path, Word("IMAGE")]
Pixels = Annotated[int, Word("PIXELS")]
Picture = Annotated[Path, Output(".png")]

_TILE_SIZE = 84  # pixels: enlarges small images as the other sheets do (``pipeline.grids.TILE_SIZE``)


@dataclass(frozen=True)
class Region:
    """The region of an image that is generated.

    Args:
        box: Region to generate: left,top,right,bottom in pixels of IMAGE before --fit, or in percent of its width and
            height, such as 10%,20%,60%,80%.
        mask: Region to generate: a picture of the size of IMAGE, white inside the region; black and transparent pixels
            stay.
        fit: Crop the centre of IMAGE and resize it to the size of the model.
    """

    box: Annotated[str, Word("L,T,R,B")] | None = None
    mask: Annotated[Path, Word("FILE.png")] | None = None
    fit: bool = False

    def read(self, file: Path, pipe: MaskGIT) -> tuple[Tensor, Tensor]:
        """Returns the image (C, H, W) uint8 and the mask (H, W) bool, both of the size of the model."""
        from maskgit_pl.pipeline.pixels import fit_to_model, image_pixels, mask_pixels
        from maskgit_pl.pipeline.regions import box_mask, parse_box

        image = image_pixels(file, channels=pipe.outline.channels)
        height, width = image.shape[-2:]
        if self.box is not None:
            mask = box_mask(parse_box(self.box, height=height, width=width), height=height, width=width)
        else:
            assert self.mask is not None  # checked
            mask = mask_pixels(self.mask)
        return fit_to_model(image, mask, image_size=pipe.outline.image_size, fit=self.fit, name=f"image {file}")


@dataclass(frozen=True)
class Variants:
    """The results of an edit.

    Args:
        variants: Number of results.
        seed: Seed of the first result; result i has seed + i (default: 0).
        batch_size: Results decoded at a time.
        blend: Blur the seam; --no-blend keeps every pixel outside the region unchanged (default: --blend).
        dilation: Tokens by which the region grows on each side (default: 1 inside an image, 0 beyond its borders).
    """

    variants: int = 4
    seed: int = 0
    batch_size: int = 100
    blend: bool = True
    dilation: int | None = None

    @property
    def seeds(self) -> list[int]:
        """The seed of each result."""
        return [self.seed + number for number in range(self.variants)]

    def options(self, label: int | None) -> dict[str, Any]:
        """Returns the options of the editing methods of ``MaskGIT``."""
        check_integer("variants", self.variants, f"[1, {MAX_RESULTS}]")
        options = {"classes": [label] * self.variants, "seed": self.seed, "batch_size": self.batch_size}
        return {**options, "dilation": self.dilation, "blend": None if self.blend else 0.0}


def inpaint(
    folder: Run,
    image: ImageFile,
    *,
    class_: str | None = None,
    out: Picture = Path("edited.png"),
    region: Region = Region(),
    variants: Variants = Variants(),
    pictures: Pictures = Pictures(),
    model: ModelFlags = ModelFlags(),
    **decoding_settings: Unpack[DecodingSettings],
) -> None:
    """Regenerates part of an image.

    The tokens under a box or a mask are generated again, and the result is pasted into the image.

    Example: maskgit inpaint runs/fashion-mnist-adaln sneaker.png --box 0,0,28,14 --out inpainted.png

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo.
        image: JPEG, PNG or WebP file.
        class_: Class name or index (default: no class).
        out: Picture of the image and all results.
    """
    check_one_of(box=region.box, mask=region.mask, required=True)
    pipe = model.open(folder)
    label = pipe.outline.parse_class(class_)
    decoding = pipe.decoding_with(**decoding_settings)
    pixels, mask = region.read(image, pipe)
    with record_steps("inpainting", is_recording=pictures.show_decoding) as (after_step, steps):
        made = pipe.inpaint(
            pixels, mask, output_type="pt", callback=after_step, decoding=decoding, **variants.options(label)
        )
    dilation = 1 if variants.dilation is None else variants.dilation
    generated = _make_sheet(pipe, cast("Tensor", made), image, pixels, mask, dilation, label, variants, decoding, steps)
    pictures.write(generated, out, pipe=pipe, decoding=decoding)


def edit(
    folder: Run,
    image: ImageFile,
    *,
    class_: str,
    out: Picture = Path("edited.png"),
    region: Region = Region(),
    variants: Variants = Variants(),
    pictures: Pictures = Pictures(),
    model: ModelFlags = ModelFlags(),
    **decoding_settings: Unpack[DecodingSettings],
) -> None:
    """Turns part of an image into another class.

    What is in a box or under a mask is generated again, and the result is pasted into the image.

    Example: maskgit edit runs/fashion-mnist-adaln sneaker.png --box 0,4,28,16 --class 'Ankle boot'

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo.
        image: JPEG, PNG or WebP file.
        class_: Class name or index.
        out: Picture of the image and all results.
    """
    inpaint(
        folder,
        image,
        class_=class_,
        out=out,
        region=region,
        variants=variants,
        pictures=pictures,
        model=model,
        **decoding_settings,
    )


@dataclass(frozen=True)
class Sides:
    """The pixels that are added on each side; they must be a multiple of the pixels of a token.

    Args:
        left: Pixels to add on the left (default: that of --all, or 0).
        right: Pixels to add on the right (default: that of --all, or 0).
        up: Pixels to add above (default: that of --all, or 0).
        down: Pixels to add below (default: that of --all, or 0).
        all: Pixels to add on each side that is not given.
    """

    left: Pixels | None = None
    right: Pixels | None = None
    up: Pixels | None = None
    down: Pixels | None = None
    all: Pixels = 0


def outpaint(
    folder: Run,
    image: ImageFile,
    *,
    class_: str | None = None,
    overlap: float = 0.5,
    out: Picture = Path("outpainted.png"),
    sides: Sides = Sides(),
    variants: Variants = Variants(),
    pictures: Pictures = Pictures(),
    model: ModelFlags = ModelFlags(),
    **decoding_settings: Unpack[DecodingSettings],
) -> None:
    """Extends an image beyond its borders.

    A window slides over a larger canvas and fills it.

    Example: maskgit outpaint runs/fashion-mnist-adaln bag.png --up 8 --class Bag --out taller.png

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo.
        image: JPEG, PNG or WebP file, of any size.
        class_: Class name or index (default: no class).
        overlap: Fraction of a window that is known before it is decoded.
        out: Picture of the image and all results.
    """
    from maskgit_pl.pipeline.pixels import image_pixels
    from maskgit_pl.pipeline.regions import Margins

    given = (sides.left, sides.right, sides.up, sides.down)
    added = Margins(*(sides.all if side is None else side for side in given))
    if not any(added.sides):
        raise ValueError("one of --left, --right, --up, --down and --all must be > 0 pixels, got none")
    pipe = model.open(folder)
    label = pipe.outline.parse_class(class_)
    decoding = pipe.decoding_with(**decoding_settings)
    pixels = image_pixels(image, channels=pipe.outline.channels)
    left, right, up, down = added.sides
    with record_steps("outpainting", is_recording=pictures.show_decoding) as (after_step, steps):
        made = pipe.outpaint(
            pixels,
            left=left,
            right=right,
            up=up,
            down=down,
            overlap=overlap,
            output_type="pt",
            callback=after_step,
            decoding=decoding,
            **variants.options(label),
        )
    # (H + up + down, W + left + right): True outside the image, and the image on the canvas.
    outside, original = added.outside(*pixels.shape[-2:]), added.pad(pixels, size=1)
    # With --dilation, tokens along the border of the image are generated again too.
    dilation = variants.dilation or 0
    images = cast("Tensor", made)
    generated = _make_sheet(pipe, images, image, original, outside, dilation, label, variants, decoding, steps)
    pictures.write(generated, out, pipe=pipe, decoding=decoding)


def _make_sheet(
    pipe: MaskGIT,
    images: Tensor,
    file: Path,
    original: Tensor,
    mask: Tensor,
    dilation: int,
    label: int | None,
    variants: Variants,
    decoding: DecodingConfig,
    steps: list[DecodingStep],
) -> Generated:
    """Draws the original, the region that was generated, and the results.

    Args:
        pipe: Model.
        images: (n, C, H, W) uint8 results.
        file: File of the original, for the title.
        original: (C, H, W) uint8.
        mask: (H, W) bool, the region that the user named; the sheet also shows the larger one of whole tokens.
        dilation: Tokens by which the region grew.
        label: Class of the results.
        variants: Seeds of the results.
        decoding: Settings, for the title.
        steps: Recorded decoding steps.
    """
    from maskgit_pl.pipeline.display import describe_settings
    from maskgit_pl.pipeline.grids import edit_sheet
    from maskgit_pl.pipeline.regions import pixel_region, token_mask

    factor = pipe.outline.token_size
    height, width = mask.shape
    unknown = token_mask(mask, factor=factor, dilation=dilation)
    region = pixel_region(unknown, factor=factor, height=height, width=width)
    described = pipe.outline.describe_class(label)
    sheet = edit_sheet(
        original,
        images,
        mask=mask,
        region=region,
        title=f"{file.name}: {described}, {describe_settings(decoding)}",
        captions=[f"seed {seed}" for seed in variants.seeds],
    )
    tokens = f"{int(unknown.sum())} of {unknown.numel()} tokens generated"
    pixels = f"{width} x {height} pixels"
    is_canvas = (height, width) != height_width(pipe.outline.image_size)
    summary = f"{count_text(len(images), 'variant')} of {described}, {pixels if is_canvas else tokens}"
    count = len(images)
    return Generated(
        images, [label] * count, variants.seeds, sheet, summary, steps, [described] * count, variants.seeds, mask
    )


def panorama(
    folder: Run,
    *,
    classes: Annotated[str, Word("A,B,...")] = "all",
    width: Pixels,
    height: Pixels | None = None,
    overlap: float = 0.5,
    seed: int = 0,
    batch_size: int = 100,
    out: Picture = Path("panorama.png"),
    pictures: Pictures = Pictures(),
    model: ModelFlags = ModelFlags(),
    **decoding_settings: Unpack[DecodingSettings],
) -> None:
    """Generates images of any width.

    A window slides over a canvas of tokens and fills it.

    Example: maskgit panorama runs/fashion-mnist-adaln --classes Bag --width 112

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo.
        classes: Class names or indices, or all (default: all, at most 10).
        width: Width of each image.
        height: Height of each image (default: that of the model's images).
        overlap: Fraction of a window that is known before it is decoded.
        seed: Seed of the first image; image i has seed + i (default: 0).
        batch_size: Images per batch.
        out: Picture of all images.
    """
    from maskgit_pl.pipeline.display import describe_settings
    from maskgit_pl.pipeline.grids import add_title, image_grid

    pipe = model.open(folder)
    outline = pipe.outline
    labels = outline.parse_classes(classes)
    decoding = pipe.decoding_with(**decoding_settings)
    with record_steps("panorama", is_recording=pictures.show_decoding) as (after_step, steps):
        made = pipe.panorama(
            labels,
            width,
            height=height,
            overlap=overlap,
            output_type="pt",
            seed=seed,
            batch_size=batch_size,
            callback=after_step,
            decoding=decoding,
        )
    images = cast("Tensor", made)
    height = images.shape[-2]
    names, seeds = [outline.class_names[label] for label in labels], [seed + row for row in range(len(labels))]
    captions = [f"{name}, seed {each}" for name, each in zip(names, seeds, strict=True)]
    sheet = image_grid(images, columns=1, row_captions=captions, scale=max(1, _TILE_SIZE // height))
    size = pixels_text(outline.image_size)
    title = f"{width} x {height} pixels in windows of {size}: {describe_settings(decoding)}"
    summary = f"{count_text(len(images), 'image')} of {width} x {height} pixels"
    generated = Generated(images, labels, seeds, add_title(sheet, title), summary, steps, names, seeds)
    pictures.write(generated, out, pipe=pipe, decoding=decoding)
