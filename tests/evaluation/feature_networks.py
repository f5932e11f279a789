"""A feature network of a few numbers, images in memory and opened shards, for tests."""

from pathlib import Path

import torch
from torch import nn

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.evaluation.evaluator import FeatureMetrics
from maskgit_pl.evaluation.extractors import Extractor, ImageFeatures
from maskgit_pl.evaluation.metrics import ComparedImages, compute_metrics
from maskgit_pl.evaluation.reference import Reference
from maskgit_pl.networks.classifiers import FeatureOutput


class Few(nn.Module):
    """A convolution over 8 px images: 6 pooled features, 4 logits, 5 spatial features."""

    def __init__(self, channels: int = 1, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.convolution = nn.Conv2d(channels, 6, 3)
            self.head = nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> FeatureOutput:
        last = self.convolution(images.float() / 255).relu()
        features = last.mean((2, 3))
        return FeatureOutput(features, self.head(features), last.flatten(1)[:, :5])


def few(label: str = "classifier", *, channels: int = 1, seed: int = 0, knows_classes: bool = True) -> Extractor:
    return Extractor(label, knows_classes, Few(channels, seed).eval())


def pictures(count: int, *, channels: int = 1, seed: int = 0, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.rand(count, 1, 1, 1, generator=generator)
    return (torch.rand(count, channels, size, size, generator=generator) * brightness * 256).to(torch.uint8)


def distances(generated: ImageFeatures, reference: Reference) -> dict[str, float]:
    """The values of all metrics of network features that the images allow."""
    network = FeatureMetrics(Extractor(generated.label, generated.logits is not None, nn.Identity()), reference)
    labels = torch.zeros(len(generated), dtype=torch.int64)
    numbers = compute_metrics(network.choose(), ComparedImages(generated, reference, labels))
    return {name: value for name, value in numbers.items() if value is not None and name != "class_agreement"}


def open_shards(shards: Path | str, image_size: int = 8) -> ShardData:
    data = ShardData(ShardDataConfig(str(shards), image_size=image_size, in_channels=1, validation_batch=10))
    data.setup()
    return data
