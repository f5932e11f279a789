"""The reconstruction error of a tokenizer: PSNR, SSIM, reconstruction FID, LPIPS and codebook usage.

``evaluate`` uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from maskgit_pl.checks import height_width
from maskgit_pl.data import Batch
from maskgit_pl.distributed import gather_rows
from maskgit_pl.evaluation.distances import frechet_distance
from maskgit_pl.evaluation.features import Extractor, FeatureCollector
from maskgit_pl.evaluation.reference import Reference, Statistics
from maskgit_pl.networks.perceptual import LPIPS
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.grids import to_unit_range
from maskgit_pl.tokenizer import CodebookUsage

__all__ = ["Reconstruction", "ReconstructionMeter", "measure_reconstruction", "psnr"]

_SSIM_WINDOW = 11  # pixels; smaller images have no SSIM


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction error of a tokenizer.

    Args:
        psnr_db: PSNR in dB, from the mean squared error of all images together.
        codebook_usage: Fraction of the codes that occur at least once, in [0, 1].
        perplexity: Perplexity of the code frequencies, in [1, K].
        images: Number of images.
        ssim: Structural similarity, mean over images, <= 1; None for images below 11 pixels.
        rfid: Frechet distance between reconstructions and originals, by label of the feature network.
        lpips: Learned perceptual distance, mean over images, by backbone.
    """

    psnr_db: float
    codebook_usage: float
    perplexity: float
    images: int
    ssim: float | None = None
    rfid: Mapping[str, float] = field(default_factory=dict)
    lpips: Mapping[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Returns the values by name; names of network metrics have the label as suffix, e.g. ``rfid/inception``."""
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
    """Computes the PSNR -10 log10(error) in dB, for pixels in [0, 1].

    Args:
        mean_squared_error: Error, >= 0. An error of 0 gives infinity.

    Raises:
        ValueError: if the error is negative or NaN.
    """
    if not mean_squared_error >= 0:
        raise ValueError(f"mean squared error must be >= 0, got {mean_squared_error}")
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
    """Measures the reconstruction error of a tokenizer, for pixels in [0, 1] and clipped reconstructions.

    The ranks share the batches; the result does not depend on their number if each rank takes whole batches.

    Args:
        tokenizer: The tokenizer, on its device.
        batches: This rank's batches of uint8 images. Rows that are not valid are ignored.
        extractors: Feature networks of the reconstruction FID, which see reconstructions rounded to uint8.
        references: References of the originals, by label of the network.
        lpips: Perceptual distance; None leaves it out.
        on_images: Called after each batch with its number of images, for a progress bar.

    Raises:
        ValueError: if there are no images, or a network has no reference.
    """
    for extractor in extractors:
        if extractor.label not in references:
            raise ValueError(f"rfid/{extractor.label}: references must have this network, got {sorted(references)}")
    # Pixel errors are averaged over images; the FID needs the features of all images first.
    seen = ReconstructionMeter(tokenizer, extractors, lpips)
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


class ReconstructionMeter:
    """The measurements of this rank's reconstructions, image by image.

    Args:
        tokenizer: The tokenizer, on its device.
        extractors: Feature networks, which see reconstructions rounded to uint8.
        lpips: Perceptual distance; None leaves it out.
        least_edge: Shortest edge of all images, in pixels; None for that of the tokenizer's image size.

    Attributes:
        codes: Counts of the codes.
        collectors: Features of the reconstructions, by label of the network.
    """

    def __init__(
        self,
        tokenizer: PretrainedTokenizer,
        extractors: Sequence[Extractor],
        lpips: LPIPS | None,
        *,
        least_edge: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.device = next(tokenizer.network.parameters()).device
        self.codes = CodebookUsage(tokenizer.network.config.codebook_size)
        # An empty update, so that the counts exist on a rank without images.
        self.codes.update(torch.empty(0, 1, dtype=torch.int64), torch.empty(0))
        self.collectors = {extractor.label: FeatureCollector(extractor) for extractor in extractors}
        self.measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"error": _mean_squared_error}
        if (least_edge or min(height_width(tokenizer.image_size))) >= _SSIM_WINDOW:
            self.measures["ssim"] = _ssim
        if lpips is not None:
            self.measures[lpips.label] = lpips
        self._rows = [torch.empty(0, len(self.measures), dtype=torch.float64)]
        self._positions = [torch.empty(0, dtype=torch.int64)]

    def add(self, pixels: Tensor, positions: Tensor) -> None:
        """Reconstructs and measures images.

        Args:
            pixels: (b, C, H, W) uint8.
            positions: (b,) int64: indices among all images.
        """
        if len(pixels) == 0:
            return
        images, (height, width) = to_unit_range(pixels.to(self.device)), height_width(self.tokenizer.image_size)
        tokens = self.tokenizer.network.encode(images)
        # The decoder may add a margin, since it produces whole tokens; crop it.
        decoded = self.tokenizer.network.decode(tokens, self.tokenizer.grid)[..., :height, :width]
        self.add_reconstructions(images, tokens, decoded, positions)

    def add_reconstructions(self, images: Tensor, tokens: Tensor, decoded: Tensor, positions: Tensor) -> Tensor:
        """Measures images that were reconstructed in any way.

        Args:
            images: (b, C, H, W) float in [0, 1].
            tokens: (b, n) int64.
            decoded: (b, C, H, W) float, not clipped.
            positions: (b,) int64: indices among all images.

        Returns:
            (b, C, H, W) uint8: the reconstructions as feature networks see them.
        """
        decoded = decoded.float().clamp(0, 1)
        self.codes.update(tokens.cpu(), torch.ones(len(tokens)))
        # One value per image and measure, in float64: the means do not depend on the batch size.
        measured = [measure(decoded, images).double().cpu() for measure in self.measures.values()]
        self._rows.append(torch.stack(measured, 1))
        self._positions.append(positions)
        # Feature networks see uint8 images, as they do for the originals.
        rounded = (decoded * 255).round().to(torch.uint8)
        for collector in self.collectors.values():
            collector.add(rounded, positions)
        return rounded

    def values(self) -> dict[str, Tensor]:
        """Returns the (n,) float64 values of each measure, in the order of the images of all ranks.

        Raises:
            ValueError: if no rank has an image.
        """
        rows = gather_rows(torch.cat(self._rows), torch.cat(self._positions))  # (n, measures)
        if len(rows) == 0:
            raise ValueError("reconstruction: there must be at least one image, got none")
        return dict(zip(self.measures, rows.unbind(1), strict=True))

    def means(self) -> tuple[dict[str, float], int]:
        """Returns the means over the images of all ranks, and the number of images; see ``values``."""
        values = self.values()
        return {name: float(each.mean()) for name, each in values.items()}, len(values["error"])


def _mean_squared_error(images: Tensor, others: Tensor) -> Tensor:
    return (images - others).double().square().flatten(1).mean(1)


def _ssim(images: Tensor, others: Tensor) -> Tensor:
    """Computes the structural similarity with a Gaussian window of 11 x 11 pixels and sigma 1.5.

    Args:
        images: (B, C, H, W) float in [0, 1].
        others: Images of the same shape.

    Returns:
        (B,) float64, <= 1.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    similarity = structural_similarity_index_measure(images.double(), others.double(), data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity.reshape(len(images))
