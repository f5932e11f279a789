"""From a pretrained folder to images: ``MaskGIT``.

Used by the commands ``sample`` and ``evaluate``, in notebooks and by other programs.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, cast, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from maskgit_pl import editing
from maskgit_pl.data import to_unit_range
from maskgit_pl.decoding import DecodingConfig, DecodingStep, decode_classes
from maskgit_pl.editing import Box, ImageLike, MaskLike
from maskgit_pl.pretrained import (
    PretrainedTokenizer,
    PretrainedTransformer,
    fingerprint,
    load_tokenizer,
    load_transformer,
    read_config,
    save_tokenizer,
    save_transformer,
)
from maskgit_pl.registry import nearest
from maskgit_pl.training.pictures import decode_images, to_pil

__all__ = ["DecodingSettings", "EditOptions", "MaskGIT", "OutputType"]

OutputType = Literal["pil", "pt", "np"]
Images: TypeAlias = list[Image.Image] | Tensor | npt.NDArray[np.uint8]
Classes: TypeAlias = Sequence[int | str]
Seeds: TypeAlias = int | Sequence[int]
StepCallback: TypeAlias = Callable[[DecodingStep], object]

_FEW_NAMES = 20  # up to so many an error lists all of them


class DecodingSettings(TypedDict, total=False):
    """How to decode; what is left out or None is the model's own.

    Attributes:
        num_steps: T, at least 1 and at most the number of tokens; more steps, more care.
        guidance_scale: Of the model's guidance schedule, at least 0; 0 is none.
        choice_temperature: How much chance decides which tokens to keep, at least 0.
    """

    num_steps: int | None
    guidance_scale: float | None
    choice_temperature: float | None


class EditOptions(DecodingSettings, total=False):
    """What may be said of an edit; see ``MaskGIT.inpaint``."""

    seed: Seeds
    dilation: int
    blend: float | None
    fit: bool
    batch_size: int
    callback: StepCallback | None


class MaskGIT:
    """Generates images of classes with a tokenizer and a transformer.

    Example::

        pipe = MaskGIT.from_pretrained("runs/demo/pretrained")
        images = pipe.generate(["Sneaker", "Bag", 0], num_steps=8, seed=0)
        images[0].save("sneaker.png")

    Args:
        tokenizer: Turns tokens into images.
        transformer: Finds the tokens of a class.
        mask_schedule: Name or mapping of the transformer's mask schedule, as a recipe has it; ``save_pretrained``
            writes it.

    Raises:
        ValueError: The transformer was trained on another tokenizer's tokens.
    """

    def __init__(
        self,
        tokenizer: PretrainedTokenizer,
        transformer: PretrainedTransformer,
        *,
        mask_schedule: str | Mapping[str, Any],
    ) -> None:
        if transformer.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                "transformer: it knows the tokens of the tokenizer with fingerprint "
                f"{transformer.tokenizer_fingerprint[:12]}, got one with {tokenizer.fingerprint[:12]}; "
                "use the tokenizer it was trained with, or train it again on this one"
            )
        self.tokenizer = tokenizer
        self.transformer = transformer
        self._mask_schedule_spec = mask_schedule

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> MaskGIT:
        """Reads a folder with the sub-folders ``tokenizer`` and ``transformer``.

        Raises:
            FileNotFoundError: A folder or file is missing.
            ValueError: A folder is not what it should be, or the two do not belong together.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"pretrained {folder}: no such folder; training writes runs/RUN/pretrained")
        tokenizer, transformer = load_tokenizer(folder / "tokenizer"), load_transformer(folder / "transformer")
        spec = read_config(folder / "transformer", "transformer")["mask_schedule"]
        return cls(tokenizer, transformer, mask_schedule=spec)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the two sub-folders that ``from_pretrained`` reads."""
        folder = Path(folder)
        network = self.tokenizer.network
        save_tokenizer(folder / "tokenizer", network.config, network.state_dict(), image_size=self.tokenizer.image_size)
        spec = self._mask_schedule_spec
        save_transformer(
            folder / "transformer",
            self.transformer.network.config,
            self.transformer.network.state_dict(),
            mask_schedule=spec if isinstance(spec, str) else dict(spec),
            decoding=self.decoding,
            class_names=self.class_names,
            tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
        )

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> MaskGIT:
        """Moves both networks, and casts them where a ``dtype`` is given; returns itself."""
        for network in (self.tokenizer.network, self.transformer.network):
            network.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.transformer.network.parameters()).device

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; class i is ``class_names[i]``."""
        return self.transformer.class_names

    @property
    def decoding(self) -> DecodingConfig:
        """How images are decoded unless ``generate`` is told otherwise."""
        return self.transformer.decoding

    @overload
    def generate(
        self,
        classes: Classes,
        *,
        seed: Seeds = ...,
        batch_size: int = ...,
        output_type: Literal["pil"] = ...,
        callback: StepCallback | None = ...,
        **settings: Unpack[DecodingSettings],
    ) -> list[Image.Image]: ...

    @overload
    def generate(
        self,
        classes: Classes,
        *,
        seed: Seeds = ...,
        batch_size: int = ...,
        output_type: Literal["pt"],
        callback: StepCallback | None = ...,
        **settings: Unpack[DecodingSettings],
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        classes: Classes,
        *,
        seed: Seeds = ...,
        batch_size: int = ...,
        output_type: Literal["np"],
        callback: StepCallback | None = ...,
        **settings: Unpack[DecodingSettings],
    ) -> npt.NDArray[np.uint8]: ...

    def generate(
        self,
        classes: Classes,
        *,
        seed: Seeds = 0,
        batch_size: int = 64,
        output_type: OutputType = "pil",
        callback: StepCallback | None = None,
        **settings: Unpack[DecodingSettings],
    ) -> Images:
        """One image for each class asked for.

        An image depends on its class, its seed and the settings alone, not on the batch that it is decoded in.

        Args:
            classes: Ids in [0, number of classes) or names.
            seed: Image i has seed + i, or one seed for each image; in [0, 2**32).
            batch_size: Images decoded at a time.
            output_type: ``"pil"``: grey or RGB pictures; ``"pt"``: (n, C, H, W) uint8 on the CPU; ``"np"``:
                (n, H, W, C) uint8.
            callback: Called after each step of each batch.
            settings: ``num_steps``, ``guidance_scale``, ``choice_temperature``; see ``DecodingSettings``.

        Raises:
            ValueError: An unknown class or a number out of range.
            TypeError: A class is neither a number nor a name, or the model's schedules do not take a setting.
        """
        _check_run(output_type, batch_size)
        labels = self.class_ids(classes)
        seeds = _seeds(seed, len(labels))
        decoding = self.decoding_with(**settings)
        images = [
            self._images(self._decode(labels[part], seeds[part], decoding), callback)
            for part in _parts(len(labels), batch_size)
        ]
        return _as(output_type, torch.cat(images))

    @overload
    def inpaint(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        classes: Classes,
        output_type: Literal["pil"] = ...,
        **options: Unpack[EditOptions],
    ) -> list[Image.Image]: ...

    @overload
    def inpaint(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        classes: Classes,
        output_type: Literal["pt"],
        **options: Unpack[EditOptions],
    ) -> Tensor: ...

    @overload
    def inpaint(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        classes: Classes,
        output_type: Literal["np"],
        **options: Unpack[EditOptions],
    ) -> npt.NDArray[np.uint8]: ...

    def inpaint(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        classes: Classes,
        seed: Seeds = 0,
        dilation: int = 1,
        blend: float | None = None,
        fit: bool = False,
        batch_size: int = 64,
        output_type: OutputType = "pil",
        callback: StepCallback | None = None,
        **settings: Unpack[DecodingSettings],
    ) -> Images:
        """Generates the masked part of images anew, one result for each class asked for.

        Example::

            pipe = MaskGIT.from_pretrained("runs/demo/pretrained")
            variants = pipe.inpaint("sneaker.png", "mask.png", classes=["Sneaker"] * 4)
            variants[0].save("inpainted.png")

        The tokens under the mask, and their neighbours, are decoded again while all others stay; what they show is
        pasted into the image. A result depends on its image, mask, class, seed and the settings alone.

        Args:
            image: One image for all results, or a list of one for each: files, PIL pictures, or uint8 pixels, a tensor
                (C, H, W) or an array (H, W) or (H, W, C).
            mask: Likewise: files or pictures, white where pixels are to be generated, or (H, W) bool.
            classes: Class of each result, an id or a name.
            seed: Result i has seed + i, or one seed for each; in [0, 2**32).
            dilation: Tokens by which the region grows on each side, at least 0. The default is the released code's: the
                seam then lies outside of the mask.
            blend: Blur of the seam in pixels; 0 leaves every pixel outside of the region as it was, bit by bit. None:
                the released code's, ``editing.seam_radius``.
            fit: Whether to cut images and masks of another size to the square in the middle and to resize it.
            batch_size: Results decoded at a time.
            output_type: As of ``generate``.
            callback: Called after each step of each batch.
            settings: As of ``generate``. Of T steps the first floor(T / 6) are left out, except for a full mask.

        Raises:
            FileNotFoundError: No such file.
            ValueError: An image or a mask that is none, of another size, or empty; an unknown class; a number out of
                range; or a list of another length than ``classes``.
            TypeError: As of ``generate``.

        Source: paper, section on class-conditional image editing; released code, its functions for editing.
        """
        _check_run(output_type, batch_size)
        labels = self.class_ids(classes)
        seeds, decoding = _seeds(seed, len(labels)), self.decoding_with(**settings)
        radius = editing.seam_radius(self.tokenizer.image_size) if blend is None else blend
        edits = self._edits(image, mask, count=len(labels), dilation=dilation, radius=radius, fit=fit)
        tokens = self._encode(torch.stack([edit.original for edit in edits]), batch_size)
        if len(edits) < len(labels):  # one image and one mask for all
            edits, tokens = edits * len(labels), tokens.expand(len(labels), -1)
        tokens = tokens.masked_fill(
            torch.stack([edit.unknown.flatten() for edit in edits]), self.transformer.network.config.mask_token_id
        )
        results = torch.empty(len(labels), *edits[0].original.shape, dtype=torch.uint8)
        first_steps = [editing.first_step(edit.unknown, num_steps=decoding.num_steps) for edit in edits]
        for first_step, rows in _batches(first_steps, batch_size):
            of_rows = [labels[row] for row in rows], [seeds[row] for row in rows]
            steps = self._decode(*of_rows, decoding, tokens=tokens[rows], first_step=first_step)
            for row, edited in zip(rows, self._images(steps, callback), strict=True):
                results[row] = editing.composite(edits[row].original, edited, edits[row].weight)
        return _as(output_type, results)

    @overload
    def edit_class(
        self,
        image: ImageLike,
        box: Box,
        class_: int | str,
        *,
        variants: int = ...,
        output_type: Literal["pil"] = ...,
        **options: Unpack[EditOptions],
    ) -> list[Image.Image]: ...

    @overload
    def edit_class(
        self,
        image: ImageLike,
        box: Box,
        class_: int | str,
        *,
        variants: int = ...,
        output_type: Literal["pt"],
        **options: Unpack[EditOptions],
    ) -> Tensor: ...

    @overload
    def edit_class(
        self,
        image: ImageLike,
        box: Box,
        class_: int | str,
        *,
        variants: int = ...,
        output_type: Literal["np"],
        **options: Unpack[EditOptions],
    ) -> npt.NDArray[np.uint8]: ...

    def edit_class(
        self,
        image: ImageLike,
        box: Box,
        class_: int | str,
        *,
        variants: int = 1,
        output_type: OutputType = "pil",
        **options: Unpack[EditOptions],
    ) -> Images:
        """Turns what is in a box into something of another class; everything else stays.

        Example::

            pipe = MaskGIT.from_pretrained("runs/demo/pretrained")
            boots = pipe.edit_class("sneaker.png", (0, 4, 28, 16), "Ankle boot", variants=4)
            boots[0].save("boot.png")

        Args:
            image: A file, a PIL picture or pixels, as of ``inpaint``.
            box: (left, top, right, bottom) in pixels of the image.
            class_: Id or name.
            variants: Results; variant i has seed + i.
            output_type: As of ``generate``.
            options: As of ``inpaint``.

        Raises:
            ValueError: The box is empty or not within the image, or as of ``inpaint``.
            FileNotFoundError: No such file.
            TypeError: As of ``inpaint``.

        Source: paper, section on class-conditional image editing.
        """
        if variants < 1:
            raise ValueError(f"variants: at least 1 is needed, got {variants}")
        pixels = editing.image_pixels(image, channels=self.tokenizer.network.config.in_channels)
        mask = editing.box_mask(box, height=pixels.shape[-2], width=pixels.shape[-1])
        # mypy cannot match an overload by a variable of all three literals
        edit: Callable[..., Images] = self.inpaint
        return edit(pixels, mask, classes=[class_] * variants, output_type=output_type, **options)

    def steps(
        self, classes: Classes, *, seed: Seeds = 0, **settings: Unpack[DecodingSettings]
    ) -> Iterator[DecodingStep]:
        """The decoding steps of one batch, for pictures of them; arguments as of ``generate``.

        ``training.pictures.decode_images(pipe.tokenizer, step.tokens)`` is the image at a step.
        """
        labels = self.class_ids(classes)
        return self._decode(labels, _seeds(seed, len(labels)), self.decoding_with(**settings))

    def class_ids(self, classes: Classes) -> list[int]:
        """Ids of classes given by id or by name.

        Raises:
            ValueError: None given, unknown, or a name of several classes.
            TypeError: Not a list of numbers and names.
        """
        if isinstance(classes, int | str):
            raise TypeError(f"classes: a list is needed, got {classes!r}; write [{classes!r}]")
        if len(classes) == 0:
            raise ValueError("classes: at least one is needed, got none")
        return [self._class_id(wanted) for wanted in classes]

    def decoding_with(self, **settings: Unpack[DecodingSettings]) -> DecodingConfig:
        """The model's own way of decoding, with some settings replaced.

        Raises:
            TypeError: There is no such setting.
        """
        for name in settings:
            if name not in DecodingSettings.__annotations__:
                raise TypeError(f"setting {name!r}: {nearest(name, DecodingSettings.__annotations__)}")
        own, num_steps = self.decoding, settings.get("num_steps")
        return dataclasses.replace(
            own,
            num_steps=own.num_steps if num_steps is None else num_steps,
            guidance=_replaced(own.guidance, "scale", settings.get("guidance_scale")),
            token_selector=_replaced(own.token_selector, "choice_temperature", settings.get("choice_temperature")),
        )

    def _decode(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        decoding: DecodingConfig,
        *,
        tokens: Tensor | None = None,
        first_step: int = 0,
    ) -> Iterator[DecodingStep]:
        config = self.transformer.network.config
        return decode_classes(
            self.transformer.network,
            labels,
            seeds,
            decoder=decoding.decoder(self.transformer.mask_schedule),
            scales=decoding.scales(),
            grid=config.grid,
            mask_token_id=config.mask_token_id,
            null_label=config.null_label,
            device=self.device,
            tokens=tokens,
            first_step=first_step,
        )

    def _images(self, steps: Iterator[DecodingStep], callback: StepCallback | None) -> Tensor:
        """What the last of the steps shows: (B, C, H, W) uint8 on the CPU."""
        for step in steps:
            if callback is not None:
                callback(step)
        return decode_images(self.tokenizer, step.tokens)

    def _encode(self, images: Tensor, batch_size: int) -> Tensor:
        """(n, C, H, W) uint8 -> tokens (n, N) int64 on the CPU."""
        network = self.tokenizer.network
        like = next(network.parameters())
        with torch.no_grad():
            tokens = [
                network.encode(to_unit_range(images[part]).to(like)).cpu() for part in _parts(len(images), batch_size)
            ]
        return torch.cat(tokens)

    def _edits(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        count: int,
        dilation: int,
        radius: float,
        fit: bool,
    ) -> list[_Edit]:
        """What ``inpaint`` is asked to do: one edit for all ``count`` results, or one for each."""
        images, masks = _listed("image", image, count), _listed("mask", mask, count)
        number = max(len(images), len(masks))
        config, size = self.tokenizer.network.config, self.tokenizer.image_size
        edits = []
        for place in range(number):
            given, given_mask = images[place % len(images)], masks[place % len(masks)]
            name = f"image {given}" if isinstance(given, str | Path) else f"image {place}" if number > 1 else "image"
            pixels = editing.image_pixels(given, channels=config.in_channels, name=name)
            wanted = editing.mask_pixels(given_mask, name=f"mask of {name}")
            pixels, wanted = editing.fitted(pixels, wanted, image_size=size, fit=fit, name=name)
            unknown = editing.token_mask(wanted, factor=config.downsampling_factor, dilation=dilation)
            region = editing.pixel_region(unknown, factor=config.downsampling_factor, height=size, width=size)
            edits.append(_Edit(pixels, unknown, editing.seam(region, radius=radius)))
        return edits

    def _class_id(self, wanted: int | str) -> int:
        names = self.class_names
        if isinstance(wanted, str):
            return self._class_called(wanted)
        if isinstance(wanted, bool) or not hasattr(wanted, "__index__"):
            raise TypeError(f"class {wanted!r}: a number or a name is needed, got {type(wanted).__name__}")
        number = wanted.__index__()  # numpy's integers too
        if not 0 <= number < len(names):
            raise ValueError(f"class {number}: a number in [0, {len(names)}) or a name is needed")
        return number

    def _class_called(self, wanted: str) -> int:
        names = self.class_names
        found = [number for number, name in enumerate(names) if name == wanted]
        found = found or [number for number, name in enumerate(names) if name.casefold() == wanted.casefold()]
        if not found:
            close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.3)
            raise ValueError(f"class {wanted!r}: {nearest(wanted, names if len(names) <= _FEW_NAMES else close)}")
        if len(found) > 1:
            raise ValueError(f"class {wanted!r}: the name of classes {found}; use one of the numbers")
        return found[0]


def _replaced(spec: str | Mapping[str, Any], key: str, value: float | None) -> str | dict[str, Any]:
    """A registry spec with one argument replaced; as it is where the value is None."""
    plain = spec if isinstance(spec, str) else dict(spec)
    if value is None:
        return plain
    return {**({"name": plain} if isinstance(plain, str) else plain), key: value}


def _seeds(seed: Seeds, count: int) -> list[int]:
    seeds = [seed + number for number in range(count)] if isinstance(seed, int) else [int(value) for value in seed]
    if len(seeds) != count:
        raise ValueError(f"seed: one number, or one for each of the {count} images, is needed, got {len(seeds)}")
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"seed: numbers in [0, 2**32) are needed, got {min(seeds)} to {max(seeds)}")
    return seeds


@dataclasses.dataclass(frozen=True)
class _Edit:
    """One image to be edited.

    Attributes:
        original: (C, H, W) uint8.
        unknown: (h, w) bool: tokens to be found anew.
        weight: (H, W) float32 in [0, 1]: how much of the edited image each pixel shows.
    """

    original: Tensor
    unknown: Tensor
    weight: Tensor


def _listed(name: str, given: ImageLike | Sequence[ImageLike], count: int) -> list[ImageLike]:
    """One image or mask for all results, or one for each of the ``count``, as a list."""
    if not isinstance(given, list | tuple):
        return [cast("ImageLike", given)]
    if len(given) not in (1, count):
        raise ValueError(f"{name}: one, or one for each of the {count} classes, is needed, got {len(given)}")
    return list(given)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))


def _batches(first_steps: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Rows that are decoded together, with the step at which they begin."""
    for first_step in sorted(set(first_steps)):
        rows = [row for row, own in enumerate(first_steps) if own == first_step]
        for part in _parts(len(rows), batch_size):
            yield first_step, rows[part]


def _check_run(output_type: str, batch_size: int) -> None:
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type {output_type!r}: {nearest(str(output_type), get_args(OutputType))}")
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1 is needed, got {batch_size}")


def _as(output_type: OutputType, images: Tensor) -> Images:
    if output_type == "pt":
        return images
    if output_type == "np":
        pixels: npt.NDArray[np.uint8] = rearrange(images.numpy(), "n c h w -> n h w c")
        return pixels
    return [to_pil(image) for image in images]
