"""Classifiers of a data set: the Lightning module, its training, its accuracy, and the folder that stores it.

For small images, features of a classifier of the same data set are more informative than those of an ImageNet
classifier. Its folder holds the weights, the fingerprint of the data and the configuration. The small network takes
half a minute on two CPU cores. Images are read on demand. ``metrics`` and ``train_classifier`` use it; ``cas`` trains
the same module on other images.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset, Sampler

from maskgit_pl.checks import ImageSize, as_image_size
from maskgit_pl.data import Batch, ShardData, ShuffledStream, flip
from maskgit_pl.data.batches import make_loader
from maskgit_pl.data.order import Order, Rows
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.evaluation.options import SMALL_TRAINING, ClassifierConfig
from maskgit_pl.files import read_json, write_tensors, write_text
from maskgit_pl.networks.feature_networks import (
    CONFIG_FILE,
    FORMAT,
    MAX_CONFIG_BYTES,
    SMALL,
    WEIGHT_FILE,
    ClassifierSizes,
    FeatureOutput,
    create_classifier,
    describe_classifier,
)
from maskgit_pl.networks.weights import load_weights, read_tensors
from maskgit_pl.processes import available_cores
from maskgit_pl.training.stop_and_nonfinite import disable_sigterm_handler

__all__ = [
    "Accuracy",
    "Classifier",
    "TrainingImages",
    "check_classifier_folder",
    "check_named_classifier",
    "count_hits",
    "fit_classifier",
    "is_trained",
    "measure_accuracy",
    "obtain_classifier",
    "provide_classifier",
]

_TOP_CLASSES = 5  # k of the top-k accuracy
_WARM_UP = 0.25  # fraction of the steps in which the learning rate rises
_MIN_CYCLE_STEPS = 5  # torch divides by zero if the learning rate rises in a single step


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


@dataclass(frozen=True)
class TrainingImages:
    """Training images that are not those of a data folder, read on demand.

    Args:
        read: Reads images by index: (b,) int64 -> (b, C, H, W) uint8.
        shape: Shape (C, H, W) of an image.
        labels: (n,) int64, in [0, number of classes).
        class_names: Names of all classes, also of those without an image.

    Raises:
        ValueError: if the shape has not three numbers, there are no images, or a label is out of range.
    """

    read: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != 3:
            raise ValueError(f"the shape of training images must be (C, H, W), got {self.shape}")
        most = len(self.class_names) - 1
        if not len(self.labels) or not 0 <= int(self.labels.min()) <= int(self.labels.max()) <= most:
            raise ValueError(f"training images must be at least one, with labels in [0, {most}]")


def fit_classifier(
    data: ShardData | TrainingImages,
    *,
    chosen: Tensor | None = None,
    num_workers: int | None = None,
    config: ClassifierConfig = SMALL_TRAINING,
    on_step: Callable[[], object] = lambda: None,
    device: str | None = None,
) -> Classifier:
    """Trains a classifier; on the same machine, the result is bit-exact for equal data and configuration.

    Args:
        data: Real images, of which the train split is used, or other images.
        chosen: (n,) int64: indices of the samples of the train split to train on; None is all.
        num_workers: Number of processes that read images; None for the setting of the data, or 0 for other images.
        config: Network and training.
        on_step: Called after each training step, for a progress bar.
        device: Device such as cpu, cuda, cuda:1 or mps; None for a GPU if there is one.

    Returns:
        The classifier on the CPU, in evaluation mode.

    Raises:
        ValueError: if timm has no such network.
    """
    classifier = _create_classifier(data, config)
    # Batch i covers positions [i * batch, (i + 1) * batch) of a stream that is shuffled in each epoch.
    steps = [range(step * config.batch, (step + 1) * config.batch) for step in range(config.max_steps)]
    default_workers = data.config.num_workers if isinstance(data, ShardData) else 0
    batches = make_loader(
        _training_batches(data, config.seed, chosen),
        cast("Sampler[range]", steps),
        num_workers=default_workers if num_workers is None else num_workers,
        unreadable_budget=data.config.unreadable_budget if isinstance(data, ShardData) else 0.0,
    )
    with _quiet_lightning(), _set_threads(config.model):
        trainer = Trainer(
            max_steps=config.max_steps,
            max_epochs=-1,
            **_trainer_device(device),
            precision=config.precision,
            plugins=[LightningEnvironment()],  # one process, also below torchrun or Slurm
            callbacks=[LambdaCallback(on_train_batch_end=lambda *_: on_step())],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        disable_sigterm_handler(trainer)
        trainer.fit(classifier, train_dataloaders=batches)  # without validation
    return classifier.cpu().eval()


def _create_classifier(data: ShardData | TrainingImages, config: ClassifierConfig) -> Classifier:
    if isinstance(data, ShardData):
        channels, size, classes = data.config.in_channels, data.config.image_size, data.num_classes
    else:
        channels, size, classes = data.shape[0], as_image_size(data.shape[1:]), len(data.class_names)
    # The seed determines the initial weights; fork_rng restores the caller's generator.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        classifier = Classifier(channels, size, classes, config)
    classifier.to(memory_format=torch.channels_last)
    return classifier


def _training_batches(data: ShardData | TrainingImages, seed: int, chosen: Tensor | None) -> Dataset[Batch]:
    if isinstance(data, TrainingImages):
        return _ImageBatches(data, ShuffledStream(len(data.labels), seed))
    if chosen is None:
        return data.batches("train", ShuffledStream(data.summary.samples["train"], seed))
    return data.batches("train", _Selected(ShuffledStream(len(chosen), seed), chosen))


class _ImageBatches(Dataset[Batch]):
    """The batches of other images than those of a data folder."""

    def __init__(self, source: TrainingImages, order: Order) -> None:
        self.source = source
        self.order = order

    def __getitems__(self, positions: range) -> Batch:
        rows = self.order(positions)
        return Batch(self.source.read(rows.index), self.source.labels[rows.index], *rows)


@dataclass(frozen=True)
class _Selected:
    """An order of selected samples of a split: position p is sample ``chosen[order(p)]``."""

    order: Order
    chosen: Tensor

    def __call__(self, positions: range) -> Rows:
        rows = self.order(positions)
        return rows._replace(index=self.chosen[rows.index])


def _trainer_device(name: str | None) -> dict[str, Any]:
    """Returns the trainer arguments for one device."""
    if name is None:
        return {"devices": 1}  # Lightning chooses the accelerator
    device = torch.device(name)
    return {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Suppresses the trainer's messages about hardware and about loaders without workers, which are intended."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*")  # raised by Lightning's own code with torch 2.13
            yield
    finally:
        logger.setLevel(level)


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


def measure_accuracy(
    classifier: Classifier, data: ShardData, *, on_images: Callable[[int], object] = lambda count: None
) -> Accuracy:
    """Measures the accuracy of a classifier on the real val split.

    Args:
        classifier: The classifier, on its device.
        data: The real images.
        on_images: Called after each batch with its number of images.
    """
    right, count = torch.zeros(2, dtype=torch.int64), 0  # top-1, top-5
    with _set_threads(classifier.config.model):
        for batch in data.val_dataloader():
            images, labels = batch.content[batch.valid], batch.labels[batch.valid]
            if len(labels):
                right += count_hits(classifier.predict(images).logits, labels)
            count += len(labels)
            on_images(len(labels))
    return Accuracy.from_hits(right, count)


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


@contextmanager
def _set_threads(model: str) -> Iterator[None]:
    """Sets the number of CPU threads, which sums depend on in their last bits.

    The layers of the small network are too small to gain from more than one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if model == SMALL else available_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def obtain_classifier(
    folder: Path,
    data: ShardData,
    *,
    config: ClassifierConfig = SMALL_TRAINING,
    on_step: Callable[[], object] = lambda: None,
    device: str | None = None,
) -> Classifier:
    """Returns the classifier of a data set, read from ``folder`` if possible, else trained and stored there.

    With several ranks, the first one trains, and all read the same folder.

    Args:
        folder: Folder of the classifier, e.g. ``runs/DATA-classifier/small``.
        data: The real images. The stored classifier must match their fingerprint, image size and channels.
        config: Network and training, which the stored classifier must match, too.
        on_step: Called after each training step, for a progress bar.
        device: See ``fit_classifier``.

    Returns:
        The classifier on the CPU, in evaluation mode.

    Raises:
        ValueError: if timm has no such network, or the stored weights are damaged.
    """

    def train() -> None:
        # Training is short and not distributed; the other ranks wait for the first one.
        if rank_and_world()[0] == 0 and not is_trained(folder, data, config):
            classifier = fit_classifier(data, config=config, on_step=on_step, device=device)
            _save(folder, classifier, _key(data, config))

    on_all_ranks(train)
    # Every rank reads the file, also the one that has trained, so that all have the same weights.
    classifier = _create_classifier(data, config)
    load_weights(classifier.network, read_tensors(folder / WEIGHT_FILE), folder / WEIGHT_FILE)
    return classifier.eval()


def provide_classifier(
    folder: Path, data: ShardData, *, replaces: bool = False, on_step: Callable[[], object] = lambda: None
) -> None:
    """Trains the small classifier of a data set, unless the folder holds one, of any network and training.

    With several ranks, the first one decides and trains.

    Args:
        folder: Folder of the classifier.
        data: The real images. The stored classifier must match their fingerprint, classes, image size and channels.
        replaces: True to replace a classifier of other data, as in the folder that all runs of the data share.
        on_step: Called after each training step, for a progress bar.

    Raises:
        FileExistsError: if the folder holds another network, or a classifier of other data and not ``replaces``.
        ValueError: if the stored weights are damaged.
    """

    def is_missing() -> bool:
        if rank_and_world()[0] != 0 or _is_of(folder, data):
            return False
        _check_free(folder, replaces=replaces)
        return True

    if any(on_all_ranks(is_missing)):
        obtain_classifier(folder, data, on_step=on_step)


def is_trained(folder: Path, data: ShardData, config: ClassifierConfig) -> bool:
    """Returns True if ``folder`` holds the complete classifier of this data set and configuration."""
    return _read_key(folder) == _key(data, config) and (folder / WEIGHT_FILE).is_file()


def check_classifier_folder(folder: Path) -> None:
    """Checks that what a classifier replaces in a folder, ``config.json`` and its weights, is of a classifier.

    Raises:
        FileExistsError: if it is of another network.
    """
    key = _read_key(folder)
    if key is not None and key.get("format") != FORMAT:
        raise FileExistsError(f"{folder / CONFIG_FILE} is not of a classifier; name another folder with --out")


def check_named_classifier(folder: Path) -> None:
    """Checks that a folder that the user named holds a classifier, or that one can be trained there.

    Raises:
        FileExistsError: if it holds something else.
    """
    key = _read_key(folder)
    if key is None or key.get("format") != FORMAT:
        _check_free(folder, replaces=False)


def _save(folder: Path, classifier: Classifier, key: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The key is written last, and an old one is removed first: a process that is killed in between leaves no key, and
    # weights without a key are never read.
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    weights = {name: tensor.cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    write_tensors(folder / WEIGHT_FILE, weights)
    write_text(folder / CONFIG_FILE, json.dumps(key, indent=2) + "\n")


def _key(data: ShardData, config: ClassifierConfig) -> dict[str, Any]:
    """Returns the content of ``config.json``: sizes of the network, classes, data and training."""
    channels, size = data.config.in_channels, data.config.image_size
    sizes = ClassifierSizes(channels, size, data.num_classes, config.model, config.width)
    described = describe_classifier(sizes, data.class_names)
    return {**described, "data": data.summary.fingerprint, "training": asdict(config)}


def _read_key(folder: Path) -> Any:
    try:
        return read_json(folder / CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    except (FileNotFoundError, ValueError):
        # A damaged file is like a missing one: the classifier is trained again.
        return None


def _is_of(folder: Path, data: ShardData) -> bool:
    """Returns True if a folder holds a complete classifier of a data set, of any network and training."""
    key = _read_key(folder)
    if key is None or not isinstance(key.get("network"), dict) or not (folder / WEIGHT_FILE).is_file():
        return False
    own, free = _key(data, SMALL_TRAINING), ("model", "width")
    network = {**key["network"], **{name: own["network"][name] for name in free}}
    return {**key, "network": network, "training": own["training"]} == own


def _check_free(folder: Path, *, replaces: bool) -> None:
    """Checks that a classifier can be trained into a folder without the loss of what somebody else put there."""
    if replaces:
        key = _read_key(folder)
        is_free = key is None or key.get("format", FORMAT) == FORMAT
    else:
        is_free = not any((folder / name).exists() for name in (CONFIG_FILE, WEIGHT_FILE))
    if not is_free:
        raise FileExistsError(
            f"classifier {folder} must hold a classifier of these data, classes and image size, or no model, got "
            f"another {CONFIG_FILE} or {WEIGHT_FILE}; name an empty folder, or measure with a classifier of other data "
            f"as the feature network classifier={folder}"
        )
