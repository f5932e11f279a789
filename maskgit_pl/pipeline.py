"""From a pretrained folder to images: ``MaskGIT``.

Used by the commands ``sample`` and ``evaluate``, in notebooks and by other programs.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, DecodingStep, decode_classes
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

__all__ = ["MaskGIT", "OutputType"]

OutputType = Literal["pil", "pt", "np"]
Classes: TypeAlias = Sequence[int | str]
Seeds: TypeAlias = int | Sequence[int]
StepCallback: TypeAlias = Callable[[DecodingStep], object]

_FEW_NAMES = 20  # up to so many an error lists all of them


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
        num_steps: int | None = ...,
        guidance_scale: float | None = ...,
        choice_temperature: float | None = ...,
        seed: Seeds = ...,
        batch_size: int = ...,
        output_type: Literal["pil"] = ...,
        callback: StepCallback | None = ...,
    ) -> list[Image.Image]: ...

    @overload
    def generate(
        self,
        classes: Classes,
        *,
        num_steps: int | None = ...,
        guidance_scale: float | None = ...,
        choice_temperature: float | None = ...,
        seed: Seeds = ...,
        batch_size: int = ...,
        output_type: Literal["pt"],
        callback: StepCallback | None = ...,
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        classes: Classes,
        *,
        num_steps: int | None = ...,
        guidance_scale: float | None = ...,
        choice_temperature: float | None = ...,
        seed: Seeds = ...,
        batch_size: int = ...,
        output_type: Literal["np"],
        callback: StepCallback | None = ...,
    ) -> npt.NDArray[np.uint8]: ...

    def generate(
        self,
        classes: Classes,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        choice_temperature: float | None = None,
        seed: Seeds = 0,
        batch_size: int = 64,
        output_type: OutputType = "pil",
        callback: StepCallback | None = None,
    ) -> list[Image.Image] | Tensor | npt.NDArray[np.uint8]:
        """One image for each class asked for.

        An image depends on its class, its seed and the settings alone, not on the batch that it is decoded in.

        Args:
            classes: Ids in [0, number of classes) or names.
            num_steps: T; more steps, more care. The model's own by default.
            guidance_scale: Of the model's guidance schedule, at least 0; 0 is none. The model's own by default.
            choice_temperature: How much chance decides which tokens to keep, at least 0. The model's own by default.
            seed: Image i has seed + i, or one seed for each image; in [0, 2**32).
            batch_size: Images decoded at a time.
            output_type: ``"pil"``: grey or RGB pictures; ``"pt"``: (n, C, H, W) uint8 on the CPU; ``"np"``:
                (n, H, W, C) uint8.
            callback: Called after each step of each batch.

        Raises:
            ValueError: An unknown class or a number out of range.
            TypeError: A class is neither a number nor a name, or the model's schedules do not take a setting.
        """
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type {output_type!r}: {nearest(str(output_type), get_args(OutputType))}")
        if batch_size < 1:
            raise ValueError(f"batch_size: at least 1 is needed, got {batch_size}")
        labels = self.class_ids(classes)
        seeds = _seeds(seed, len(labels))
        decoding = self.decoding_with(
            num_steps=num_steps, guidance_scale=guidance_scale, choice_temperature=choice_temperature
        )
        images = []
        for first in range(0, len(labels), batch_size):
            part = slice(first, first + batch_size)
            for step in self._decode(labels[part], seeds[part], decoding):
                if callback is not None:
                    callback(step)
            images.append(decode_images(self.tokenizer, step.tokens))
        return _as(output_type, torch.cat(images))

    def steps(
        self,
        classes: Classes,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        choice_temperature: float | None = None,
        seed: Seeds = 0,
    ) -> Iterator[DecodingStep]:
        """The decoding steps of one batch, for pictures of them; arguments as of ``generate``.

        ``training.pictures.decode_images(pipe.tokenizer, step.tokens)`` is the image at a step.
        """
        labels = self.class_ids(classes)
        decoding = self.decoding_with(
            num_steps=num_steps, guidance_scale=guidance_scale, choice_temperature=choice_temperature
        )
        return self._decode(labels, _seeds(seed, len(labels)), decoding)

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

    def decoding_with(
        self,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        choice_temperature: float | None = None,
    ) -> DecodingConfig:
        """The model's own way of decoding, with some settings replaced; arguments as of ``generate``."""
        own = self.decoding
        return dataclasses.replace(
            own,
            num_steps=own.num_steps if num_steps is None else num_steps,
            guidance=_replaced(own.guidance, "scale", guidance_scale),
            token_selector=_replaced(own.token_selector, "choice_temperature", choice_temperature),
        )

    def _decode(self, labels: Sequence[int], seeds: Sequence[int], decoding: DecodingConfig) -> Iterator[DecodingStep]:
        config = self.transformer.network.config
        return decode_classes(
            self.transformer.network,
            labels,
            seeds,
            decoder=decoding.decoder(self.transformer.mask_schedule),
            scales=decoding.scales(),
            num_tokens=config.num_tokens,
            mask_token_id=config.mask_token_id,
            null_label=config.null_label,
            device=self.device,
        )

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


def _as(output_type: OutputType, images: Tensor) -> list[Image.Image] | Tensor | npt.NDArray[np.uint8]:
    if output_type == "pt":
        return images
    if output_type == "np":
        pixels: npt.NDArray[np.uint8] = rearrange(images.numpy(), "n c h w -> n h w c")
        return pixels
    return [to_pil(image) for image in images]
