"""The classifier that judges generated images: a small network trained on the real training images.

A classifier of the data set itself says more about small images than one of ImageNet. It takes half a minute on two
CPU cores, and is kept beside the run, keyed by its data.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from maskgit_pl.data import Batch, ShardData, to_unit_range
from maskgit_pl.files import write_atomically

__all__ = ["Classifier", "ClassifierConfig", "Judgement", "obtain_classifier", "train_classifier"]

_WEIGHTS, _KEY = "model.safetensors", "config.json"
_SMALLEST_MAP = 4  # pixels along an edge of the last feature map, at most


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes and training of the classifier.

    Args:
        width: Channels of the first convolution; each further one has twice as many, up to 4 times as many.
        max_steps: Training steps.
        batch: Images of a step.
        peak_rate: Learning rate at the peak of the one-cycle schedule.
        weight_decay: Of AdamW.
        seed: Of weights and order.
    """

    width: int = 24
    max_steps: int = 900
    batch: int = 128
    peak_rate: float = 4e-3
    weight_decay: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Judgement:
    """What the classifier thinks of images.

    Args:
        classes: (n,) int64: the likeliest class of each.
        features: (n, D) float32: pooled features before the last layer.
    """

    classes: Tensor
    features: Tensor


class Classifier(LightningModule):
    """Space to depth, convolutions with BatchNorm and max-pooling down to 4 x 4, a mean over places, a linear layer.

    Args:
        in_channels: Channels of an image.
        image_size: Edge of the square images, in pixels.
        num_classes: Classes.
        config: Sizes and training.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        config: ClassifierConfig = ClassifierConfig(),  # frozen
    ) -> None:
        super().__init__()
        self.config = config
        halvings = max(0, math.ceil(math.log2(image_size / 2 / _SMALLEST_MAP)))
        widths = [config.width * 2 ** min(level, 2) for level in range(halvings + 1)]
        inputs = [4 * in_channels, *widths[:-1]]
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(zip(inputs, widths, strict=True)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if level < halvings else []
        self.features = nn.Sequential(nn.PixelUnshuffle(2), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) uint8 -> features (B, D) float32 and logits (B, num_classes) float32."""
        normal = (to_unit_range(images) - 0.5) / 0.25
        height, width = images.shape[-2:]
        even = F.pad(normal, (0, width % 2, 0, height % 2))
        features: Tensor = self.features(even.contiguous(memory_format=torch.channels_last))  # twice as fast on a CPU
        return features, self.head(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _, logits = self(batch.content)
        return F.cross_entropy(logits, batch.labels)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.config
        optimizer = AdamW(self.parameters(), lr=config.peak_rate, weight_decay=config.weight_decay, fused=True)
        schedule = OneCycleLR(optimizer, max_lr=config.peak_rate, total_steps=config.max_steps, pct_start=0.25)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.inference_mode()
    def judge(self, images: Tensor, *, batch_size: int = 500) -> Judgement:
        """Classes and features of (n, C, H, W) uint8 images, on the CPU."""
        self.eval()
        parts = torch.split(images, batch_size)
        outputs = [self(part.to(self.device)) for part in parts]
        features, logits = (torch.cat(output).cpu() for output in zip(*outputs, strict=True))
        return Judgement(logits.argmax(1), features)


def obtain_classifier(
    folder: Path,
    data: ShardData,
    *,
    config: ClassifierConfig = ClassifierConfig(),  # frozen
    on_step: Callable[[], object] = lambda: None,
) -> Classifier:
    """The classifier of some data: read from ``folder``, or trained and kept there where it is not.

    Args:
        folder: E.g. ``runs/RUN/classifier``.
        data: The real images; its fingerprint, image size and channels, and ``config``, are the key.
        config: Sizes and training.
        on_step: Called after each training step, for a progress bar.
    """
    key = {
        "data": data.summary.fingerprint,
        "image_size": data.image_size,
        "in_channels": data.in_channels,
        "num_classes": data.num_classes,
        **asdict(config),
    }
    classifier = _new(data, config)
    if _read_key(folder) == key and (folder / _WEIGHTS).is_file():
        classifier.load_state_dict(load_file(folder / _WEIGHTS))
        return classifier.eval()
    classifier = train_classifier(data, config=config, on_step=on_step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _KEY).unlink(missing_ok=True)  # from here to the end there is no key, so half of it is never read
    save_file({name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}, folder / _WEIGHTS)
    with write_atomically(folder / _KEY) as file:
        file.write((json.dumps(key, indent=2) + "\n").encode())
    return classifier


def train_classifier(
    data: ShardData,
    *,
    config: ClassifierConfig = ClassifierConfig(),  # frozen
    on_step: Callable[[], object] = lambda: None,
) -> Classifier:
    """Trains on the train split; equal for equal data and configuration on the same machine."""
    classifier = _new(data, config)
    stream = ShardData(
        data.path,
        image_size=data.image_size,
        in_channels=data.in_channels,
        global_batch=config.batch,
        max_batch_per_device=config.batch,
        num_workers=data.num_workers,
        seed=config.seed,
    )
    with _quiet_lightning(), _one_thread():
        trainer = Trainer(
            max_steps=config.max_steps,
            max_epochs=-1,
            devices=1,
            callbacks=[_OnStep(on_step)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        stream.setup()
        stream.trainer = trainer  # asked for the step
        trainer.fit(classifier, train_dataloaders=stream.train_dataloader())  # without validation
    return classifier.cpu().eval()


class _OnStep(Callback):
    def __init__(self, on_step: Callable[[], object]) -> None:
        self.on_step = on_step

    def on_train_batch_end(self, *_: Any) -> None:
        self.on_step()


def _new(data: ShardData, config: ClassifierConfig) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        classifier = Classifier(data.in_channels, data.image_size, data.num_classes, config)
    classifier.to(memory_format=torch.channels_last)
    return classifier


def _read_key(folder: Path) -> Any:
    try:
        return json.loads((folder / _KEY).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU: layers this small gain nothing from more threads, lose much beside other work, and sum in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without the trainer's remarks about hardware and about loaders without workers, which are meant here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*")  # of Lightning's own code, with torch 2.13
            yield
    finally:
        logger.setLevel(level)
