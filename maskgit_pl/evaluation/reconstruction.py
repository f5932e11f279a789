"""The reconstruction error of a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from maskgit_pl.data import Batch
from maskgit_pl.distributed import gather_rows
from maskgit_pl.evaluation.distances import frechet_distance
from maskgit_pl.evaluation.features import Extractor, FeatureCollector
from maskgit_pl.evaluation.lpips import LPIPS
from maskgit_pl.evaluation.reference import Reference, Statistics
from maskgit_pl.imaging import to_unit_range
from maskgit_pl.pretrained import PretrainedTokenizer
from maskgit_pl.tokenizer import CodebookUsage

__all__ = ["Reconstruction", "measure_reconstruction", "psnr"]

_SSIM_WINDOW = 11  # pixels


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction error of a tokenizer.

    Args:
        psnr_db: Of the squared error pooled over all images.
        codebook_usage: Share of the codes used at least once, in [0, 1].
        perplexity: Of the codes, in [1, K].
        images: How many were measured.
        ssim: Structural similarity, the mean over images, at most 1; None for images of less than 11 pixels.
        rfid: Frechet distance of the reconstructions from the originals, by feature network.
        lpips: The learned perceptual distance, the mean over images, by backbone.
    """

    psnr_db: float
    codebook_usage: float
    perplexity: float
    images: int
    ssim: float | None = None
    rfid: Mapping[str, float] = field(default_factory=dict)
    lpips: Mapping[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Returns the numbers by name; those of a network are named after it, e.g. ``rfid/inception``."""
        return {
            "psnr_db": self.psnr_db,
            **({} if self.ssim is None else {"ssim": self.ssim}),
            **{f"rfid/{label}": value for label, value in self.rfid.items()},
            **{f"lpips/{backbone}": value for backbone, value in self.lpips.items()},
            "codebook_usage": self.codebook_usage,
            "perplexity": self.perplexity,
            "images": self.images,
        }


def psnr(mean_squared_error: float) -> float:
    """Computes -10 log10(error) in dB, for pixels in [0, 1]; infinite where nothing differs.

    Raises:
        ValueError: if the error is negative or not a number.
    """
    if not mean_squared_error >= 0:
        raise ValueError(f"mean squared error: at least 0 is needed, got {mean_squared_error}")
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)


@torch.inference_mode()
def measure_reconstruction(
    tokenizer: PretrainedTokenizer,
    batches: Iterable[Batch],
    *,
    extractors: Sequence[Extractor] = (),
    references: Mapping[str, Reference] = MappingProxyType({}),
    lpips: LPIPS | None = None,
    on_images: Callable[[int], object] = lambda count: None,
) -> Reconstruction:
    """Measures a tokenizer: pixels in [0, 1], reconstructions clipped, one error pooled over all images.

    Several ranks that each take whole batches get what one rank gets.

    Args:
        tokenizer: Where its network is, the work is done.
        batches: This rank's, of uint8 images, ordered by ``position``; rows that are not valid count nothing.
        extractors: Feature networks in which the reconstructions' FID is measured, as bytes.
        references: The originals, by the networks' labels.
        lpips: Measures the perceptual distance; None leaves it out.
        on_images: Called with the number of images that are done, for a progress bar.

    Raises:
        ValueError: if there are no images, or a network has no reference.
    """
    for extractor in extractors:
        if extractor.label not in references:
            raise ValueError(f"rfid/{extractor.label}: the originals' reference is needed, got {sorted(references)}")
    seen = _Reconstructions(tokenizer, extractors, lpips)
    for batch in batches:
        seen.add(batch.content[batch.valid], batch.position[batch.valid])
        on_images(int(batch.valid.sum()))
    means, count = seen.means()
    return Reconstruction(
        psnr(means["error"]),
        **{name: float(value) for name, value in seen.codes.compute().items()},
        images=count,
        ssim=means.get("ssim"),
        rfid={
            label: frechet_distance(Statistics.from_features(collector.gather().pooled), references[label].pooled)
            for label, collector in seen.collectors.items()
        },
        lpips={} if lpips is None else {lpips.backbone: means[lpips.label]},
    )


class _Reconstructions:
    """What is measured image by image while a tokenizer reconstructs this rank's."""

    def __init__(self, tokenizer: PretrainedTokenizer, extractors: Sequence[Extractor], lpips: LPIPS | None) -> None:
        self.tokenizer = tokenizer
        self.device = next(tokenizer.network.parameters()).device
        self.codes = CodebookUsage(tokenizer.network.config.codebook_size)
        self.codes.update(torch.empty(0, 1, dtype=torch.int64), torch.empty(0))  # all of a rank without images
        self.collectors = {extractor.label: FeatureCollector(extractor) for extractor in extractors}
        self.measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"error": _mean_squared_error}
        if tokenizer.image_size >= _SSIM_WINDOW:
            self.measures["ssim"] = _ssim
        if lpips is not None:
            self.measures[lpips.label] = lpips
        self._rows = [torch.empty(0, len(self.measures), dtype=torch.float64)]
        self._positions = [torch.empty(0, dtype=torch.int64)]

    def add(self, pixels: Tensor, positions: Tensor) -> None:
        """Reconstructs (b, C, H, W) uint8 images."""
        if len(pixels) == 0:
            return
        images, size = to_unit_range(pixels.to(self.device)), self.tokenizer.image_size
        tokens = self.tokenizer.network.encode(images)
        decoded = self.tokenizer.network.decode(tokens, self.tokenizer.grid)[..., :size, :size].float().clamp(0, 1)
        self.codes.update(tokens.cpu(), torch.ones(len(tokens)))
        measured = [measure(decoded, images).double().cpu() for measure in self.measures.values()]
        self._rows.append(torch.stack(measured, 1))
        self._positions.append(positions)
        for collector in self.collectors.values():
            collector.add((decoded * 255).round().to(torch.uint8), positions)

    def means(self) -> tuple[dict[str, float], int]:
        """Returns the means over the images of all ranks, and the number of images.

        Raises:
            ValueError: None.
        """
        rows = gather_rows(torch.cat(self._rows), torch.cat(self._positions))  # (n, measures)
        if len(rows) == 0:
            raise ValueError("reconstruction: at least one image is needed, got none")
        return dict(zip(self.measures, rows.mean(0).tolist(), strict=True)), len(rows)


def _mean_squared_error(images: Tensor, others: Tensor) -> Tensor:
    return (images - others).double().square().flatten(1).mean(1)


def _ssim(images: Tensor, others: Tensor) -> Tensor:
    """Computes SSIM (B,) float64 with a Gaussian window of 11 x 11 pixels, sigma 1.5. Source: Wang et al., 2004."""
    similarity = structural_similarity_index_measure(images.double(), others.double(), data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity.reshape(len(images))
