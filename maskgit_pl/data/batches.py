"""Whole batches of images or tokens at some positions of the stream; uint8 or integer until they are on the device."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskgit_pl.data.order import Order, Rows
from maskgit_pl.errors import INTERNAL_ERROR, DataWorkerError, RunError, exit_code_of
from maskgit_pl.interruption import ignore_job_signals
from maskgit_pl.randomness import random_bits, random_uniform
from maskgit_pl.shards.images import Crop, UnreadableImageError, check_crop, decode_image, load_square_into
from maskgit_pl.shards.reader import ShardReader
from maskgit_pl.shards.tokens import TokenReader
from maskgit_pl.shards.unreadable import MAX_IN_A_ROW, Unreadable, UnreadableImages

__all__ = ["Batch", "ImageBatches", "StepLoader", "TokenBatches", "draw_crops", "flip", "make_loader"]


_SIGNAL_SECONDS = 1.0  # after which the signal that a process has ended has come
_NONE_REPLACED = torch.tensor(-1)


class Batch(NamedTuple):
    """The samples of one rank for one micro-batch.

    Args:
        content: Images (B, C, H, W) uint8, or tokens (B, N) int64.
        labels: (B,) int64, in [0, num_classes).
        index: (B,) int64, number of the sample in its split.
        epoch: (B,) int64, how often the stream had gone through the split before.
        position: (B,) int64, place in the stream: step * global batch + slot.
        valid: (B,) bool; False for a row that only fills up the last validation batch.
        replacement: (B,) int64, the sample that is shown, with its label, because ``index`` cannot be read; -1 if the
            sample itself is shown. All that is drawn at random for a sample depends on ``index``.
    """

    content: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    epoch: Tensor
    position: Tensor
    valid: Tensor
    replacement: Tensor = _NONE_REPLACED


class ImageBatches(Dataset[Batch]):
    """Whole batches of images, decoded and cropped in the worker.

    Args:
        reader: The split.
        order: How positions become samples.
        image_size: Side of the images in pixels.
        in_channels: 1 or 3.
        crop: ``"center"``, or ``"random"``: another crop of each sample in each epoch.
        seed: Decides the random crops.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        *,
        image_size: int,
        in_channels: int,
        crop: Crop = "center",
        seed: int = 0,
    ) -> None:
        check_crop(crop)
        self.reader = reader
        self.order = order
        self.image_size = image_size
        self.in_channels = in_channels
        self.crop = crop
        self.seed = seed

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; content is (B, C, image_size, image_size) uint8, channels-last."""
        rows = self.order(positions)
        side, count = self.image_size, len(self.reader)
        content = torch.empty((len(positions), side, side, self.in_channels), dtype=torch.uint8).permute(0, 3, 1, 2)
        tries = [
            self._load(content[row], index, crop)
            for row, (index, crop) in enumerate(
                zip(rows.index.tolist(), draw_crops(rows, self.crop, self.seed), strict=True)
            )
        ]
        passed_over = torch.tensor(tries)
        shown = (rows.index + passed_over) % count
        labels = torch.from_numpy(self.reader.labels(shown.numpy()))
        return Batch(content, labels, *rows, replacement=shown.masked_fill(passed_over == 0, -1))

    def explain(self, index: int) -> Unreadable:
        """Reads an image that could not be read once more and returns what is wrong with it."""
        name = self.reader.name(index)
        try:
            decode_image(self.reader.read(index), channels=self.in_channels, name=name)
        except UnreadableImageError as error:
            text = str(error).removeprefix(f"image {name}: ")
            return Unreadable(index, self.reader.shard(index), name, error.reason, text)
        return Unreadable(index, self.reader.shard(index), name, "damaged", "it could be read the second time")

    def _load(self, place: Tensor, index: int, crop: tuple[float, float] | None) -> int:
        """Fills ``place`` with the first readable image from ``index`` on; returns how many it passed over.

        After MAX_IN_A_ROW of them, or all, it is left black, and ``UnreadableImages`` ends the run.
        """
        count = len(self.reader)
        most = min(MAX_IN_A_ROW, count)
        for passed_over in range(most):
            number = (index + passed_over) % count
            try:
                load_square_into(place, self.reader.read(number), crop=crop, name=f"sample {number}")
            except UnreadableImageError:
                continue
            return passed_over
        place.zero_()
        return most


def draw_crops(rows: Rows, crop: Crop, seed: int) -> Sequence[tuple[float, float] | None]:
    """Returns the crop of each row: None for the centre, else (top, left) in (0, 1), from (seed, index, epoch)."""
    if crop == "center":
        return [None] * len(rows.index)
    places = random_uniform("crop", seed=seed, index=rows.index, epoch=rows.epoch, count=2)
    return [(top, left) for top, left in places.tolist()]


class TokenBatches(Dataset[Batch]):
    """Whole batches of tokens, one gather from the memory-mapped store each.

    Args:
        reader: The split of the store.
        order: How positions become samples.
        seed: Decides which view of a sample an epoch shows, where the store has several.
    """

    def __init__(self, reader: TokenReader, order: Order, *, seed: int = 0) -> None:
        self.reader = reader
        self.order = order
        self.seed = seed

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; content is (B, N) int64."""
        rows = self.order(positions)
        tokens, labels = self.reader.read(rows.index.numpy(), self._views(rows))
        none_replaced = torch.full_like(rows.index, -1)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), *rows, replacement=none_replaced)

    def _views(self, rows: Rows) -> npt.NDArray[np.int64] | int:
        """Returns the view of each row, a function of (seed, index, epoch); 0 if there is only one."""
        if self.reader.views == 1:
            return 0
        words = random_bits("view", seed=self.seed, index=rows.index, epoch=rows.epoch)[:, 0]
        return (words % self.reader.views).numpy()


class _WorkerFailure(NamedTuple):
    """An error of a worker in the place of its batch."""

    error: Exception


class _ErrorForwardingDataset(Dataset[Any]):
    """A dataset in a worker, whose errors reach the training process as they are.

    Torch would turn a user's error into one whose text is a traceback.
    """

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self.dataset = dataset

    def __getitems__(self, positions: range) -> Batch | _WorkerFailure:
        try:
            return cast("Batch", self.dataset.__getitems__(positions))  # type: ignore[attr-defined]  # all of ours do
        except Exception as error:
            if _is_internal(error):
                raise
            return _WorkerFailure(error)


def _is_internal(error: Exception) -> bool:
    return not isinstance(error, RunError) and exit_code_of(error) == INTERNAL_ERROR


class _WorkerDeathHandler:
    """A handler of SIGCHLD that keeps what torch's raises, until the next batch is asked for.

    Torch raises it wherever the training process is at that moment, perhaps in code that makes another error of it.
    """

    error: ClassVar[RuntimeError | None] = None

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            _WorkerDeathHandler.error = error

    @classmethod
    def watch(cls) -> None:
        """Takes the place of torch's handler, once there is one."""
        handler = signal.getsignal(signal.SIGCHLD)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and callable(handler) and not isinstance(handler, cls):
            signal.signal(signal.SIGCHLD, cls(handler))


@contextmanager
def _translate_worker_errors() -> Iterator[None]:
    """Turns what torch says when a worker was killed into ``DataWorkerError``."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RunError):
            raise
        if not str(error).startswith("DataLoader worker"):
            deadline = time.monotonic() + _SIGNAL_SECONDS
            while _WorkerDeathHandler.error is None and time.monotonic() < deadline:
                time.sleep(0.01)  # a connection that is gone is noticed before the signal
        killed, _WorkerDeathHandler.error = _WorkerDeathHandler.error, None
        if killed is None and not str(error).startswith("DataLoader worker"):
            raise
        raise _worker_error(killed or error) from error


def _worker_error(error: Exception) -> DataWorkerError:
    reason = " ".join(str(error).split()).rstrip(".")
    return DataWorkerError(
        f"a process that loads data was killed, most likely because memory ran out ({reason}); use fewer of them "
        "(data.num_workers, or --num-workers) or a smaller batch (data.max_batch_per_device, or --batch-size), then "
        "run the same command again to resume"
    )


def _collate(batch: Any) -> Any:
    """Collation of what is a batch already."""
    return batch


class StepLoader(DataLoader[Batch]):
    """A loader whose place is the Trainer's step; having a state tells Lightning that it can resume in mid-epoch.

    ``unreadable`` counts what could not be read, in the process that iterates.
    """

    unreadable: UnreadableImages | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # any iterator serves
        if not self.num_workers:
            return self._count_unreadable(
                super().__iter__()
            )  # here, not at the first next(): the sampler asks for the step now
        with _translate_worker_errors():
            batches = super().__iter__()
        _WorkerDeathHandler.watch()
        return self._count_unreadable(self._from_workers(batches))

    def _from_workers(self, batches: Iterator[Batch | _WorkerFailure]) -> Iterator[Batch]:
        while True:
            with _translate_worker_errors():
                if _WorkerDeathHandler.error is not None:
                    raise _WorkerDeathHandler.error
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, _WorkerFailure):
                raise batch.error
            yield batch

    def _count_unreadable(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.unreadable is not None:
                self.unreadable.add(batch.index.numpy(), batch.replacement.numpy())
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the sampler asks the Trainer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def make_loader(
    dataset: Dataset[Batch],
    order: Sampler[range],
    *,
    num_workers: int,
    pin_memory: bool = False,
    unreadable_budget: float = 0.0,
) -> StepLoader:
    """A loader of whole batches: the order gives ranges of positions, the dataset the batch at them.

    Args:
        dataset: Of images or tokens; ``__getitems__(range)`` gives a batch.
        order: The ranges of positions.
        num_workers: Processes that read; 0 reads in this one.
        pin_memory: See ``torch.utils.data.DataLoader``.
        unreadable_budget: Share of unreadable images that may be replaced; see ``UnreadableImages``. None by default.
    """
    made = StepLoader(
        _ErrorForwardingDataset(dataset) if num_workers else dataset,
        batch_sampler=cast("Sampler[list[int]]", order),  # __getitems__ takes a range where others take a list
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_job_signals,
    )
    if isinstance(dataset, ImageBatches):
        made.unreadable = UnreadableImages(dataset.explain, num_samples=len(dataset.reader), budget=unreadable_budget)
    return made


def flip(images: Tensor, *, probability: float, seed: int, index: Tensor, epoch: Tensor) -> Tensor:
    """Mirrors a share of the images, left to right; which ones depends only on (seed, index, epoch).

    Args:
        images: (B, C, H, W), any type, any device.
        probability: Share that is mirrored, in [0, 1].
        seed: Of the run.
        index: (B,) int64, of the batch.
        epoch: (B,) int64, of the batch.

    Returns:
        (B, C, H, W) of the same type.
    """
    chosen = random_uniform("flip", seed=seed, index=index, epoch=epoch)[:, 0] < probability
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)
