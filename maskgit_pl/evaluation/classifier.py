"""The Lightning module of classifiers, and their accuracy.

For small images, features of a classifier of the same data set are more informative than those of an ImageNet
classifier. ``classifier_training`` trains and stores it; ``cas`` trains the same module on other images.
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
from maskgit_pl.image_format import ImageSize
from maskgit_pl.networks.feature_network import FeatureOutput
from maskgit_pl.networks.feature_networks import ClassifierSizes, create_classifier

__all__ = ["Accuracy", "Classifier", "count_hits"]

_TOP_CLASSES = 5  # k of the top-k accuracy
_WARM_UP = 0.25  # fraction of the steps in which the learning rate rises
_MIN_CYCLE_STEPS = 5  # torch divides by zero if the learning rate rises in a single step


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a classifier.

    Args:
        top1: Fraction of images whose most likely class is correct, in [0, 1].
        top5: Fraction of images whose class is among the 5 most likely ones, or all if there are fewer classes.
        images: Number of classified images.
    """

    top1: float
    top5: float
    images: int

    @classmethod
    def from_hits(cls, hits: Tensor, images: int) -> Accuracy:
        """Computes the accuracy.

        Args:
            hits: (2,) int64: number of correct images, top-1 and top-5.
            images: Number of classified images.
        """
        top1, top5 = (hits.double() / images).tolist()
        return cls(top1, top5, images)


class Classifier(LightningModule):
    """A Lightning module that trains a network of ``networks.feature_networks``.

    Args:
        in_channels: Channels that the network sees, 1 or 3.
        image_size: Side of square images, or (height, width), in pixels.
        num_classes: Number of classes.
        config: Network and training.

    Raises:
        ValueError: if timm has no such network.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: ImageSize,
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
        # interval "step": the learning rate changes after every step, not after every epoch.
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
    """Counts the images whose label is the most likely class, and whose label is among the 5 most likely ones.

    Args:
        logits: (n, C) float.
        labels: (n,) int64.

    Returns:
        (2,) int64.
    """
    # (n, k) bool: entry (i, j) is True if the label of image i is its j-th most likely class.
    hit = logits.topk(min(_TOP_CLASSES, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return torch.stack([hit[:, 0].sum(), hit.any(1).sum()])
