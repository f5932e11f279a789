"""A classifier of the data at hand: the module that trains it, and its accuracy.

A classifier of the data set itself says more about small images than one of ImageNet. ``classifier_training`` trains
and keeps it; ``cas`` trains the same module on other images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from maskgit_pl.data import Batch, flip
from maskgit_pl.evaluation.classifier_config import SMALL_TRAINING, ClassifierConfig
from maskgit_pl.networks.classifier import ClassifierSizes, create_classifier
from maskgit_pl.networks.feature_network import FeatureOutput

__all__ = ["Accuracy", "Classifier", "count_hits"]

_TOP_CLASSES = 5  # of top-5
_WARM_UP = 0.25  # share of the steps in which the learning rate rises
_MIN_CYCLE_STEPS = 5  # steps; torch divides by zero where the rise is one step


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a classifier.

    Args:
        top1: Share of images whose likeliest class is theirs.
        top5: Share whose class is among the 5 likeliest, or among all where there are fewer.
        images: How many were classified.
    """

    top1: float
    top5: float
    images: int

    @classmethod
    def from_hits(cls, hits: Tensor, images: int) -> Accuracy:
        """Computes the accuracy from counts (2,) int64: images right, and right among the 5 likeliest."""
        top1, top5 = (hits.double() / images).tolist()
        return cls(top1, top5, images)


class Classifier(LightningModule):
    """Trains a network of ``networks.classifier``, and classifies with it.

    Args:
        in_channels: Channels of an image.
        image_size: Edge of the square images, in pixels.
        num_classes: Classes.
        config: Network and training.

    Raises:
        ValueError: timm has no such network.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        config: ClassifierConfig = SMALL_TRAINING,
    ) -> None:
        super().__init__()
        self.config = config
        self.network = create_classifier(
            ClassifierSizes(in_channels, image_size, num_classes, config.model, config.width)
        )

    def forward(self, images: Tensor) -> FeatureOutput:
        """Computes features (B, F) and logits (B, num_classes) of (B, C, H, W) uint8 images."""
        output: FeatureOutput = self.network(images)
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, config = batch.content, self.config
        if config.flip_probability > 0:
            images = flip(
                images,
                probability=config.flip_probability,
                seed=config.seed,
                index=batch.index,
                epoch=batch.epoch,
            )
        return F.cross_entropy(self(images).logits, batch.labels)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.config
        optimizer = AdamW(self.parameters(), lr=config.peak_rate, weight_decay=config.weight_decay, fused=True)
        steps = max(config.max_steps, _MIN_CYCLE_STEPS)
        schedule = OneCycleLR(optimizer, max_lr=config.peak_rate, total_steps=steps, pct_start=_WARM_UP)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.inference_mode()
    def predict(self, images: Tensor, *, batch_size: int = 500) -> FeatureOutput:
        """Computes features and logits of (n, C, H, W) uint8 images, in float32 on the CPU."""
        self.eval()
        outputs = [self(part.to(self.device)) for part in torch.split(images, batch_size)]
        features = torch.cat([output.features for output in outputs]).float().cpu()
        logits = torch.cat([output.logits for output in outputs]).float().cpu()
        return FeatureOutput(features, logits)


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns (2,) int64: how many labels are the likeliest class, and among the 5 likeliest."""
    hit = logits.topk(min(_TOP_CLASSES, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return torch.stack([hit[:, 0].sum(), hit.any(1).sum()])
