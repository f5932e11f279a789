"""The classifier of the data set at hand, which judges generated images: trained on the real training images, and kept.

A classifier of the data set itself says more about small images than one of ImageNet. The small network takes half a
minute on two CPU cores, and is kept beside the run, keyed by its data. The same training serves ``cas``, on other
images; all are read as they are needed.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset, Sampler

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.data import Batch, ShardData, ShuffledStream, flip
from maskgit_pl.data.batches import loader
from maskgit_pl.data.order import Order, Rows
from maskgit_pl.distributed import rank_and_world
from maskgit_pl.files import read_json, write_atomically, write_tensors
from maskgit_pl.networks.classifier import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    SMALL,
    WEIGHT_FILE,
    ClassifierSizes,
    create_classifier,
    describe_classifier,
)
from maskgit_pl.networks.feature_network import FeatureOutput
from maskgit_pl.networks.weight_file import load_weights, read_tensors

__all__ = [
    "Accuracy",
    "Classifier",
    "ClassifierConfig",
    "Judgement",
    "TrainingImages",
    "default_training",
    "is_trained",
    "measure_accuracy",
    "obtain_classifier",
    "train_classifier",
]

OnStep: TypeAlias = Callable[[], object]
_OFTEN_RIGHT = 5  # of top-5
_WARM_UP = 0.25  # share of the steps in which the learning rate rises
_LEAST_CYCLE = 5  # steps; torch divides by zero where the rise is one step


@dataclass(frozen=True)
class ClassifierConfig:
    """Network and training of the classifier.

    Args:
        width: Of the small network: channels of the first convolution.
        max_steps: Training steps.
        batch: Images of a step, at least 2.
        peak_rate: Learning rate at the peak of the one-cycle schedule.
        weight_decay: Of AdamW.
        seed: Of weights, order and flips.
        model: ``"small"``, or timm's name of a network, e.g. ``resnet18``.
        flip_probability: Chance that a training image is mirrored, left to right; not for digits and letters.
        precision: Lightning's word for the numbers that it computes in.

    Raises:
        ValueError: A number out of range.
    """

    width: int = 24
    max_steps: int = 900
    batch: int = 128
    peak_rate: float = 4e-3
    weight_decay: float = 0.02
    seed: int = 0
    model: str = SMALL
    flip_probability: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"

    def __post_init__(self) -> None:
        check_integer("classifier max_steps", self.max_steps, "[1, inf)")
        check_integer("classifier batch", self.batch, "[2, inf)")  # BatchNorm needs two
        check_number("classifier peak_rate", self.peak_rate, "(0, inf)")
        check_number("classifier flip_probability", self.flip_probability, "[0, 1]")


def default_training(model: str) -> ClassifierConfig:
    """What trains a network from random weights: the small one, or one of timm's, which takes smaller steps."""
    if model == SMALL:
        return ClassifierConfig()
    return ClassifierConfig(model=model, max_steps=1000, batch=64, peak_rate=1e-3, weight_decay=0.05)


@dataclass(frozen=True)
class Judgement:
    """What the classifier thinks of images.

    Args:
        classes: (n,) int64: the likeliest class of each.
        features: (n, F) float32: pooled features before the last layer.
        logits: (n, classes) float32; None where they were not kept.
    """

    classes: Tensor
    features: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Accuracy:
    """How often a classifier is right.

    Args:
        top1: Share of images whose likeliest class is theirs.
        top5: Share whose class is among the 5 likeliest, or among all where there are fewer.
        images: How many were classified.
    """

    top1: float
    top5: float
    images: int

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Accuracy:
        """Of logits (n, classes) and labels (n,) int64, n at least 1."""
        return cls.of_hits(_hits(logits, labels), len(labels))

    @classmethod
    def of_hits(cls, hits: Tensor, images: int) -> Accuracy:
        """(2,) int64: images that were right, and images whose class was among the 5 likeliest."""
        top1, top5 = (hits.double() / images).tolist()
        return cls(top1, top5, images)


@dataclass(frozen=True)
class TrainingImages:
    """Images that a classifier is trained on in place of a data folder's, read as they are needed.

    Args:
        take: Reads images by their numbers: (b,) int64 -> (b, C, H, H) uint8.
        shape: C, H, H.
        labels: (n,) int64.
        class_names: One for each class, whether there are images of it or not.

    Raises:
        ValueError: if the images are not square, there are none, or a label is not in [0, classes).
    """

    take: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.shape[1] != self.shape[2]:
            raise ValueError(f"images must be (C, H, H), got {self.shape}")
        most = len(self.class_names) - 1
        if not len(self.labels) or not 0 <= int(self.labels.min()) <= int(self.labels.max()) <= most:
            raise ValueError(f"images must be at least one, of classes 0 to {most}")

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> TrainingImages:
        """Returns images that are in memory: (n, C, H, H) uint8, with a label for each."""
        if images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"images must be uint8 with a label for each, got {images.dtype}, {tuple(images.shape)} and "
                f"{tuple(labels.shape)} labels"
            )
        return cls(images.__getitem__, tuple(images.shape[1:]), labels, class_names)


class _TakenBatches(Dataset[Batch]):
    def __init__(self, source: TrainingImages, order: Order) -> None:
        self.source = source
        self.order = order

    def __getitems__(self, positions: range) -> Batch:
        rows = self.order(positions)
        return Batch(self.source.take(rows.index), self.source.labels[rows.index], *rows)


@dataclass(frozen=True)
class _Selected:
    """An order over some samples of a split: position p is sample ``chosen[order(p)]``."""

    order: Order
    chosen: Tensor

    def __call__(self, positions: range) -> Rows:
        rows = self.order(positions)
        return rows._replace(index=self.chosen[rows.index])


class Classifier(LightningModule):
    """Trains a network of ``networks.classifier``, and judges with it.

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
        config: ClassifierConfig = ClassifierConfig(),  # frozen
    ) -> None:
        super().__init__()
        self.config = config
        self.network = create_classifier(
            ClassifierSizes(in_channels, image_size, num_classes, config.model, config.width)
        )

    def forward(self, images: Tensor) -> FeatureOutput:
        """(B, C, H, W) uint8 -> features (B, F) and logits (B, num_classes)."""
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
        steps = max(config.max_steps, _LEAST_CYCLE)
        schedule = OneCycleLR(optimizer, max_lr=config.peak_rate, total_steps=steps, pct_start=_WARM_UP)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.inference_mode()
    def judge(self, images: Tensor, *, batch_size: int = 500) -> Judgement:
        """Classes, features and logits of (n, C, H, W) uint8 images, on the CPU."""
        self.eval()
        outputs = [self(part.to(self.device)) for part in torch.split(images, batch_size)]
        features = torch.cat([output.features for output in outputs]).float().cpu()
        logits = torch.cat([output.logits for output in outputs]).float().cpu()
        return Judgement(logits.argmax(1), features, logits)


def obtain_classifier(
    folder: Path,
    data: ShardData,
    *,
    config: ClassifierConfig = ClassifierConfig(),  # frozen
    on_step: OnStep = lambda: None,
    device: str | None = None,
) -> Classifier:
    """The classifier of some data: read from ``folder``, or trained and kept there where it is not.

    Of several ranks the first one trains; the folder must be the same for all.

    Args:
        folder: E.g. ``runs/RUN/classifier``.
        data: The real images; its fingerprint, image size and channels, and ``config``, are the key.
        config: Network and training.
        on_step: Called after each training step, for a progress bar.
        device: As of ``train_classifier``.

    Returns:
        On the CPU, in evaluation mode.

    Raises:
        ValueError: if timm has no such network, or the weights that were kept are damaged.
    """
    rank, world_size = rank_and_world()
    if rank == 0 and not is_trained(folder, data, config):
        classifier = train_classifier(data, config=config, on_step=on_step, device=device)
        _save(folder, classifier, _key(data, config))
    if world_size > 1:
        dist.barrier()
    classifier = _new(data, config)
    load_weights(classifier.network, read_tensors(folder / WEIGHT_FILE), folder / WEIGHT_FILE)
    return classifier.eval()


def is_trained(folder: Path, data: ShardData, config: ClassifierConfig) -> bool:
    """Whether ``folder`` holds the finished classifier of these data and this configuration."""
    return _read_key(folder) == _key(data, config) and (folder / WEIGHT_FILE).is_file()


def train_classifier(
    data: ShardData | TrainingImages,
    *,
    chosen: Tensor | None = None,
    num_workers: int | None = None,
    config: ClassifierConfig = ClassifierConfig(),  # frozen
    on_step: OnStep = lambda: None,
    device: str | None = None,
) -> Classifier:
    """Trains on the train split, or on other images; equal for equal data and configuration on the same machine.

    Args:
        data: Real images, or others.
        chosen: (n,) int64: numbers of the samples of the train split to train on; None is all.
        num_workers: Processes that read; None is as many as the data say, 0 for others.
        config: Network and training.
        on_step: Called after each training step, for a progress bar.
        device: cpu, cuda, cuda:1, mps ...; None for a GPU if there is one.

    Returns:
        On the CPU, in evaluation mode.

    Raises:
        ValueError: timm has no such network.
    """
    classifier = _new(data, config)
    steps = [range(step * config.batch, (step + 1) * config.batch) for step in range(config.max_steps)]
    own_workers = data.config.num_workers if isinstance(data, ShardData) else 0
    batches = loader(
        _training_batches(data, config.seed, chosen),
        cast("Sampler[range]", steps),
        num_workers=own_workers if num_workers is None else num_workers,
        unreadable_budget=data.config.unreadable_budget if isinstance(data, ShardData) else 0.0,
    )
    with _quiet_lightning(), _threads(config.model):
        trainer = Trainer(
            max_steps=config.max_steps,
            max_epochs=-1,
            **_on_device(device),
            precision=config.precision,
            plugins=[LightningEnvironment()],  # this process alone, whatever started it
            callbacks=[_OnStep(on_step)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(classifier, train_dataloaders=batches)  # without validation
    return classifier.cpu().eval()


def measure_accuracy(
    classifier: Classifier, data: ShardData, *, on_images: Callable[[int], object] = lambda count: None
) -> Accuracy:
    """How often a classifier is right on the real val split.

    Args:
        classifier: On the device that it is to work on.
        data: The real images.
        on_images: Told how many more are done, for a progress bar.
    """
    right, count = torch.zeros(2, dtype=torch.int64), 0  # top-1, top-5
    with _threads(classifier.config.model):
        for batch in data.val_dataloader():
            judgement, labels = classifier.judge(batch.content[batch.valid]), batch.labels[batch.valid]
            assert judgement.logits is not None
            if len(labels):
                right += _hits(judgement.logits, labels)
            count += len(labels)
            on_images(len(labels))
    return Accuracy.of_hits(right, count)


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns (2,) int64: how many labels are the likeliest class, and among the 5 likeliest."""
    hit = logits.topk(min(_OFTEN_RIGHT, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return torch.stack([hit[:, 0].sum(), hit.any(1).sum()])


class _OnStep(Callback):
    def __init__(self, on_step: Callable[[], object]) -> None:
        self.on_step = on_step

    def on_train_batch_end(self, *_: Any) -> None:
        self.on_step()


def _new(data: ShardData | TrainingImages, config: ClassifierConfig) -> Classifier:
    if isinstance(data, ShardData):
        channels, side, classes = data.config.in_channels, data.config.image_size, data.num_classes
    else:
        channels, side, classes = data.shape[0], data.shape[1], len(data.class_names)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        classifier = Classifier(channels, side, classes, config)
    classifier.to(memory_format=torch.channels_last)
    return classifier


def _training_batches(data: ShardData | TrainingImages, seed: int, chosen: Tensor | None) -> Dataset[Batch]:
    if isinstance(data, TrainingImages):
        return _TakenBatches(data, ShuffledStream(len(data.labels), seed))
    if chosen is None:
        return data.batches("train", ShuffledStream(data.summary.samples["train"], seed))
    return data.batches("train", _Selected(ShuffledStream(len(chosen), seed), chosen))


def _on_device(name: str | None) -> dict[str, Any]:
    """Lightning's arguments for one device by name."""
    if name is None:
        return {"devices": 1}
    device = torch.device(name)
    return {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}


def _key(data: ShardData, config: ClassifierConfig) -> dict[str, Any]:
    """What ``config.json`` says: how to read the network, and what it was trained on and how."""
    sizes = ClassifierSizes(
        data.config.in_channels, data.config.image_size, data.num_classes, config.model, config.width
    )
    described = describe_classifier(sizes, data.class_names)
    return {**described, "data": data.summary.fingerprint, "training": asdict(config)}


def _read_key(folder: Path) -> Any:
    try:
        return read_json(folder / CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    except (FileNotFoundError, ValueError):
        return None


def _save(folder: Path, classifier: Classifier, key: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # no key from here to the end, so half of it is never read
    weights = {name: tensor.cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    write_tensors(folder / WEIGHT_FILE, weights)
    with write_atomically(folder / CONFIG_FILE) as file:
        file.write((json.dumps(key, indent=2) + "\n").encode())


@contextmanager
def _threads(model: str) -> Iterator[None]:
    """As many threads of a CPU whatever started the process, so that sums are the same ones.

    Layers as small as the small network's gain nothing from more than one, and lose much beside other work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if model == SMALL else _cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    """Of the machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
