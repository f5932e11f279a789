"""``Editor``: inpainting, class editing, outpainting and panoramas. The base class of ``MaskGIT``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack, cast

import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.checks import check_integer, height_width, plain_number
from maskgit_pl.decoding import DecodingStep
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.generate import Generator, StepsOfImages, finish
from maskgit_pl.pipeline.options import (
    MAX_RESULTS,
    Classes,
    EditKeywords,
    EditOptions,
    GenerateKeywords,
    GenerateOptions,
    Images,
    OutputType,
    as_output,
    check_output_type,
    read_options,
)
from maskgit_pl.pipeline.pixels import ImageLike, MaskLike, image_pixels
from maskgit_pl.pipeline.regions import (
    Box,
    Margins,
    Window,
    box_mask,
    check_canvas,
    check_overlap,
    composite,
    first_step,
    seam,
    seam_radius,
    token_mask,
    windows,
)
from maskgit_pl.pipeline.requests import Edit, Request, rows_by_first_step
from maskgit_pl.randomness import random_bits

__all__ = [
    "Editor",
]


class Editor(Generator):
    """Generates images of classes, and edits images. See ``Generator`` for the arguments."""

    def inpaint(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        classes: Classes | None = None,
        output_type: OutputType = "pil",
        **options: Unpack[EditKeywords],
    ) -> Images:
        """Regenerates the masked part of images, one result for each class.

        Example::

            pipe = MaskGIT.from_pretrained("runs/fashion-mnist-adaln")
            variants = pipe.inpaint("sneaker.png", "mask.png", classes=["Sneaker"] * 4)
            variants[0].save("inpainted.png")

        1. Encodes the images, and masks the tokens under the mask and their neighbours.
        2. Decodes the masked tokens. All other tokens stay.
        3. Pastes the decoded image into the original along a blurred seam.

        A result depends on its image, mask, class, seed and the settings only, not on the batch.

        Args:
            image: One image for all results, or a list with one for each: a file, a PIL image, or uint8 pixels as a
                tensor (C, H, W) or an array (H, W) or (H, W, C).
            mask: One mask for all results, or a list with one for each: a file or a PIL image, white where pixels
                are generated, or (H, W) bool.
            classes: Index or name of the class of each result. None gives one result of "no class" (see ``generate``).
            output_type: See ``generate``.
            options: Options of ``generate``, and ``dilation``, ``blend`` and ``fit`` of ``EditOptions``. The first
                floor(T / 6) of T steps are skipped, except for a full mask.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if an image or a mask cannot be read, has another size or is empty, a class is unknown, a number
                is out of range, or the length of a list differs from that of ``classes``.
            TypeError: see ``generate``.

        Source: paper, section on class-conditional image editing; released code, its editing functions.
        """
        check_output_type(output_type)
        steps = self.inpaint_steps(image, mask, classes=classes, **options)
        return as_output(output_type, finish(steps, options.get("callback")))

    def inpaint_steps(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        classes: Classes | None = None,
        **options: Unpack[EditKeywords],
    ) -> StepsOfImages:
        """Yields the decoding steps of ``inpaint`` as they are decoded, and returns its images as with ``"pt"``.

        Closing the generator ends the decoding. Errors come before the first step. See ``inpaint`` for them and for the
        arguments; ``callback`` is not called.
        """
        self.transformer.schedule_for("inpaint")
        read, request = self._edit_request(classes, options)
        count, config = len(request.labels), self.transformer.network.config
        # 1. (n, C, H, W) pixels -> (n, N) tokens, then one row for each result.
        edits = Edit.all_of(image, mask, count=count, tokenizer=self.tokenizer, options=read)
        originals = torch.stack([edit.original for edit in edits])
        tokens = self.tokenizer.encode(originals, batch_size=request.batch_size)
        if len(edits) < count:  # one image and one mask for all
            edits, tokens = edits * count, tokens.expand(count, -1)
        unknown = torch.stack([edit.unknown.flatten() for edit in edits])
        tokens = tokens.masked_fill(unknown, config.mask_token_id)
        # 2. Rows with the same first step are decoded together.  3. Each is pasted into its original.
        results = torch.empty(count, *edits[0].original.shape, dtype=torch.uint8)
        first_steps = [first_step(edit.unknown, num_steps=request.decoding.num_steps) for edit in edits]
        for start, rows in rows_by_first_step(first_steps, request.batch_size):
            steps = self._decode(request, rows, tokens=tokens[rows], first_step=start)
            images = yield from self._images(steps)
            for row, edited in zip(rows, images, strict=True):
                results[row] = composite(edits[row].original, edited, edits[row].weight)
        return results

    def edit_class(
        self,
        image: ImageLike,
        region: Box | MaskLike,
        class_: int | str,
        *,
        variants: int = 1,
        output_type: OutputType = "pil",
        **options: Unpack[EditKeywords],
    ) -> Images:
        """Turns what is in a box or under a mask into another class. The rest of the image stays.

        Example::

            pipe = MaskGIT.from_pretrained("runs/fashion-mnist-adaln")
            boots = pipe.edit_class("sneaker.png", (0, 4, 28, 16), "Ankle boot", variants=4)
            boots[0].save("boot.png")

        Args:
            image: A file, a PIL image or uint8 pixels. See ``inpaint``.
            region: (left, top, right, bottom) in pixels of the image, or a mask. See ``inpaint``.
            class_: Index or name of the class.
            variants: Number of results, in [1, 10000]. Variant i has seed + i.
            output_type: See ``generate``.
            options: See ``inpaint``.

        Raises:
            ValueError: if the box is empty or not within the image. See also ``inpaint``.
            FileNotFoundError: if there is no such file.
            TypeError: see ``inpaint``.

        Source: paper, section on class-conditional image editing.
        """
        self.transformer.schedule_for("edit_class")
        variants = check_integer("variants", plain_number(variants), f"[1, {MAX_RESULTS}]")
        if "classes" in options:
            raise TypeError("option 'classes': edit_class takes one class, class_; use inpaint for several")
        mask: MaskLike = cast("MaskLike", region)
        if isinstance(region, list | tuple):
            image = image_pixels(image, channels=self.tokenizer.network.config.in_channels)
            mask = box_mask(region, height=image.shape[-2], width=image.shape[-1])
        return self.inpaint(image, mask, classes=[class_] * variants, output_type=output_type, **options)

    def outpaint(
        self,
        image: ImageLike,
        *,
        left: int = 0,
        right: int = 0,
        up: int = 0,
        down: int = 0,
        classes: Classes | None = None,
        overlap: float = 0.5,
        output_type: OutputType = "pil",
        **options: Unpack[EditKeywords],
    ) -> Images:
        """Extends an image beyond its borders, one result for each class.

        Example::

            wide = MaskGIT.from_pretrained("pretrained/places512").outpaint("landscape.png", right=256)

        1. Places the tokens of the image on a larger canvas.
        2. Fills the canvas window by window; each window overlaps known tokens.
        3. Decodes the whole canvas to pixels, and pastes the original image into it.

        Args:
            image: A file, a PIL image or uint8 pixels (see ``inpaint``) of any size.
            left: Pixels to add on the left. All four numbers and the size of the image are multiples of the pixels of
                a token, and the result is at least as large as the images of the model.
            right: Pixels to add on the right.
            up: Pixels to add above.
            down: Pixels to add below.
            classes: See ``inpaint``.
            overlap: Fraction of a window that is known before it is decoded, in (0, 1); less if no window has as much.
            output_type: See ``generate``.
            options: Options of ``inpaint`` without ``fit``. ``dilation``, 0 by default, is the number of tokens along
                the border of the image that are decoded again. With ``blend=0`` all pixels of the image stay.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not an image, all sides are 0, a size is not a multiple of the pixels of a token,
                a class is unknown, or a number is out of range.
            TypeError: see ``generate``.

        Source: paper, Figure 1 and Table 2.
        """
        check_output_type(output_type)
        sides = {"left": left, "right": right, "up": up, "down": down}
        steps = self.outpaint_steps(image, **sides, classes=classes, overlap=overlap, **options)
        return as_output(output_type, finish(steps, options.get("callback")))

    def outpaint_steps(
        self,
        image: ImageLike,
        *,
        left: int = 0,
        right: int = 0,
        up: int = 0,
        down: int = 0,
        classes: Classes | None = None,
        overlap: float = 0.5,
        **options: Unpack[EditKeywords],
    ) -> StepsOfImages:
        """Yields the decoding steps of ``outpaint``, each of the whole canvas. See ``inpaint_steps``."""
        self.transformer.schedule_for("outpaint")
        if "fit" in options:
            raise TypeError("option 'fit': outpaint takes images of any size and crops none; leave it out")
        read, request = self._edit_request(classes, options)
        factor, size = self.tokenizer.network.config.downsampling_factor, self.tokenizer.image_size
        pixels = image_pixels(image, channels=self.tokenizer.network.config.in_channels)
        added = Margins(left, right, up, down)
        added.check(pixels.shape[-2:], factor=factor, least=size)
        # 1. (H, W) pixels -> (R, C) canvas of tokens, unknown outside the image.
        mask = added.outside(*pixels.shape[-2:])
        unknown = token_mask(mask, factor=factor, dilation=read.dilation or 0)
        tokens = added.pad(_encode_within(self.tokenizer, pixels, added), size=factor)
        # 2. (n, C, H, W): the filled canvases as pixels.
        filled = yield from self._fill(request, tokens, unknown, overlap)
        # 3. The weight is 1 outside the image and 0 inside, with a blurred edge.
        weight = seam(mask, radius=seam_radius(size) if read.blend is None else read.blend)
        original = added.pad(pixels, size=1)
        return torch.stack([composite(original, edited, weight) for edited in filled])

    def panorama(
        self,
        classes: Classes,
        width: int,
        *,
        height: int | None = None,
        overlap: float = 0.5,
        output_type: OutputType = "pil",
        **options: Unpack[GenerateKeywords],
    ) -> Images:
        """Generates images of any width window by window, one for each class.

        Example::

            pipe = MaskGIT.from_pretrained("pretrained/places512")
            pipe.panorama(["coast"], width=2048)[0].save("coast.png")

        Args:
            classes: See ``generate``.
            width: Width in pixels, a multiple of the pixels of a token, at least the width of the model's images.
            height: Height in pixels, with the same rule; by default that of the model's images, in whole tokens.
            overlap: See ``outpaint``.
            output_type: See ``generate``.
            options: See ``generate``.

        Raises:
            ValueError: if a size is too small or not a multiple of the pixels of a token, a class is unknown, or a
                number is out of range.
            TypeError: see ``generate``.

        Source: paper, Figure 1.
        """
        check_output_type(output_type)
        steps = self.panorama_steps(classes, width, height=height, overlap=overlap, **options)
        return as_output(output_type, finish(steps, options.get("callback")))

    def panorama_steps(
        self,
        classes: Classes,
        width: int,
        *,
        height: int | None = None,
        overlap: float = 0.5,
        **options: Unpack[GenerateKeywords],
    ) -> StepsOfImages:
        """Yields the decoding steps of ``panorama``, each of the whole canvas. See ``inpaint_steps``."""
        self.transformer.schedule_for("panorama")
        read, decoding = read_options(GenerateOptions, options, self.decoding)
        request = self._request(classes, read, decoding)
        size, factor = self.tokenizer.image_size, self.tokenizer.network.config.downsampling_factor
        height = self.outline.least_canvas[0] if height is None else height
        height, width = check_canvas(height, width, factor=factor, least=size)
        unknown = torch.ones(height // factor, width // factor, dtype=torch.bool)
        tokens = torch.zeros(unknown.shape, dtype=torch.int64)
        return (yield from self._fill(request, tokens, unknown, overlap))

    def _edit_request(self, classes: Classes | None, options: EditKeywords) -> tuple[EditOptions, Request]:
        read, decoding = read_options(EditOptions, options, self.decoding)
        return read, self._request([None] if classes is None else classes, read, decoding)

    def _fill(self, request: Request, tokens: Tensor, unknown: Tensor, overlap: float) -> StepsOfImages:
        """Fills a canvas window by window, yields the steps of the whole canvas, and decodes it to pixels.

        1. Places the known tokens on a canvas for each result of a batch.
        2. For each window: decodes its unknown tokens with the known ones as context, and copies them to the canvas.
        3. Decodes the tokens of the whole canvas.

        Args:
            request: Labels, seeds and decoding settings.
            tokens: (R, C) int64, any value where ``unknown``.
            unknown: (R, C) bool.
            overlap: See ``outpaint``.

        Returns:
            (n, C, H, W) uint8, an image for each result.
        """
        config = self.transformer.network.config
        check_overlap(overlap)
        filled = []
        for rows in request.batches():
            # 1. (B, R, C) tokens.
            canvas = _Canvas.of(tokens, unknown, count=len(rows), device=self.device)
            seeds = torch.tensor(request.part(rows).seeds)
            for number, window in enumerate(windows(unknown, size=config.grid, overlap=overlap)):
                first = first_step(window.unknown, num_steps=request.decoding.num_steps)
                known = canvas.window(window, mask_token_id=config.mask_token_id)
                # 2. Each window has its own noise: with the same noise, windows would repeat one another.
                own = seeds if number == 0 else random_bits("window", seed=seeds, index=number)[:, 0]
                part = request.part(rows, seeds=own.tolist())
                start = None if bool(window.unknown.all()) else known  # None: a window without context
                for step in self._decode(part, range(len(rows)), tokens=start, first_step=first):
                    yield canvas.step(window, step)
                canvas.keep(window, step)
            # 3. (B, R C) tokens -> (B, C, H, W) pixels.
            filled.append(self.tokenizer.decode(canvas.tokens.flatten(1), grid=(unknown.shape[0], unknown.shape[1])))
        return torch.cat(filled)


@dataclass
class _Canvas:
    """The state of a canvas while it is filled.

    Attributes:
        tokens: (B, R, C) int64 codes, 0 where unknown.
        unknown: (R, C) bool on the CPU, True where no window has decided yet.
        confidence: (B, R, C) float32. See ``DecodingStep``.
    """

    tokens: Tensor
    unknown: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, tokens: Tensor, unknown: Tensor, *, count: int, device: torch.device) -> _Canvas:
        """Returns ``count`` equal canvases.

        Args:
            tokens: (R, C) int64, any value where ``unknown``.
            unknown: (R, C) bool.
            count: B, the number of canvases.
            device: Device of the tokens.
        """
        known = tokens.masked_fill(unknown, 0).to(device)
        every = known.expand(count, *known.shape).clone()
        return cls(every, unknown.clone(), torch.ones(every.shape, device=device))

    def window(self, window: Window, *, mask_token_id: int) -> Tensor:
        """Returns the input of the transformer: (B, h w) int64, ``mask_token_id`` where unknown."""
        hidden = window.unknown.to(self.tokens.device)
        return self.tokens[window.index].masked_fill(hidden, mask_token_id).flatten(1)

    def step(self, window: Window, step: DecodingStep) -> DecodingStep:
        """Returns a decoding step of a window as a step of the whole canvas. Tokens of later windows are masked."""

        def place(values: Tensor, background: Tensor) -> Tensor:
            whole = background.clone()  # (B, R, C)
            whole[window.index] = window.as_grid(values)
            return whole.flatten(1)

        waiting = self.unknown.to(self.tokens.device).expand(self.tokens.shape)
        return DecodingStep(
            step.step,
            place(step.tokens, self.tokens),
            place(step.was_masked, waiting),
            place(step.still_masked, waiting),
            place(step.scores, torch.full_like(self.confidence, torch.inf)),
            place(self._confidence(window, step).flatten(1), self.confidence),
        )

    def keep(self, window: Window, last: DecodingStep) -> None:
        """Copies the tokens of the last step of a window to the canvas."""
        self.tokens[window.index] = window.as_grid(last.tokens)
        self.confidence[window.index] = self._confidence(window, last)
        self.unknown[window.index[1:]] = False

    def _confidence(self, window: Window, step: DecodingStep) -> Tensor:
        """Returns the confidence of the tokens of a window, (B, h, w)."""
        hidden = window.unknown.to(self.tokens.device)
        # Tokens that were known before the window keep the confidence of the window that decided them.
        return window.as_grid(step.confidence).where(hidden, self.confidence[window.index])


def _encode_within(tokenizer: PretrainedTokenizer, pixels: Tensor, added: Margins) -> Tensor:
    """Encodes an image that will be extended: (C, H, W) uint8 -> tokens (h, w) int64 on the CPU.

    The pixels at the border are repeated outwards before the image is encoded. Its border tokens then look like
    tokens inside an image. Without this, pixels that are decoded next to them are too bright or too dark.
    """
    config = tokenizer.network.config
    factor = config.downsampling_factor
    # Half an image of repeated pixels, in whole tokens, is enough context on each side.
    around = added.at_most(*(side // 2 // factor * factor for side in height_width(tokenizer.image_size)))
    repeated = around.pad(pixels.float(), size=1, mode="replicate").to(pixels.dtype)
    tokens = tokenizer.encode(repeated[None])
    rows, columns = config.grid((repeated.shape[-2], repeated.shape[-1]))
    grid = rearrange(tokens, "1 (h w) -> h w", h=rows)
    # Keeps the tokens of the image itself.
    left, right, up, down = (side // factor for side in around.sides)
    return grid[up : rows - down, left : columns - right]
