"""``maskgit inpaint``, ``edit``, ``outpaint`` and ``panorama``: generate parts of images, and images of other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from maskgit_pl.checks import check_integer, height_width, pixels_text
from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import ModelFlags, Pictures, Run, check_one_of, record_steps
from maskgit_pl.pipeline.options import MAX_RESULTS, DecodingSettings
from maskgit_pl.text import count_text

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.display import Recording

ImageFile = Annotated[Path, Word("IMAGE")]
Pixels = Annotated[int, Word("PIXELS")]
Picture = Annotated[Path, Output(".png")]


@dataclass(frozen=True)
class Region:
    """The region of an image that is generated.

    Args:
        box: Region to generate: left,top,right,bottom in pixels of IMAGE before --fit.
        mask: Region to generate: a picture of the size of IMAGE, white inside the region; black and
            transparent pixels stay.
        fit: Crop the centre of IMAGE and resize it to the size of the model.
    """

    box: Annotated[tuple[int, ...], Word("L,T,R,B")] | None = None
    mask: Annotated[Path, Word("FILE.png")] | None = None
    fit: bool = False

    def read(self, file: Path, pipe: MaskGIT) -> tuple[Tensor, Tensor]:
        """Returns the image (C, H, W) uint8 and the mask (H, W) bool, both of the size of the model."""
        from maskgit_pl.pipeline.regions import box_mask, fit_to_model, image_pixels, mask_pixels

        image = image_pixels(file, channels=pipe.tokenizer.channels)
        mask = None if self.mask is None else mask_pixels(self.mask)
        if self.box is not None:
            mask = box_mask(self.box, height=image.shape[-2], width=image.shape[-1])
        return fit_to_model(image, mask, image_size=pipe.tokenizer.image_size, fit=self.fit, name=f"image {file}")


@dataclass(frozen=True)
class Variants:
    """The results of an edit.

    Args:
        variants: Number of results.
        seed: Seed of the first result; result i has seed + i (default: 0).
        batch_size: Results decoded at a time.
        blend: Blur the seam; --no-blend keeps every pixel outside the region unchanged (default: --blend).
    """

    variants: int = 4
    seed: int = 0
    batch_size: int = 100
    blend: bool = True

    @property
    def seam(self) -> float | None:
        """The blur of the seam in pixels; None is the model's own."""
        return None if self.blend else 0.0


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

    Example: maskgit inpaint fashion-mnist-demo shirt.png --box 0,0,28,14 --out inpainted.png

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo.
        image: JPEG, PNG or WebP file.
        class_: Class name or index (default: no class).
        out: Picture of the image and all results.
    """
    check_one_of(box=region.box, mask=region.mask, required=True)
    pipe = model.open(folder)
    pixels, mask = region.read(image, pipe)
    task = partial(pipe.inpaint, pixels, mask, blend=variants.seam)
    _edit(pipe, task, pixels, mask, image, class_, variants, decoding_settings, pictures, out)


def edit(
    folder: Run,
    image: ImageFile,
    *,
    class_: str,
    strength: float | None = None,
    out: Picture = Path("edited.png"),
    region: Region = Region(),
    variants: Variants = Variants(),
    pictures: Pictures = Pictures(),
    model: ModelFlags = ModelFlags(),
    **decoding_settings: Unpack[DecodingSettings],
) -> None:
    """Turns an image, or a part of it, into another class.

    What is in a box or under a mask is generated again and pasted into the image; or with --strength, a
    random share of all tokens is generated again.

    Example: maskgit edit fashion-mnist-demo shirt.png --box 0,12,28,28 --class Pullover

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo.
        image: JPEG, PNG or WebP file.
        class_: Class name or index.
        strength: Share of the tokens of the whole image that are generated again, above 0 and up to 1, in
            place of --box and --mask.
        out: Picture of the image and all results.
    """
    check_one_of(box=region.box, mask=region.mask, strength=strength, required=True)
    check_one_of(no_blend=not variants.blend, strength=strength)
    pipe = model.open(folder)
    pixels, mask = region.read(image, pipe)
    task = partial(pipe.inpaint, pixels, mask, blend=variants.seam)
    if strength is not None:
        task = partial(pipe.edit, pixels, strength=strength)
    _edit(pipe, task, pixels, mask, image, class_, variants, decoding_settings, pictures, out)


@dataclass(frozen=True)
class Sides:
    """The pixels that are added on each side; they must be a multiple of the pixels of a token.

    Args:
        left: Pixels to add on the left.
        right: Pixels to add on the right.
        up: Pixels to add above.
        down: Pixels to add below.
    """

    left: Pixels = 0
    right: Pixels = 0
    up: Pixels = 0
    down: Pixels = 0


def outpaint(
    folder: Run,
    image: ImageFile,
    *,
    class_: str | None = None,
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
        out: Picture of the image and all results.
    """
    pipe = model.open(folder)
    from maskgit_pl.pipeline.regions import Margins, image_pixels

    margins = Margins(**vars(sides))
    pixels = image_pixels(image, channels=pipe.tokenizer.channels)
    margins.check(pixels.shape[-2:], factor=pipe.tokenizer.token_size, least=pipe.tokenizer.image_size)
    # (H + up + down, W + left + right): the image on the canvas, and True outside of it.
    original, outside = margins.pad(pixels, size=1), margins.outside(*pixels.shape[-2:])
    task = partial(pipe.outpaint, pixels, **vars(sides), blend=variants.seam)
    _edit(pipe, task, original, outside, image, class_, variants, decoding_settings, pictures, out)


def _edit(
    pipe: MaskGIT,
    task: partial[Any],
    original: Tensor,
    mask: Tensor,
    file: Path,
    class_: str | None,
    variants: Variants,
    settings: DecodingSettings,
    pictures: Pictures,
    out: Path,
) -> None:
    """Generates the results of an edit, draws them beside the original and the region, and writes all files.

    ``original`` (C, H, W) uint8 is on the canvas of the results, and ``mask`` (H, W) bool is the region that the user
    named; the picture also shows the larger one of whole tokens.
    """
    from maskgit_pl import grids
    from maskgit_pl.pipeline import display, regions

    label, decoding = None if class_ is None else pipe.classes.parse(class_), pipe.decoding_with(**settings)
    count = check_integer("variants", variants.variants, f"[1, {MAX_RESULTS}]")
    labels, seeds = [label] * count, [variants.seed + number for number in range(count)]
    (described,) = grids.class_captions(pipe.class_names, [label])
    images, recording = _generate(
        pipe, task, labels, seeds, [described] * count, variants.batch_size, decoding, requested=mask
    )
    height, width = mask.shape
    grid = pipe.tokenizer.network.config.grid((height, width))
    unknown = recording.steps[0].was_masked[0].view(grid).cpu()  # of the first result
    sheet = grids.edit_sheet(
        original,
        images,
        mask=mask,
        region=regions.pixel_region(unknown, factor=pipe.tokenizer.token_size, height=height, width=width),
        title=f"{file.name}: {described}, {display.describe_settings(decoding)}",
        captions=[f"seed {seed}" for seed in seeds],
    )
    tokens = f"{int(unknown.sum())} of {unknown.numel()} tokens generated"
    size = tokens if recording.grid is None else f"{width} x {height} pixels"
    summary = f"{count_text(count, 'variant')} of {described}, {size}"
    pictures.write(out, sheet, summary, images=images, labels=labels, seeds=seeds, recording=recording)


def _generate(
    pipe: MaskGIT,
    task: partial[Any],
    labels: list[Any],
    seeds: list[int],
    names: list[str],
    batch_size: int,
    decoding: DecodingConfig,
    *,
    requested: Tensor | None = None,
) -> tuple[Tensor, Recording]:
    """Calls a method of the model; returns the images (n, C, H, W) uint8, and the decoding of the first ones."""
    from maskgit_pl.pipeline.display import Recording  # which imports torch

    with record_steps(task.func.__name__, len(labels)) as (after_step, steps):
        images: Tensor = task(
            classes=labels,
            seed=seeds,
            batch_size=batch_size,
            decoding=decoding,
            callback=after_step,
            output_type="pt",
        )
    size, shown = (images.shape[-2], images.shape[-1]), len(steps[0].tokens)
    grid = None if size == height_width(pipe.tokenizer.image_size) else pipe.tokenizer.network.config.grid(size)
    return images, Recording(steps, pipe.tokenizer, decoding, names[:shown], seeds[:shown], grid, requested)


def panorama(
    folder: Run,
    *,
    classes: Annotated[str, Word("A,B,...")] = "all",
    width: Pixels,
    height: Pixels | None = None,
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
        seed: Seed of the first image; image i has seed + i (default: 0).
        batch_size: Images per batch.
        out: Picture of all images.
    """
    pipe = model.open(folder)
    from maskgit_pl import grids
    from maskgit_pl.pipeline import display

    labels, decoding = pipe.classes.parse_list(classes), pipe.decoding_with(**decoding_settings)
    names, seeds = grids.class_captions(pipe.class_names, labels), [seed + row for row in range(len(labels))]
    task = partial(pipe.panorama, width=width, height=height)
    images, recording = _generate(pipe, task, labels, seeds, names, batch_size, decoding)
    height = images.shape[-2]
    captions = [f"{name}, seed {number}" for name, number in zip(names, seeds, strict=True)]
    sheet = grids.image_grid(images, columns=1, row_captions=captions, scale=max(1, grids.TILE_SIZE // height))
    size = f"{width} x {height} pixels"
    windows = f"{size} in windows of {pixels_text(pipe.tokenizer.image_size)}"
    sheet = grids.add_title(sheet, f"{windows}: {display.describe_settings(decoding)}")
    summary = f"{count_text(len(images), 'image')} of {size}"
    pictures.write(out, sheet, summary, images=images, labels=labels, seeds=seeds, recording=recording)
