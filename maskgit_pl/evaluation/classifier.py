"""Classifiers of a data set: training, accuracy, the folder that stores one, and the classification accuracy score.

For small images, features of a classifier of the same data set are more informative than those of an ImageNet
classifier; the small network takes half a minute on two CPU cores.

The classification accuracy score (CAS) trains the same module on generated images, and tests it on real ones.
It is low for a model whose images look good but cover only a part of each class. The same network, trained on
the same number of real images, gives the upper limit.

Source of CAS: Ravuri and Vinyals, arXiv:1905.10887; paper, Table 1.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset, Sampler

from maskgit_pl.checks import ImageSize, height_width, pixels_text
from maskgit_pl.data import Batch, ShardData, ShardDataConfig, ShuffledStream
from maskgit_pl.data.loader import make_loader
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.data.order import Order, Rows
from maskgit_pl.devices import find_device
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.evaluation.options import SMALL_TRAINING, CASConfig, ClassifierConfig
from maskgit_pl.files import check_writable, read_json, write_tensors, write_text
from maskgit_pl.networks.classifiers import (
    CONFIG_FILE,
    FORMAT,
    MAX_CONFIG_BYTES,
    SMALL,
    WEIGHT_FILE,
    ClassifierSizes,
    FrozenClassifier,
    check_model,
    create_classifier,
    describe_classifier,
    load_classifier,
)
from maskgit_pl.processes import Bars, available_cores, no_bars

_TOP_CLASSES = 5  # k of the top-k accuracy
_WARM_UP = 0.25  # fraction of the steps in which the learning rate rises
_MIN_CYCLE_STEPS = 5  # torch divides by zero if the learning rate rises in a single step
_VALIDATION_BATCH = 200  # images
_SHIPPED = Path(__file__).parents[1] / "models" / "fashion-mnist-judge"  # training differs between machines


def open_images(folder: Path, image_size: ImageSize, in_channels: int, *, num_workers: int = 0) -> ShardData:
    """Opens a data folder as images of one size: a side or (height, width) in pixels, and 1 or 3 channels."""
    data = ShardData(
        ShardDataConfig(
            str(folder),
            image_size=image_size,
            in_channels=in_channels,
            validation_batch=_VALIDATION_BATCH,
            num_workers=num_workers,
        )
    )
    data.setup()
    return data


@dataclass(frozen=True)
class LabelledImages:
    """Images that are not those of a data folder, read on demand."""

    read: Callable[[Any], Tensor]  # of a range of rows, or of (b,) int64 rows in any order: (b, C, H, W) uint8
    labels: Tensor  # (n,) int64: requested classes
    # Further columns of their rows in the ledger.
    remarks: Mapping[str, str | float | None] = field(default_factory=dict)
    tokens: Tensor | None = None  # (k, N) int64: tokens of the first k images; None if unknown


def fit_classifier(
    data: ShardData,
    source: LabelledImages | Tensor | None = None,
    *,
    config: ClassifierConfig = SMALL_TRAINING,
    on_step: Callable[[], object] = lambda: None,
    device: str | None = None,
) -> FrozenClassifier:
    """Trains a classifier; on the same machine, the result is bit-exact for equal data and configuration.

    Args:
        data: The classes, the size of images, and the train split.
        source: Images in place of the train split, or (n,) int64 indices of its samples to train on; None is all.
        config: Network and training.
        on_step: Called after each training step.
        device: Device such as cpu, cuda, cuda:1 or mps; None for a GPU if there is one.

    Returns:
        The classifier, on the CPU.
    """
    # The seed determines the initial weights; fork_rng restores the caller's generator.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = create_classifier(_sizes(data, config))
    target = torch.device(find_device(device))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch: untyped overload
    network.to(target)
    optimizer = AdamW(network.parameters(), lr=config.peak_rate, weight_decay=config.weight_decay, fused=True)
    cycle = max(config.max_steps, _MIN_CYCLE_STEPS)
    schedule = OneCycleLR(optimizer, max_lr=config.peak_rate, total_steps=cycle, pct_start=_WARM_UP)
    with use_threads(_num_threads(config.model)):
        for batch in _training_batches(data, source, config):
            with torch.autocast(target.type, torch.bfloat16, enabled=config.precision == "bf16-mixed"):
                loss = F.cross_entropy(network(batch.content.to(target)).logits, batch.labels.to(target))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
            optimizer.step()
            schedule.step()
            on_step()
    return FrozenClassifier(network.cpu(), data.class_names)


def _sizes(data: ShardData, config: ClassifierConfig) -> ClassifierSizes:
    of = data.config
    return ClassifierSizes(of.in_channels, of.image_size, len(data.class_names), config.model, config.width)


def _training_batches(
    data: ShardData, source: LabelledImages | Tensor | None, config: ClassifierConfig
) -> Iterator[Batch]:
    """Yields the batch of each step: positions of a stream of the samples that is shuffled in each epoch."""
    dataset: Dataset[Batch]
    if isinstance(source, LabelledImages):
        dataset = _ImageBatches(source, ShuffledStream(len(source.labels), config.seed))
    else:
        index = torch.arange(data.summary.samples["train"]) if source is None else source
        dataset = data.batches("train", _Selected(ShuffledStream(len(index), config.seed), index))
    yield from make_loader(
        dataset,
        cast(
            "Sampler[range]",
            [range(step * config.batch, (step + 1) * config.batch) for step in range(config.max_steps)],
        ),
        num_workers=data.config.num_workers,
        unreadable_budget=data.config.unreadable_budget,
    )


@dataclass(frozen=True)
class _ImageBatches(Dataset[Batch]):
    source: LabelledImages
    order: Order

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


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Sets the number of CPU threads, which sums depend on in their last bits, until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _num_threads(model: str) -> int:
    """Returns 1 for the small network, whose layers do not gain from more, else all cores."""
    return 1 if model == SMALL else available_cores()


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a classifier."""

    top1: float  # fraction of images whose most likely class is correct
    top5: float  # fraction whose class is among the 5 most likely ones, or all if there are fewer classes
    images: int


@torch.inference_mode()
def measure_accuracy(
    classifier: FrozenClassifier, data: ShardData, *, on_images: Callable[[int], object] = lambda count: None
) -> Accuracy:
    """Measures the accuracy of a classifier, on its device, on the real val split."""
    device = next(classifier.parameters()).device
    right, count = torch.zeros(2, dtype=torch.int64), 0  # top-1, top-5
    with use_threads(_num_threads(classifier.network.sizes.model)):
        for batch in data.val_dataloader():
            images, labels = batch.content[batch.valid], batch.labels[batch.valid]
            if len(labels):
                right += count_hits(classifier(images.to(device)).logits.float().cpu(), labels)
            count += len(labels)
            on_images(len(labels))
    top1, top5 = (right.double() / count).tolist()
    return Accuracy(top1, top5, count)


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts the images whose label is the most likely class, and is among the 5 most likely ones: (2,) int64."""
    # (n, k) bool: entry (i, j) is True if the label of image i is its j-th most likely class.
    hit = logits.topk(min(_TOP_CLASSES, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return torch.stack([hit[:, 0].sum(), hit.any(1).sum()])


def obtain_classifier(
    folder: Path,
    data: ShardData,
    *,
    config: ClassifierConfig | None = None,
    replaces: bool = False,
    on_step: Callable[[], object] = lambda: None,
    device: str | None = None,
) -> FrozenClassifier:
    """Returns the classifier of a data set that a folder holds; if the folder holds no model, trains and stores one.

    A default folder gets the classifier of the package if that is the one that would be trained. With several ranks,
    the first one trains, and all read the folder.

    Args:
        folder: Folder of the classifier, e.g. ``runs/DATA-classifier/small``.
        data: The real images. A stored classifier must have their fingerprint, classes, image size and channels.
        config: Network and training, which a stored classifier must have, too; None for any, and to train the
            small network.
        replaces: True to replace another classifier, as in a default folder; never another model.
        on_step: Called after each training step.
        device: See ``fit_classifier``.
    """

    def train() -> None:
        if rank_and_world()[0] == 0 and not _is_stored(folder, data, config, replaces=replaces):
            training = config or SMALL_TRAINING
            described = _describe(data, training)
            check_writable("classifier", folder, is_folder=True)  # before minutes of training
            if replaces and described == read_json(_SHIPPED / CONFIG_FILE):
                network = load_classifier(_SHIPPED).network
            else:
                network = fit_classifier(data, config=training, on_step=on_step, device=device).network
            folder.mkdir(parents=True, exist_ok=True)
            # An old configuration is removed first and the new one is written last: it never describes other weights.
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            write_tensors(
                folder / WEIGHT_FILE, {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
            )
            write_text(folder / CONFIG_FILE, json.dumps(described, indent=2) + "\n")

    on_all_ranks(train)
    # Every rank reads the files, also the one that has trained, so that all have the same weights.
    return load_classifier(folder)


def find_classifier(folder: Path, data: ShardData) -> Path:
    """Returns the folder of the classifier of a data set: the given one, or that of the package for its own data.

    Args:
        folder: Folder of the classifier, e.g. ``runs/DATA-classifier/small``.
        data: The real images. The classifier must have their fingerprint, classes, image size and channels.
    """
    for place in (folder, _SHIPPED):
        file = place / CONFIG_FILE
        if file.is_file() and _is_of(data, read_json(file, max_bytes=MAX_CONFIG_BYTES)):
            return place
    of, summary = data.config, data.summary
    words = ["maskgit", "train-classifier", "--data", str(of.path)]
    height, width = height_width(of.image_size)
    assert summary.images is not None  # of a data folder
    if {*summary.images.height, *summary.images.width} != {height, width} or height != width:
        words += ["--image-size", f"{height},{width}"]
    words += [] if of.in_channels == summary.channels else ["--channels", str(of.in_channels)]
    runs = folder.parent.parent
    words += [] if runs.absolute() == Path("runs").absolute() else ["--runs-folder", str(runs)]
    raise FileNotFoundError(
        f"classifier {folder} must be one of data {of.path} at the model's image size, got none; train it with "
        f"`{shlex.join(words)}`, or choose other networks with --features"
    )


def _is_of(data: ShardData, stored: Any) -> bool:
    """Returns True if a stored configuration is that of a classifier of the data, with any network and training."""
    with suppress(KeyError, TypeError, ValueError):  # of a file that this version has not written
        return bool(stored == _describe(data, ClassifierConfig(**stored["training"])))
    return False


def _is_stored(folder: Path, data: ShardData, config: ClassifierConfig | None, *, replaces: bool) -> bool:
    """Returns True if a folder holds a classifier, and False if it can be trained there; see ``obtain_classifier``."""
    file = folder / CONFIG_FILE
    # Weights without a configuration are those of a killed process.
    if not file.exists() and (replaces or not (folder / WEIGHT_FILE).exists()):
        return False
    stored = read_json(file, max_bytes=MAX_CONFIG_BYTES) if file.exists() else {}
    if _is_of(data, stored) if config is None else stored == _describe(data, config):
        return True
    if replaces and stored.get("format") == FORMAT:
        return False
    raise FileExistsError(
        f"classifier {folder} must hold a classifier of these data, classes, image size and settings, or no model, got "
        f"another {CONFIG_FILE} or {WEIGHT_FILE}; name an empty folder"
    )


def _describe(data: ShardData, config: ClassifierConfig) -> dict[str, Any]:
    """Returns the content of ``config.json``: sizes of the network, classes, data and training."""
    described = describe_classifier(_sizes(data, config), data.class_names)
    return {**described, "data": data.summary.fingerprint, "training": asdict(config)}


@dataclass(frozen=True)
class TrainedClassifier:
    """A stored classifier."""

    folder: Path
    accuracy: Accuracy  # on the real val split
    is_reused: bool  # True if the folder already held it, or the package has it
    num_classes: int


def train_classifier(  # noqa: PLR0913  # the flags of the command
    data: Path | str,
    *,
    config: ClassifierConfig | None = None,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    num_workers: int = 0,
    device: str | None = None,
    runs_folder: Path = Path("runs"),
    out: Path | None = None,
    bars: Bars = no_bars,
) -> TrainedClassifier:
    """Trains a classifier on the train split of a data folder, stores it, and measures it on the val split.

    A stored classifier of the same data and configuration is not trained again.

    Args:
        data: Data folder.
        config: Network and training, such as ``default_training("resnet18")``; None for any that the folder
            already holds, and to train the small network.
        image_size: Side of square images, or (height, width), in pixels; None for the size of the images, if
            all have the same.
        channels: 1 or 3; None for those of the images.
        num_workers: Number of processes that read images.
        device: Device such as ``cpu`` or ``cuda``; None for a GPU if there is one.
        runs_folder: Folder of all runs.
        out: Folder of the classifier, which must hold no other one; None for ``RUNS/DATA-classifier/MODEL``, in which
            a classifier of other data is replaced.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the data folder does not exist.
        FileExistsError: if the folder holds another model.
        ValueError: if ``image_size`` is None and the images have several sizes, the network is unknown, or
            the folder cannot be written.
    """
    summary = read_manifest_summary(Path(data))
    assert summary.images is not None  # of a data folder
    least, largest = zip(summary.images.height, summary.images.width, strict=True)
    if image_size is None and least != largest:
        raise ValueError(
            f"image_size must be given for data {data}, whose images have {pixels_text(least)} to "
            f"{pixels_text(largest)} pixels"
        )
    target = find_device(device)
    size = least if image_size is None else image_size
    source = open_images(Path(data), size, channels or summary.channels, num_workers=num_workers)
    training = config or SMALL_TRAINING
    folder = out or runs_folder / f"{Path(data).absolute().name}-classifier" / training.model
    check_writable("out", folder, is_folder=True)

    advance, is_reused = bars(f"training {training.model}", training.max_steps), True

    def on_step() -> None:
        nonlocal is_reused
        is_reused = False
        advance(1)

    classifier = obtain_classifier(folder, source, config=config, replaces=out is None, on_step=on_step, device=target)
    on_images = bars("real images", source.summary.samples["val"])
    accuracy = measure_accuracy(classifier.to(target), source, on_images=on_images)
    return TrainedClassifier(folder, accuracy, is_reused, source.num_classes)


def check_cas(config: CASConfig | None) -> None:
    """Checks that the network of the score exists, before anything is generated. None leaves the score out."""
    if config is not None and config.model != "auto":
        check_model(config.model)


def classification_accuracy(
    source: LabelledImages | Tensor,
    data: ShardData,
    config: CASConfig,
    *,
    on_step: Callable[[], object] = lambda: None,
    device: str | None = None,
) -> Accuracy:
    """Trains a classifier with ``fit_classifier``, and measures its accuracy on the real val split: the CAS.

    With several ranks, the first one trains and all get its result.
    """

    def measure() -> Accuracy | None:
        if rank_and_world()[0] != 0:
            return None
        classifier = fit_classifier(data, source, config=config, on_step=on_step, device=device)
        return measure_accuracy(classifier.to(find_device(device)), data)

    accuracy = on_all_ranks(measure)[0]
    assert accuracy is not None  # the result of the first rank
    return accuracy
