"""Reconstructs images of any height and width by overlapping tiles of the size that a tokenizer was trained with.

``tokenizer_evaluation`` uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.networks.vqgan import VQGAN

__all__ = ["reconstruct_in_tiles", "tile_starts"]


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Returns the first pixel of each tile along one axis; the last tile ends at the end of the axis.

    Args:
        length: Pixels of the axis.
        tile: Pixels of a tile. A shorter axis has one tile.
        overlap: Least number of pixels that neighbours share, in [0, tile).
    """
    if length <= tile:
        return [0]
    # The last tile is moved back instead of being cut, so that every tile has the same size.
    return [*range(0, length - tile, tile - overlap), length - tile]


def reconstruct_in_tiles(
    network: VQGAN, images: Tensor, *, tile: tuple[int, int], overlap: int
) -> tuple[Tensor, Tensor]:
    """Encodes and decodes images tile by tile, and blends the tiles where they overlap.

    A pixel is the weighted mean of the tiles that cover it. The weight of a tile falls linearly towards its edges, so
    that no seam is visible. An image that fits into one tile is encoded and decoded as a whole, with the same result.
    An axis that is shorter than a tile is padded with its last pixels, if the network cannot encode its length.

    Args:
        network: The tokenizer's network, with any number of channels C.
        images: (B, C, H, W) in [0, 1], in the dtype of the network.
        tile: Height and width of a tile in pixels.
        overlap: Least number of pixels that neighbours share, at least 0 and below both sides of a tile.

    Returns:
        (B, n) int64 tokens of all tiles, and the reconstruction (B, C, H, W) float32, not clipped.
    """
    height, width = images.shape[-2:]
    rows, columns = (tile_starts(*axis, overlap) for axis in ((height, tile[0]), (width, tile[1])))
    corners = [(y, x) for y in rows for x in columns]
    size = min(tile[0], height), min(tile[1], width)
    if len(corners) == 1:
        return _reconstruct(network, images)
    weights = _ramp(size[0], images)[:, None] * _ramp(size[1], images)  # (h, w)
    total, weight, tokens = (
        torch.zeros_like(images, dtype=torch.float32),
        torch.zeros(height, width, device=images.device),
        [],
    )
    for y, x in corners:
        place = (..., slice(y, y + size[0]), slice(x, x + size[1]))
        tokens_of_tile, decoded = _reconstruct(network, images[place])
        tokens.append(tokens_of_tile)
        total[place] += weights * decoded
        weight[place] += weights
    return torch.cat(tokens, 1), total / weight


def _reconstruct(network: VQGAN, images: Tensor) -> tuple[Tensor, Tensor]:
    height, width = images.shape[-2:]
    unit = network.config.side_unit
    if height % unit or width % unit:  # an axis that is shorter than a tile
        images = F.pad(images, (0, -width % unit, 0, -height % unit), mode="replicate")
    tokens = network.encode(images)
    # The decoder may add a margin, since it produces whole tokens; crop it.
    grid = network.config.grid((images.shape[-2], images.shape[-1]))
    return tokens, network.decode(tokens, grid)[..., :height, :width].float()


def _ramp(length: int, like: Tensor) -> Tensor:
    """Returns (length,) weights that rise by 1 per pixel from 1 at both edges to the centre."""
    places = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
    return torch.minimum(places, places.flip(0))
