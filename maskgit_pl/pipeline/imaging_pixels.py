"""Converts pixels between tensors and PIL images."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

__all__ = ["to_pil", "to_unit_range"]


def to_unit_range(images: Tensor) -> Tensor:
    """Converts uint8 pixels in [0, 255] to float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def to_pil(image: Tensor) -> Image.Image:
    """Converts (C, H, W) uint8 with C = 1 or 3 to an image of the mode L or RGB."""
    pixels = rearrange(image.cpu().numpy(), "c h w -> h w c")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
