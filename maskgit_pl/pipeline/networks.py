"""A pretrained tokenizer and a pretrained transformer, with the data that decoding needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, check_parallel
from maskgit_pl.image_format import ImageSize, height_width
from maskgit_pl.networks.backbone import Backbone
from maskgit_pl.networks.vqgan import VQGAN
from maskgit_pl.schedules import MaskSchedule

__all__ = ["PretrainedTokenizer", "PretrainedTransformer", "images_at_once"]

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

    def encode(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Encodes images to tokens on the network's device, in batches of at most ``images_at_once``.

        Args:
            images: (B, C, H, W) uint8.
            batch_size: Largest batch; None for no further limit.

        Returns:
            (B, N) int64 in [0, K), on the CPU.

        Raises:
            ValueError: if there is no image.
        """
        _check_not_empty("images", images)
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

        Raises:
            ValueError: if there are no tokens.
        """
        _check_not_empty("tokens", tokens)
        # Without a grid, an image of image_size may cover only a part of its last tokens: the rest is cut off.
        height, width = height_width(self.image_size) if grid is None else (None, None)
        rows, columns = grid or self.grid
        factor = self.network.config.downsampling_factor
        count, decoded = images_at_once(rows * factor, columns * factor), []
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
    """

    network: Backbone
    mask_schedule: MaskSchedule | None
    decoding: DecodingConfig
    class_names: tuple[str, ...]
    tokenizer_fingerprint: str

    def schedule_for(self, task: str) -> MaskSchedule:
        """Returns the mask schedule, for a task that needs parallel decoding.

        Args:
            task: Name of the task, for the error.

        Raises:
            ValueError: if the model is autoregressive.
        """
        check_parallel(task, is_autoregressive=self.mask_schedule is None)
        assert self.mask_schedule is not None
        return self.mask_schedule


def _check_not_empty(name: str, batch: Tensor) -> None:
    if not len(batch):
        raise ValueError(f"{name} must have at least 1 row, got shape {tuple(batch.shape)}")


def images_at_once(height: int, width: int) -> int:
    """Returns the largest number of images that a tokenizer encodes or decodes at a time, at least 1.

    It bounds the memory: the released tokenizer takes 130 MB for an image of 256 x 256 pixels.

    Args:
        height: Height of the images in pixels.
        width: Width of the images in pixels.
    """
    return max(1, _MAX_PIXELS // (height * width))
