"""Judges without a trained network: distances and spreads of pixels, and the power of a pattern of every second pixel.

``PixelNetwork`` brings an image to some hundred numbers, so that its references and features are made as those of
trained networks.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.evaluation.distances import frechet_distance
from maskgit_pl.evaluation.extractors import Extractor
from maskgit_pl.evaluation.metrics import ComparedImages, FeatureMetric, metrics
from maskgit_pl.evaluation.reference import Statistics
from maskgit_pl.networks.classifiers import FeatureOutput

_BRIGHTNESS, _CONTRAST, _PERIOD_2, _PERIOD_4, _FIRST_PIXEL = range(5)  # columns of the features
_SIDE = 16  # pixels of the smaller image
_BLOCK = 8  # pixels, a multiple of both periods
_EVEN = 0.05  # largest difference between the means of the quarters of an even block, of pixels in [0, 1]
_COMPONENTS = 64
_PLAIN = 1e-9  # power of rounding errors; one grey level in one pixel has more than 1e-6


class PixelNetwork(nn.Module):
    """Computes the brightness and the contrast of images, the power of two periods in even areas, and small images.

    The power at a period of p pixels is the sum of |sum over x of v(x) exp(-2 pi i x / p)|^2 over the rows and columns
    v of the blocks of 8 x 8 grey pixels whose four quarters have about the same mean.
    """

    waves: Tensor

    def __init__(self) -> None:
        super().__init__()
        # (8, 3): the wave of period 2, then cosine and sine of period 4.
        waves = torch.tensor([[1, 1, 0], [-1, 0, 1], [1, -1, 0], [-1, 0, -1]]).float()
        self.register_buffer("waves", waves.repeat(_BLOCK // 4, 1))

    def forward(self, images: Tensor) -> FeatureOutput:
        """Returns (B, 4 + C s t) float features of (B, C, H, W) uint8 images, where s and t are at most 16 pixels."""
        pixels = images.float() / 255
        grey = pixels.mean(1)  # (B, H, W)
        height, width = grey.shape[1:]
        small = F.adaptive_avg_pool2d(pixels, (min(_SIDE, height), min(_SIDE, width)))
        columns = torch.stack([grey.mean((1, 2)), grey.flatten(1).std(1), *self._powers(grey)], 1)
        return FeatureOutput(torch.cat([columns, small.flatten(1)], 1), small.new_empty(len(small), 0))

    def _powers(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        if min(grey.shape[1:]) < _BLOCK:
            return grey.new_zeros(len(grey)), grey.new_zeros(len(grey))
        blocks = grey.unfold(1, _BLOCK, _BLOCK).unfold(2, _BLOCK, _BLOCK)  # (B, h, w, 8, 8)
        quarters = F.avg_pool2d(blocks.flatten(0, 2), _BLOCK // 2).flatten(1)  # (B h w, 4)
        is_even = (quarters.amax(1) - quarters.amin(1) < _EVEN).reshape(blocks.shape[:3])
        # The brightness gives no wave, but rounding errors that would be all that is left of a plain area.
        blocks = blocks - blocks.mean((3, 4), keepdim=True)
        of_blocks = sum((lines @ self.waves).square().sum(3) for lines in (blocks, blocks.mT))  # (B, h, w, 3)
        power = (of_blocks * is_even[..., None]).sum((1, 2))  # (B, 3)
        return power[:, 0], power[:, 1] + power[:, 2]


def pixel_extractor() -> Extractor:
    """Returns the extractor of ``PixelNetwork``, on the device of the images."""
    return Extractor("pixels", knows_classes=False, network=PixelNetwork())


class _OfPixels(FeatureMetric):
    of_network = False
    needs = ("pixels",)
    digits = 3

    def compute(self, images: ComparedImages) -> float | None:
        assert images.pixels is not None
        return self.measure(images.pixels)

    @abstractmethod
    def measure(self, images: ComparedImages) -> float | None:
        """Computes the metric of images in the features of ``PixelNetwork``."""


@metrics.register("pixel_fid")
class PixelFID(_OfPixels):
    """The Frechet distance of images of at most 16 pixels a side, in 64 principal components of the real ones.

    Source: Heusel et al., arXiv:1706.08500, without the network.
    """

    title = "pixel FID"

    def measure(self, images: ComparedImages) -> float:
        generated, real = (pixels[:, _FIRST_PIXEL:] for pixels in (images.features, images.real_features))
        components = torch.linalg.eigh(Statistics.from_features(real).covariance)[1][:, -_COMPONENTS:]
        return frechet_distance(*(Statistics.from_features(pixels @ components) for pixels in (generated, real)))


class _Spread(_OfPixels):
    """The standard deviation of a column in a class, mean over classes, of generated images relative to real ones."""

    higher_is_better = True
    column: int

    def measure(self, images: ComparedImages) -> float | None:
        assert images.real_labels is not None
        kinds = [(images.features, images.labels), (images.real_features, images.real_labels)]
        pairs = []  # deviations (generated, real) of each class
        for label in torch.unique(images.labels):
            values = [features[labels == label, self.column] for features, labels in kinds]
            if min(map(len, values)) >= 2:
                pairs.append(torch.stack([of_class.std() for of_class in values]))
        generated, real = torch.stack(pairs).mean(0).tolist() if pairs else (0.0, 0.0)
        return generated / real if real > 0 else None


@metrics.register("brightness_spread")
class BrightnessSpread(_Spread):
    """The spread of the mean grey value of images of a class; below 1 if generated images are too much alike."""

    title = "spread of brightness"
    column = _BRIGHTNESS


@metrics.register("contrast_spread")
class ContrastSpread(_Spread):
    """The spread of the contrast, the deviation of the grey pixels of an image; see ``brightness_spread``."""

    title = "spread of contrast"
    column = _CONTRAST


@metrics.register("weave")
class Weave(_OfPixels):
    """The power at a period of 2 pixels over that at 4, in even areas; see ``PixelNetwork``.

    Noise has 1, and photographs less. More than real images have is a pattern that the decoder of the tokenizer makes,
    which upsamples by 2. None if no image has an even area that is not plain.
    """

    title = "weave"

    def measure(self, images: ComparedImages) -> float | None:
        two, four = images.features[:, [_PERIOD_2, _PERIOD_4]].sum(0).tolist()
        return two / four if four > _PLAIN else None
