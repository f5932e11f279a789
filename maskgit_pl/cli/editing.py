"""``maskgit inpaint``, ``edit``, ``outpaint`` and ``panorama``: generate parts of images, and images of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack, cast

from maskgit_pl.checks import check_integer, count_text, height_width, pixels_text
from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import ModelFlags, Run, check_one_of
from maskgit_pl.cli.outputs import Generated, Pictures, record_steps
from maskgit_pl.pipeline.options import MAX_RESULTS, DecodingSettings
from maskgit_pl.schedules import num_masked

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.decoding import DecodingConfig
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
        box: Region to generate: left,top,right,bottom in pixels of IMAGE before --fit, or in percent of its
            width and height, such as 10%,20%,60%,80%.
        mask: Region to generate: a picture of the size of IMAGE, white inside the region; black and
            transparent pixels stay.
        fit: Crop the centre of IMAGE and resize it to the size of the model.
    """

    box: Annotated[str, Word("L,T,R,B")] | None = None
    mask: Annotated[Path, Word("FILE.png")] | None = None
    fit: bool = False

    def read(self, file: Path, pipe: MaskGIT) -> tuple[Tensor, Tensor]:
        """Returns the image (C, H, W) uint8 and the mask (H, W) bool, both of the size of the model."""
        from maskgit_pl.pipeline.regions import box_mask, fit_to_model, image_pixels, mask_pixels, parse_box

        image = image_pixels(file, channels=pipe.outline.channels)
        height, width = image.shape[-2:]
        mask = None if self.mask is None else mask_pixels(self.mask)
        if self.box is not None:
            mask = box_mask(parse_box(self.box, height=height, width=width), height=height, width=width)
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
    def seam(self) -> dict[str, Any]:
        """The options of the methods of ``MaskGIT`` that paste a region into an image."""
        return {"dilation": self.dilation, "blend": None if self.blend else 0.0}


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
    job = _Edit.open(model, folder, class_, decoding_settings, image, out, variants, pictures)
    job.inpaint(region)


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
    check_one_of(dilation=variants.dilation, strength=strength)
    check_one_of(no_blend=not variants.blend, strength=strength)
    job = _Edit.open(model, folder, class_, decoding_settings, image, out, variants, pictures)
    if strength is None:
        job.inpaint(region)
    else:
        pixels, everything = region.read(image, job.pipe)
        job.run("editing", partial(job.pipe.edit, pixels, strength=strength), pixels, mask=everything, share=strength)


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
    from maskgit_pl.pipeline.regions import Margins, image_pixels

    added: dict[str, Any] = {
        name: sides.all if getattr(sides, name) is None else getattr(sides, name)
        for name in ("left", "right", "up", "down")
    }
    margins = Margins(**added)
    if not any(margins.sides):
        raise ValueError("one of --left, --right, --up, --down and --all must be > 0 pixels, got none")
    job = _Edit.open(model, folder, class_, decoding_settings, image, out, variants, pictures)
    pixels = image_pixels(image, channels=job.pipe.outline.channels)
    outline = job.pipe.outline
    margins.check(pixels.shape[-2:], factor=outline.token_size, least=outline.image_size)
    # (H + up + down, W + left + right): the image on the canvas, and True outside of it. With --dilation,
    # tokens along the border of the image are generated again too.
    original, outside = margins.pad(pixels, size=1), margins.outside(*pixels.shape[-2:])
    task = partial(job.pipe.outpaint, pixels, overlap=overlap, **added, **variants.seam)
    job.run("outpainting", task, original, mask=outside, dilation=variants.dilation or 0)


@dataclass(frozen=True)
class _Edit:
    """The edit of an image: the model, and what the user wants.

    Args:
        pipe: Model.
        label: Class of the results; None is "no class".
        decoding: Decoding settings.
        file: File of the image, for the title.
        out: Picture to write.
        variants: Number, seeds and batches of the results.
        pictures: Files beside the picture.
    """

    pipe: MaskGIT
    label: int | None
    decoding: DecodingConfig
    file: Path
    out: Path
    variants: Variants
    pictures: Pictures

    @classmethod
    def open(
        cls, model: ModelFlags, folder: Path, class_: str | None, settings: DecodingSettings, *values: Any
    ) -> _Edit:
        """Loads the model, and checks the class, the settings and the number of results."""
        pipe = model.open(folder)
        job = cls(pipe, pipe.outline.parse_class(class_), pipe.decoding_with(**settings), *values)
        check_integer("variants", job.variants.variants, f"[1, {MAX_RESULTS}]")
        return job

    def inpaint(self, region: Region) -> None:
        """Generates a region of the image again."""
        pixels, mask = region.read(self.file, self.pipe)
        dilation = 1 if self.variants.dilation is None else self.variants.dilation
        task = partial(self.pipe.inpaint, pixels, mask, **self.variants.seam)
        self.run("inpainting", task, pixels, mask=mask, dilation=dilation)

    def run(
        self,
        title: str,
        task: Callable[..., Any],
        original: Tensor,
        *,
        mask: Tensor,
        dilation: int = 0,
        share: float = 1,
    ) -> None:
        """Generates the results, draws them beside the original and the region, and writes all files.

        Args:
            title: Title of the progress bar.
            task: Method of ``MaskGIT`` with its arguments.
            original: (C, H, W) uint8, on its canvas.
            mask: (H, W) bool, the region that the user named; the picture also shows the larger one of whole tokens.
            dilation: Tokens by which the region grows.
            share: Share of the tokens of the region that are generated; the picture shows those of the first result.
        """
        import torch

        from maskgit_pl.pipeline import display, grids, regions

        outline, variants, (height, width) = self.pipe.outline, self.variants, mask.shape
        unknown = regions.token_mask(mask, factor=outline.token_size, dilation=dilation)
        num_tokens = int(num_masked(torch.tensor(share), int(unknown.sum()), rounding="ceil"))
        count, is_recording = variants.variants, self.pictures.show_decoding or share < 1
        labels, seeds = [self.label] * count, [variants.seed + number for number in range(count)]
        with record_steps(title, num_tokens * count, is_recording=is_recording) as (after_step, steps):
            images: Tensor = task(
                classes=labels,
                seed=seeds,
                batch_size=variants.batch_size,
                decoding=self.decoding,
                callback=after_step,
                output_type="pt",
            )
        if share < 1:
            unknown = steps[0].was_masked[0].view(unknown.shape).cpu()
        described = outline.describe_class(self.label)
        sheet = grids.edit_sheet(
            original,
            images,
            mask=mask,
            region=regions.pixel_region(unknown, factor=outline.token_size, height=height, width=width),
            title=f"{self.file.name}: {described}, {display.describe_settings(self.decoding)}",
            captions=[f"seed {seed}" for seed in seeds],
        )
        is_canvas = (height, width) != height_width(outline.image_size)
        size = f"{width} x {height} pixels" if is_canvas else f"{num_tokens} of {unknown.numel()} tokens generated"
        summary = f"{count_text(count, 'variant')} of {described}, {size}"
        generated = Generated(images, labels, seeds, sheet, summary, steps, [described] * count, seeds, mask)
        self.pictures.write(generated, self.out, pipe=self.pipe, decoding=self.decoding)


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
    from maskgit_pl.pipeline import display, grids, regions

    pipe = model.open(folder)
    outline = pipe.outline
    labels = outline.parse_classes(classes)
    decoding = pipe.decoding_with(**decoding_settings)
    height, width = regions.check_canvas(
        outline.least_canvas[0] if height is None else height,
        width,
        factor=outline.token_size,
        least=outline.image_size,
    )
    num_tokens = len(labels) * height * width // outline.token_size**2
    with record_steps("panorama", num_tokens, is_recording=pictures.show_decoding) as (after_step, steps):
        panoramas = pipe.panorama(
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
    images = cast("Tensor", panoramas)
    names, seeds = [outline.class_names[label] for label in labels], [seed + row for row in range(len(labels))]
    captions = [f"{name}, seed {number}" for name, number in zip(names, seeds, strict=True)]
    sheet = grids.image_grid(images, columns=1, row_captions=captions, scale=max(1, _TILE_SIZE // height))
    size = f"{width} x {height} pixels"
    title = f"{size} in windows of {pixels_text(outline.image_size)}: {display.describe_settings(decoding)}"
    summary = f"{count_text(len(images), 'image')} of {size}"
    generated = Generated(images, labels, seeds, grids.add_title(sheet, title), summary, steps, names, seeds)
    pictures.write(generated, out, pipe=pipe, decoding=decoding)
