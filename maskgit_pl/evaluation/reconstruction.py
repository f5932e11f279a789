"""The reconstruction error of a tokenizer: PSNR, SSIM, reconstruction FID, LPIPS and codebook usage.

``evaluate`` and ablations call ``measure_reconstruction``; ``tokenizer`` measures more with the same meter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from maskgit_pl.checks import height_width
from maskgit_pl.data import Batch
from maskgit_pl.distributed import gather_rows
from maskgit_pl.evaluation.distances import frechet_distance
from maskgit_pl.evaluation.features import Extractor, FeatureCollector
from maskgit_pl.evaluation.metrics import metric_name
from maskgit_pl.evaluation.reference import Reference, Statistics
from maskgit_pl.networks.features import LPIPS
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.grids import to_unit_range
from maskgit_pl.tokenizer import CodebookUsage

__all__ = ["ReconstructionMeter", "measure_reconstruction", "psnr"]

_SSIM_WINDOW = 11  # pixels; smaller images have no SSIM


def psnr(mean_squared_error: float) -> float:
    """Computes the PSNR -10 log10(error) in dB, for pixels in [0, 1]; an error of 0 gives infinity."""
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)


def measure_reconstruction(
    tokenizer: PretrainedTokenizer,
    batches: Iterable[Batch],
    *,
    extractors: Sequence[Extractor] = (),
    references: Mapping[str, Reference] = MappingProxyType({}),
    lpips: LPIPS | None = None,
    on_images: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """Measures the reconstruction error of a tokenizer, for pixels in [0, 1] and clipped reconstructions.

    The ranks share the batches; the result does not depend on their number if each rank takes whole batches.

    Args:
        tokenizer: The tokenizer, on its device.
        batches: This rank's batches of uint8 images. Rows that are not valid are ignored.
        extractors: Feature networks of the reconstruction FID, which see reconstructions rounded to uint8.
        references: References of the originals, by label of the network.
        lpips: Perceptual distance; None leaves it out.
        on_images: Called after each batch with its number of images, for a progress bar.

    Returns:
        Values by name: ``psnr_db`` (from the mean squared error of all images together), ``ssim`` (for images of 11
        pixels or more), ``rfid/NETWORK``, ``lpips/BACKBONE``, ``codebook_usage``, ``perplexity``, and ``images``, their
        number.
    """
    meter = ReconstructionMeter(tokenizer, extractors, lpips)
    for batch in batches:
        if batch.valid.any():
            meter.add(batch.content[batch.valid], batch.position[batch.valid])
        on_images(int(batch.valid.sum()))
    values = meter.values()
    means = {name: float(of_image.mean()) for name, of_image in values.items()}
    distances = {
        metric_name("rfid", label): frechet_distance(
            Statistics.from_features(collector.gather().pooled), references[label].pooled
        )
        for label, collector in meter.collectors.items()
    }
    perceptual = {} if lpips is None else {lpips.label: means.pop(lpips.label)}
    error = means.pop("error")
    return {
        "psnr_db": psnr(error),
        **means,
        **distances,
        **perceptual,
        **meter.code_usage(),
        "images": len(values["error"]),
    }


class ReconstructionMeter:
    """The measurements of this rank's reconstructions, image by image.

    Args:
        tokenizer: The tokenizer, on its device.
        extractors: Feature networks, which see reconstructions rounded to uint8.
        lpips: Perceptual distance; None leaves it out.

    Attributes:
        collectors: Features of the reconstructions, by label of the network.
        seconds: Seconds of encoding and decoding.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, extractors: Sequence[Extractor], lpips: LPIPS | None) -> None:
        self.tokenizer = tokenizer
        self.collectors = {extractor.label: FeatureCollector(extractor) for extractor in extractors}
        self.seconds = 0.0
        self._codes = CodebookUsage(tokenizer.network.config.codebook_size)
        # An empty update, so that the counts exist on a rank without images.
        self._codes.update(torch.empty(0, 1, dtype=torch.int64), torch.empty(0))
        self._measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"error": _mean_squared_error}
        if min(height_width(tokenizer.image_size)) >= _SSIM_WINDOW:
            self._measures["ssim"] = _ssim
        if lpips is not None:
            self._measures[lpips.label] = lpips
        self._rows = [torch.empty(0, len(self._measures), dtype=torch.float64)]
        self._positions = [torch.empty(0, dtype=torch.int64)]

    @torch.inference_mode()
    def add(self, pixels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructs and measures images.

        Args:
            pixels: (b, C, H, W) uint8.
            positions: (b,) int64: indices among all images.

        Returns:
            (b, C, H, W) uint8: the reconstructions; and (b,) float64: the mean squared errors before rounding. Both are
            on the CPU.
        """
        network, (height, width) = self.tokenizer.network, height_width(self.tokenizer.image_size)
        like = next(network.parameters())  # for device and dtype
        images = to_unit_range(pixels.to(like.device))
        start = _now(like.device)
        tokens = network.encode(images.to(like.dtype))
        # The decoder may add a margin, since it produces whole tokens; crop it.
        decoded = network.decode(tokens, self.tokenizer.grid)[..., :height, :width].float().clamp(0, 1)
        self.seconds += _now(like.device) - start
        self._codes.update(tokens.cpu(), torch.ones(len(tokens)))
        # One value per image and measure, in float64: the means do not depend on the batch size.
        rows = torch.stack([measure(decoded, images).double().cpu() for measure in self._measures.values()], 1)
        self._rows.append(rows)
        self._positions.append(positions)
        # Feature networks see uint8 images, as they do for the originals.
        rounded = (decoded * 255).round().to(torch.uint8)
        for collector in self.collectors.values():
            collector.add(rounded, positions)
        return rounded.cpu(), rows[:, 0]

    def values(self) -> dict[str, Tensor]:
        """Returns the (n,) float64 values of each measure, in the order of the images of all ranks.

        ``error`` is the mean squared error.
        """
        rows = gather_rows(torch.cat(self._rows), torch.cat(self._positions))  # (n, measures)
        return dict(zip(self._measures, rows.unbind(1), strict=True))

    def code_usage(self) -> dict[str, float]:
        """Returns ``codebook_usage`` and ``perplexity`` of the tokens of all ranks, see ``CodebookUsage``."""
        return {name: float(value) for name, value in self._codes.compute().items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run asynchronously
    return time.perf_counter()


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
