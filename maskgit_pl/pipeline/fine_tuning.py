"""A pretrained tokenizer and a pretrained transformer, and initial weights for fine-tuning on other classes or grids.

``MaskGIT`` holds one of each, and perhaps a second transformer: the negative model of autoguidance, from which guidance
moves away. It is usually an early checkpoint of the same run, or a smaller model (Karras et al., arXiv:2406.02507).

``TokenModel`` fine-tunes from ``weights_for``. A backbone declares its tables with a row for each id, class or token
(``Backbone.vocabulary_tables``, ``class_tables``, ``position_tables``); all other tensors are copied.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskgit_pl.checks import ImageSize, height_width, shorten
from maskgit_pl.decoding import DecodingConfig, FirstStepLogits
from maskgit_pl.networks.backbone import Backbone, BackboneConfig
from maskgit_pl.networks.kernels import WeightWatch, free_packed
from maskgit_pl.networks.vqgan import VQGAN
from maskgit_pl.networks.weights import skeletons, tensors_digest
from maskgit_pl.schedules import MaskSchedule

_MAX_PIXELS = 2**20  # of a batch in the tokenizer: 16 images of 256 x 256


@dataclass(frozen=True)
class PretrainedTokenizer:
    """A pretrained tokenizer.

    Args:
        network: Network in evaluation mode, frozen, on the CPU.
        image_size: Size of the training images: a side, or (height, width), in pixels.
        fingerprint: sha256 of its weights, hexadecimal.
    """

    network: VQGAN
    image_size: ImageSize
    fingerprint: str

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of the token grid of an image of ``image_size``."""
        return self.network.config.grid(self.image_size)

    @property
    def token_size(self) -> int:
        """The height and width of a token in pixels."""
        return self.network.config.downsampling_factor

    @property
    def channels(self) -> int:
        """The channels C of an image."""
        return self.network.config.in_channels

    def encode(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Encodes images to tokens on the network's device, in batches of at most ``images_at_once``.

        Args:
            images: (B, C, H, W) uint8.
            batch_size: Largest batch; None for no further limit.

        Returns:
            (B, N) int64 in [0, K), on the CPU.
        """
        like = next(self.network.parameters())  # for device and dtype
        count = min(batch_size or len(images), images_at_once(*images.shape[-2:]))
        tokens = []
        with torch.no_grad():
            for first in range(0, len(images), count):
                pixels = images[first : first + count].to(torch.float32) / 255
                tokens.append(self.network.encode(pixels.to(like)).cpu())
            return torch.cat(tokens)

    def decode(self, tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Decodes tokens to images on the network's device, in batches of at most ``images_at_once``.

        Args:
            tokens: (B, N) int64 in [0, K).
            grid: Rows and columns of the tokens of a canvas, such as a panorama; None for those of ``image_size``.

        Returns:
            (B, C, H, W) uint8 on the CPU, clipped. H and W are ``image_size``, or with ``grid`` those of all tokens.
        """
        # Without a grid, an image of image_size may cover only a part of its last tokens: the rest is cut off.
        height, width = height_width(self.image_size) if grid is None else (None, None)
        rows, columns = grid or self.grid
        count, decoded = images_at_once(rows * self.token_size, columns * self.token_size), []
        with torch.inference_mode():
            for first in range(0, len(tokens), count):
                images = self.network.decode(tokens[first : first + count], (rows, columns))[..., :height, :width]
                decoded.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
            return torch.cat(decoded)


@dataclass(frozen=True)
class PretrainedTransformer:
    """A pretrained transformer, with the data that decoding needs.

    Args:
        network: Network in evaluation mode, frozen, on the CPU.
        mask_schedule: Mask schedule of its training; None for an autoregressive transformer.
        decoding: Default configuration of decoding.
        class_names: Name of each class.
        tokenizer_fingerprint: Fingerprint of the tokenizer whose tokens it predicts.
        folder: Folder that it was read from; None if it came from memory.
    """

    network: Backbone
    mask_schedule: MaskSchedule | None
    decoding: DecodingConfig
    class_names: tuple[str, ...]
    tokenizer_fingerprint: str
    folder: Path | None = None

    @cached_property
    def caches(self) -> Caches:
        """The values that are kept of the weights to decode faster."""
        return Caches(self.network)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 in hex of the weights, which identifies a negative model in plans and ledgers."""
        return tensors_digest(self.network.state_dict().items())

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def schedule_for(self, task: str) -> MaskSchedule:
        """Returns the mask schedule, for a task that needs parallel decoding.

        Args:
            task: Name of the task, for the error.

        Raises:
            ValueError: if the model is autoregressive.
        """
        if self.mask_schedule is None:
            raise ValueError(
                f"{task} requires a model with bidirectional attention, which fills masked tokens in any order, got an "
                "autoregressive one; choose another run"
            )
        return self.mask_schedule

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> None:
        """Moves the network, and casts it if a ``dtype`` is given."""
        self.network.to(device=device, dtype=dtype)
        self.caches.follow_weights()

    def check_negative(self, negative: PretrainedTransformer) -> None:
        """Checks that another transformer predicts the same tokens of the same classes.

        Raises:
            ValueError: if it does not. The message names the difference.
        """
        self.schedule_for("negative_model")
        config, weak = self.network.config, negative.network.config
        for name, strong_value, weak_value in (
            ("attention", config.attention, weak.attention),
            ("the tokenizer", self.tokenizer_fingerprint[:12], negative.tokenizer_fingerprint[:12]),
            ("codebook_size", config.codebook_size, weak.codebook_size),
            ("grid", config.grid, weak.grid),
            ("class_names", self.class_names, negative.class_names),
            ("condition_dim", config.condition_dim, weak.condition_dim or config.condition_dim),  # may have no vectors
        ):
            if strong_value != weak_value:
                raise ValueError(
                    f"negative_model must have {name} {shorten(strong_value)}, as the model that generates, got "
                    f"{shorten(weak_value)}; choose another checkpoint of the same run, or a run on the same tokens"
                )


class Caches:
    """The packed weights of a transformer, and the logits of the first step of each class.

    Args:
        network: The network of the transformer.

    Attributes:
        first_step: Logits of the first step. An autoregressive model does not use them.
    """

    def __init__(self, network: Backbone) -> None:
        self._network = network
        self._watch = WeightWatch(network)
        self.first_step = FirstStepLogits(network)

    def follow_weights(self) -> None:
        """Removes everything if the weights may have changed since the last call; see ``networks.kernels``."""
        if self._watch.has_changed():
            free_packed(self._network)
            self.first_step.clear()


class Pipeline(Protocol):
    """The networks of a pipeline, which ``MaskGIT`` is."""

    tokenizer: PretrainedTokenizer
    transformer: PretrainedTransformer


NegativeModelLike: TypeAlias = Path | str | PretrainedTransformer | Pipeline


def images_at_once(height: int, width: int) -> int:
    """Returns the largest number of images that a tokenizer encodes or decodes at a time, at least 1.

    It bounds the memory: the released tokenizer takes 130 MB for an image of 256 x 256 pixels.

    Args:
        height: Height of the images in pixels.
        width: Width of the images in pixels.
    """
    return max(1, _MAX_PIXELS // (height * width))


def weights_for(config: BackboneConfig, pretrained: PretrainedTransformer) -> dict[str, Tensor]:
    """Returns the weights of a pretrained transformer for a network of the same sizes, any grid and any classes.

    Rows of the codes and of the mask token are copied, and those of the classes if their number is the same. Rows that
    the pretrained network lacks (other classes; the null class, if it was trained without class dropout) are the mean
    of its classes. Learned positions of another grid are interpolated; rotary positions need nothing.

    Args:
        config: Configuration of the network to be trained; the fields of ``BackboneConfig.transferable`` may differ.
        pretrained: The transformer to start from.

    Returns:
        State dict of a network of ``config``.

    Raises:
        ValueError: if the backbone or another field of its configuration differs.
    """
    source = pretrained.network
    _check_same(config, source.config)
    weights = source.state_dict()
    for names, convert in (
        (source.vocabulary_tables, _fit_vocabulary),
        (source.class_tables, _fit_classes),
        (source.position_tables, _fit_positions),
    ):
        weights |= {name: convert(weights[name], source.config, config) for name in names if name in weights}
    with skeletons():
        needed = config.create().state_dict()
    # A network with a null class may have tensors that one without it lacks; they keep their initial values.
    fresh = config.create().state_dict() if needed.keys() - weights.keys() else {}
    return {name: weights.get(name, fresh.get(name, needed[name])) for name in needed}


def _check_same(new: BackboneConfig, old: BackboneConfig) -> None:
    """Checks that two configurations differ only in fields that may differ.

    Raises:
        ValueError: if they do not. The message names the field and both values.
    """
    for name in ("backbone", "attention", *(field.name for field in fields(old))):
        old_value, new_value = getattr(old, name), getattr(new, name, None)
        if old_value != new_value and name not in old.transferable:
            raise ValueError(
                f"model.network.{name} must be {old_value}, as in the pretrained transformer, got {new_value}; leave "
                "the key out, or start from another one"
            )


def _fit_vocabulary(table: Tensor, old: BackboneConfig, new: BackboneConfig) -> Tensor:
    """Converts rows (old vocabulary, ...) to (new vocabulary, ...): codes, classes if it has them, the mask token."""
    codes, classes = table[: old.num_code_rows], table[old.num_code_rows : -1]
    if len(classes):
        classes = _fit_classes(classes, old, new)
    return torch.cat([codes, classes, table[-1:]])


def _fit_classes(table: Tensor, old: BackboneConfig, new: BackboneConfig) -> Tensor:
    """Converts rows (old classes, ...) to (new classes, ...), each followed by the null class if there is one."""
    classes, null = table[: old.num_classes], table[old.num_classes :]
    mean = classes.mean(0, keepdim=True)
    if new.num_classes != old.num_classes:
        classes = mean.expand(new.num_classes, *mean.shape[1:])
    if new.null_label is None:
        return classes
    return torch.cat([classes, mean if old.null_label is None else null])


def _fit_positions(table: Tensor, old: BackboneConfig, new: BackboneConfig) -> Tensor:
    """Converts rows (others + old grid, D) to (others + new grid, D), bicubic in 2-D. The grids are in raster order.

    Source: ViT, arXiv:2010.11929, section 3.2.
    """
    others = len(table) - old.num_tokens
    if old.grid == new.grid:
        return table
    planes = rearrange(table[others:].float(), "(h w) d -> 1 d h w", h=old.grid[0])
    is_smaller = new.grid[0] < old.grid[0] or new.grid[1] < old.grid[1]
    planes = F.interpolate(planes, size=new.grid, mode="bicubic", align_corners=False, antialias=is_smaller)
    return torch.cat([table[:others], rearrange(planes, "1 d h w -> (h w) d").to(table.dtype)])
