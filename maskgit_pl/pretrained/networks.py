"""A tokenizer and a transformer as they were saved, with what decoding needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, check_parallel
from maskgit_pl.networks.autoregressive import AutoregressiveTransformer
from maskgit_pl.networks.transformer import MaskedTransformer
from maskgit_pl.networks.vqgan import VQGAN
from maskgit_pl.schedules import MaskSchedule

__all__ = ["PretrainedTokenizer", "PretrainedTransformer", "images_at_once"]

_MOST_PIXELS = 2**20  # decoded at a time: 16 images of 256 pixels


@dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer as it was saved.

    Args:
        network: In evaluation mode, on the CPU, frozen.
        image_size: Height and width that it was trained on, in pixels.
        fingerprint: sha256 of its weights, hexadecimal.
    """

    network: VQGAN
    image_size: int
    fingerprint: str

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of an image of ``image_size``."""
        return self.network.config.grid(self.image_size)

    def encode(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Encodes images to tokens, as many at a time as ``images_at_once`` says, on the network's device.

        Args:
            images: (n, C, H, W) uint8.
            batch_size: At most so many at a time.

        Returns:
            (n, N) int64 on the CPU, in [0, K).
        """
        like = next(self.network.parameters())
        count = min(batch_size or len(images), images_at_once(*images.shape[-2:]))
        tokens = []
        with torch.no_grad():
            for first in range(0, len(images), count):
                pixels = images[first : first + count].to(torch.float32) / 255
                tokens.append(self.network.encode(pixels.to(like)).cpu())
            return torch.cat(tokens)

    def decode(self, tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Decodes tokens to images, as many at a time as ``images_at_once`` says, on the network's device.

        Args:
            tokens: (B, N) int64 in [0, K).
            grid: Rows and columns of another picture than the model's own, such as a panorama.

        Returns:
            (B, C, H, W) uint8 on the CPU: the decoded images, clipped to [0, 1], image_size high and wide or as large
            as the grid.
        """
        size = None if grid is not None and grid != self.grid else self.image_size
        rows, columns = grid or self.grid
        factor = self.network.config.downsampling_factor
        count, decoded = images_at_once(rows * factor, columns * factor), []
        with torch.inference_mode():
            for first in range(0, len(tokens), count):
                images = self.network.decode(tokens[first : first + count], (rows, columns))[..., :size, :size]
                decoded.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
            return torch.cat(decoded)


@dataclass(frozen=True)
class PretrainedTransformer:
    """A transformer as it was saved, with what decoding needs.

    Args:
        network: In evaluation mode, on the CPU, frozen.
        mask_schedule: The schedule that it was trained with; None for an autoregressive one.
        decoding: Way of decoding unless told otherwise.
        class_names: One for each class.
        tokenizer_fingerprint: Fingerprint of the tokenizer whose tokens it knows.
    """

    network: MaskedTransformer | AutoregressiveTransformer
    mask_schedule: MaskSchedule | None
    decoding: DecodingConfig
    class_names: tuple[str, ...]
    tokenizer_fingerprint: str

    def schedule_for(self, task: str) -> MaskSchedule:
        """Returns the mask schedule, for a task that only a model that decodes in parallel can do.

        Args:
            task: Name of the task, for the error.

        Raises:
            ValueError: if the model is autoregressive.
        """
        check_parallel(task, is_autoregressive=self.mask_schedule is None)
        assert self.mask_schedule is not None
        return self.mask_schedule


def images_at_once(height: int, width: int) -> int:
    """Returns how many images of a size a tokenizer encodes or decodes at a time, at least 1: their pixels are bounded.

    The released tokenizer takes 130 MB for an image of 256 x 256 pixels.
    """
    return max(1, _MOST_PIXELS // (height * width))
