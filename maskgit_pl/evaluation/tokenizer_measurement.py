"""Measures the reconstructions of a tokenizer in one pass over the val images.

``evaluate_tokenizer`` and the table of tokenizers use it. Originals and reconstructions go through the feature networks
in the same pass, so that any random choice of images, of any size, has its own reference. Images of any height and
width are reconstructed by overlapping tiles of the size that the tokenizer was trained with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import height_width
from maskgit_pl.data import ShardData
from maskgit_pl.data.images import decode_image
from maskgit_pl.data.manifest import load_manifest
from maskgit_pl.data.reader import ShardReader
from maskgit_pl.distributed import find_device, parse_dtype, peak_memory
from maskgit_pl.evaluation.distances import frechet_distance, kernel_distance
from maskgit_pl.evaluation.features import Extractor, FeatureCollector, open_extractors
from maskgit_pl.evaluation.opening import open_images
from maskgit_pl.evaluation.options import TokenizerOptions
from maskgit_pl.evaluation.reconstruction import ReconstructionMeter, psnr
from maskgit_pl.evaluation.reference import Statistics, draw_order, iter_real_batches
from maskgit_pl.evaluation.run_folders import RunFolders
from maskgit_pl.networks.perceptual import load_lpips
from maskgit_pl.networks.vqgan import VQGAN
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer, images_at_once
from maskgit_pl.pipeline.grids import to_unit_range
from maskgit_pl.pipeline.pretrained import load_tokenizer
from maskgit_pl.processes import Bars

__all__ = [
    "BEST_PSNR",
    "ImagePair",
    "MeasuredTokenizer",
    "feature_digests",
    "measure_tokenizer",
    "reconstruct_in_tiles",
    "tile_starts",
]

BEST_PSNR = 100.0  # dB, of an image without any error
_SHOWN = 8  # worst reconstructions
_MIB = 2**20


class ImagePair(NamedTuple):
    """An image with its reconstruction.

    Attributes:
        error: Mean squared error, for pixels in [0, 1].
        index: Number of the image in the val split.
        label: Class of the image.
        original: (C, H, W) uint8.
        reconstruction: (C, H, W) uint8.
    """

    error: float
    index: int  # type: ignore[assignment]  # hides tuple.index
    label: int
    original: Tensor
    reconstruction: Tensor


@dataclass(frozen=True)
class MeasuredTokenizer:
    """The measurements of a tokenizer.

    Args:
        tokenizer: The tokenizer, on its device.
        data: The real images.
        networks: SHA-256 of each feature network, by label.
        numbers: Values by name, such as ``rfid/classifier``.
        num_images: Number of images.
        psnr_db: Mean PSNR of each class in dB, by name.
        worst: Images with the largest errors, the worst first.
    """

    tokenizer: PretrainedTokenizer
    data: ShardData
    networks: dict[str, str]
    numbers: dict[str, float]
    num_images: int
    psnr_db: dict[str, float]
    worst: list[ImagePair]


def measure_tokenizer(
    folders: RunFolders, features: Sequence[str | dict[str, Any]], options: TokenizerOptions, bars: Bars
) -> MeasuredTokenizer:
    """Measures a tokenizer on val images.

    Args:
        folders: Folders of the tokenizer and of the data.
        features: Feature networks: names or mappings.
        options: Number of images, tiles and other options.
        bars: Progress bars.

    Raises:
        TypeError: if a feature network does not accept its arguments.
        ValueError: if a network is unknown, a weight file is missing, or the tile does not fit the tokenizer.
    """
    device = find_device(options.device)
    tokenizer = load_tokenizer(folders.pretrained / "tokenizer")
    tokenizer.network.to(device, dtype=parse_dtype(options.dtype, device))
    config = tokenizer.network.config
    if options.tile is not None:
        config.grid(options.tile)  # raises if the network cannot encode a tile
    lpips = None if options.lpips is None else load_lpips(options.lpips, device=device)
    data = open_images(folders.data, tokenizer.image_size, config.in_channels, num_workers=options.num_workers)
    if options.tile is None:
        data.warn_if_resized()
    extractors = open_extractors(
        folders.classifier, data, features=features, device=device, bars=bars, replaces=folders.shares_classifier
    )
    count = min(options.num_images or data.summary.samples["val"], data.summary.samples["val"])
    images = data.summary.images
    edge = min(height_width(tokenizer.image_size) if options.tile is None else (images.height[0], images.width[0]))
    meter = ReconstructionMeter(tokenizer, extractors, lpips, least_edge=edge)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    seen = _see_images(meter, extractors, data, count, options, bars(f"{folders.run.name}: reconstructing", count))
    return MeasuredTokenizer(
        tokenizer,
        data,
        {each.label: each.digest for each in extractors},
        _numbers(meter, seen, count),
        count,
        _psnr_of_classes(meter.values()["error"], torch.cat(seen.labels), data.class_names),
        seen.worst,
    )


def feature_digests(
    folders: RunFolders, features: Sequence[str | dict[str, Any]], options: TokenizerOptions, bars: Bars
) -> dict[str, str]:
    """Returns the SHA-256 of each feature network by label; see ``measure_tokenizer``."""
    tokenizer = load_tokenizer(folders.pretrained / "tokenizer")
    data = open_images(folders.data, tokenizer.image_size, tokenizer.network.config.in_channels)
    extractors = open_extractors(
        folders.classifier,
        data,
        features=features,
        device=find_device(options.device),
        bars=bars,
        replaces=folders.shares_classifier,
    )
    return {each.label: each.digest for each in extractors}


@dataclass
class _Pass:
    """The values of one pass over the images, besides those of ``ReconstructionMeter``."""

    originals: dict[str, FeatureCollector]
    labels: list[Tensor] = field(default_factory=list)
    worst: list[ImagePair] = field(default_factory=list)
    tokens: int = 0
    pixels: int = 0
    seconds: float = 0.0


@torch.inference_mode()
def _see_images(
    meter: ReconstructionMeter,
    extractors: Sequence[Extractor],
    data: ShardData,
    count: int,
    options: TokenizerOptions,
    on_images: Callable[[int], object],
) -> _Pass:
    """Reconstructs and measures ``count`` images."""
    seen = _Pass({each.label: FeatureCollector(each) for each in extractors})
    network, done = meter.tokenizer.network, 0
    tile = height_width(meter.tokenizer.image_size if options.tile is None else options.tile)
    # An image of the plain pass is one tile.
    reconstruct = partial(
        reconstruct_in_tiles, network, tile=tile, overlap=0 if options.tile is None else options.overlap
    )
    size, dtype = min(options.batch_size, images_at_once(*tile)), next(network.parameters()).dtype
    batches = _read_fitted(data, count, size) if options.tile is None else _read_whole(data, count)
    for pixels, labels, index in batches:
        images, positions = to_unit_range(pixels.to(meter.device)), torch.arange(done, done + len(pixels))
        start = _now(meter.device)
        tokens, decoded = reconstruct(images.to(dtype))
        seen.seconds += _now(meter.device) - start
        rounded = meter.add_reconstructions(images, tokens, decoded, positions).cpu()
        for collector in seen.originals.values():
            collector.add(pixels.to(meter.device), positions)
        errors = (decoded.clamp(0, 1) - images).double().square().flatten(1).mean(1).tolist()
        pairs = zip(errors, index.tolist(), labels.tolist(), pixels, rounded, strict=True)
        seen.worst = sorted([*seen.worst, *(ImagePair(*pair) for pair in pairs)], key=lambda pair: -pair.error)[:_SHOWN]
        seen.labels.append(labels)
        seen.tokens, seen.pixels = seen.tokens + tokens.numel(), seen.pixels + pixels[:, 0].numel()
        done += len(pixels)
        on_images(len(pixels))
    return seen


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run asynchronously
    return time.perf_counter()


def _read_fitted(data: ShardData, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields batches of images, labels and indices, cropped and resized as in training."""
    for batch in iter_real_batches(data, "val", num_images=count, shuffled=True, batch_size=batch_size):
        yield batch.content[batch.valid], batch.labels[batch.valid], batch.index[batch.valid]


def _read_whole(data: ShardData, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the same images one by one at their own size."""
    reader = ShardReader(load_manifest(Path(data.config.path), "val"))
    index = draw_order(len(reader), count)(range(count)).index
    labels = torch.from_numpy(reader.labels(index.numpy()))
    for place, number in enumerate(index.tolist()):
        pixels = decode_image(reader.read(number), channels=data.config.in_channels, name=reader.name(number))
        yield pixels[None], labels[place : place + 1], index[place : place + 1]


def _numbers(meter: ReconstructionMeter, seen: _Pass, count: int) -> dict[str, float]:
    """Returns all values by name."""
    values = meter.values()
    errors = values.pop("error")
    codes = {name: float(value) for name, value in meter.codes.compute().items()}
    tokens_per_pixel = seen.tokens / seen.pixels
    numbers = {
        "psnr_db": min(BEST_PSNR, psnr(float(errors.mean()))),
        "mean_psnr_db": float(_psnr_of_images(errors).mean()),
        **{name: float(each.mean()) for name, each in values.items()},
    }
    for label, collector in meter.collectors.items():
        numbers |= _distances(label, collector, seen.originals[label])
    return {
        **numbers,
        **codes,
        "bits_per_pixel": tokens_per_pixel * math.log2(meter.tokenizer.network.config.codebook_size),
        "coded_bits_per_pixel": tokens_per_pixel * math.log2(codes["perplexity"]),
        "images_per_second": count / max(seen.seconds, 1e-9),
        "peak_memory_mb": peak_memory(meter.device) / _MIB,
    }


def _distances(label: str, reconstructions: FeatureCollector, originals: FeatureCollector) -> dict[str, float]:
    """Returns FID and KID of the reconstructions, and of one half of the originals against the other."""
    fake, real = reconstructions.gather().pooled.double(), originals.gather().pooled.double()
    halves = real[::2], real[1::2]  # every second image
    numbers = {}
    for name, (one, other) in {"": (fake, real), "_floor": halves}.items():
        numbers[f"rfid{name}/{label}"] = frechet_distance(
            Statistics.from_features(one), Statistics.from_features(other)
        )
        numbers[f"rkid{name}/{label}"] = kernel_distance(one, other)[0]
    return numbers


def _psnr_of_images(errors: Tensor) -> Tensor:
    """Returns (n,) dB of (n,) mean squared errors; an image without an error has 100 dB."""
    return (-10 * errors.log10()).clamp(max=BEST_PSNR)


def _psnr_of_classes(errors: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Returns the mean PSNR of the images of each class that has any."""
    values = _psnr_of_images(errors)
    return {names[label]: float(values[labels == label].mean()) for label in sorted(set(labels.tolist()))}


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
    total, tokens = torch.zeros_like(images, dtype=torch.float32), []
    weight = torch.zeros(height, width, device=images.device)
    for y, x in corners:
        place = (..., slice(y, y + size[0]), slice(x, x + size[1]))
        tokens_of_tile, decoded = _reconstruct(network, images[place])
        tokens.append(tokens_of_tile)
        total[place] += weights * decoded
        weight[place] += weights
    return torch.cat(tokens, 1), total / weight


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
