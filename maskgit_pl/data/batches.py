"""Datasets and the loader of whole batches of images or tokens, and the base class of the data modules.

Batches are drawn by their positions in the training stream. The position of a data module is the Trainer's step, so a
resumed run continues there. Images stay uint8 until they are on the device.

Used by ``ShardData``, ``IndexedDataModule``, ``tokenize`` and the evaluation.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskgit_pl.checks import ImageSize, height_width
from maskgit_pl.data.augmentations import CENTER, Augmentations
from maskgit_pl.data.images import Place, UnreadableImageError, decode_image, fit_image
from maskgit_pl.data.order import EvalBatchSampler, Order, Rows, TrainBatchSampler
from maskgit_pl.data.reader import ShardReader
from maskgit_pl.data.samples import MAX_IN_A_ROW, Unreadable, UnreadableImages
from maskgit_pl.data.token_store import TokenReader
from maskgit_pl.data.vectors import VectorReader
from maskgit_pl.errors import INTERNAL_ERROR, DataWorkerError, RunError, exit_code_of
from maskgit_pl.masking import Draws
from maskgit_pl.processes import ignore_job_signals
from maskgit_pl.randomness import random_bits, random_uniform

__all__ = [
    "Batch",
    "ImageBatches",
    "StepDataModule",
    "StepLoader",
    "TokenBatches",
    "check_batch",
    "flip",
    "make_loader",
    "stack_batch",
]

_DEATH_SECONDS = 1.0  # longest time in which a process ends after its connections
_NONE_REPLACED = torch.tensor(-1)


class Batch(NamedTuple):
    """The samples of one rank for one micro-batch.

    Args:
        content: Images (B, C, H, W) uint8, or tokens (B, N) int64.
        labels: (B,) int64, in [0, num_classes).
        index: (B,) int64, number of each sample in its split. Random numbers of a sample depend on it.
        epoch: (B,) int64, number of earlier passes of the stream through the split.
        position: (B,) int64, position in the stream: step * global batch + slot.
        valid: (B,) bool; False for a row that only fills up the last validation batch.
        replacement: (B,) int64, number of the sample that is shown, with its label, in place of an unreadable one; -1
            if the sample itself is shown.
        vectors: (B, C) float32, vector of each sample shown; None if the data module reads no vectors.
        draws: The random draws of a training step for these samples; None before the module has made them.
    """

    content: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    epoch: Tensor
    position: Tensor
    valid: Tensor
    replacement: Tensor = _NONE_REPLACED
    vectors: Tensor | None = None
    draws: Draws | None = None

    def vectors_for(self, condition_dim: int) -> Tensor | None:
        """Returns the vectors for a network with conditioning vectors of a given size.

        Args:
            condition_dim: Size C of the vectors of the network; 0 for a network without vectors.

        Returns:
            (B, C) float32; None for a network without vectors.

        Raises:
            ValueError: if the batch has no vectors, or vectors of another size.
        """
        found = 0 if self.vectors is None else self.vectors.shape[1]
        if condition_dim not in (0, found):
            raise ValueError(
                f"condition_dim of the network must be {found}, the size of the vectors of the data, got "
                f"{condition_dim}; set data.vectors: true, or give the data a vector for each image"
            )
        return self.vectors if condition_dim else None


def stack_batch(samples: Sequence[tuple[Tensor, int]], rows: Rows) -> Batch:
    """Returns the batch of images (C, H, W) uint8 and their labels, none of which replaces another."""
    images, labels = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), *rows, replacement=torch.full_like(rows.index, -1))


def check_batch(batch: Batch, *, shape: tuple[int, ...]) -> None:
    """Checks that a batch has the samples that a module was built for.

    Args:
        batch: The batch that the Trainer passes.
        shape: Shape of the content of each sample: (C, H, W) of images, or (N,) of tokens.

    Raises:
        TypeError: if it is no ``Batch``.
        ValueError: if the samples have another shape.
    """
    if not isinstance(batch, Batch):
        raise TypeError(
            "the data must be a data module of maskgit_pl.data, whose batches have the indices of their samples, got "
            f"batches of the type {type(batch).__name__}; use IndexedDataModule(IndexedDataset(dataset, ...))"
        )
    if tuple(batch.content.shape[1:]) != shape:
        kinds = {1: "(tokens,)", 3: "(channels, height, width)"}
        raise ValueError(
            f"samples of the data must have the shape {shape} {kinds[len(shape)]} of the model, got "
            f"{tuple(batch.content.shape[1:])}; set image_size and in_channels of the data, or build the model for them"
        )


def flip(images: Tensor, *, probability: float, seed: int, index: Tensor, epoch: Tensor) -> Tensor:
    """Mirrors random images of a batch horizontally; the choice depends only on (seed, index, epoch).

    Args:
        images: (B, C, H, W), any dtype, any device.
        probability: Probability that an image is mirrored, in [0, 1].
        seed: Seed of the run, in [0, 2**32).
        index: (B,) int64, ``index`` of the batch.
        epoch: (B,) int64, ``epoch`` of the batch.

    Returns:
        (B, C, H, W) of the same dtype.
    """
    # Integer arithmetic without rounding, so the choice is the same on any device.
    chosen = random_uniform("flip", seed=seed, index=index, epoch=epoch)[:, 0] < probability
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)


@dataclass(eq=False)
class ImageBatches(Dataset[Batch]):
    """A dataset of whole batches of images, decoded and cropped in the worker.

    Args:
        reader: The split.
        order: Maps positions to samples.
        image_size: Side of square images, or (height, width), in pixels.
        in_channels: Channels of the images, 1 or 3.
        augmentations: Crops and flips; by default the centre of each image.
        seed: Seed of the augmentations, in [0, 2**32).
    """

    reader: ShardReader
    order: Order
    _: KW_ONLY
    image_size: ImageSize
    in_channels: int
    augmentations: Augmentations = CENTER
    seed: int = 0

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions.

        1. Map the positions to samples.
        2. Decode each sample into its row, or the next readable sample.
        3. Take the labels of the samples shown.

        Args:
            positions: Consecutive positions of the stream; B is their number.

        Returns:
            The batch; content is (B, in_channels, H, W) uint8, channels-last.
        """
        rows = self.order(positions)  # 1.
        shape, count = (len(positions), *height_width(self.image_size), self.in_channels), len(self.reader)
        # Channels-last, as images are decoded: the copy into a row is a plain copy of memory.
        content = torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
        drawn = self.augmentations.draw(rows.index, rows.epoch, seed=self.seed)
        skipped = [  # 2.
            self._load(content[row], index, augment)
            for row, (index, augment) in enumerate(zip(rows.index.tolist(), drawn, strict=True))
        ]
        num_skipped = torch.tensor(skipped)  # (B,) unreadable samples before the readable one; 0 in most rows
        shown = (rows.index + num_skipped) % count
        labels = torch.from_numpy(self.reader.labels(shown.numpy()))  # 3.
        return Batch(content, labels, *rows, replacement=shown.masked_fill(num_skipped == 0, -1))

    def explain(self, index: int) -> Unreadable:
        """Reads an unreadable image again and describes its fault.

        Args:
            index: Number of the sample in its split.
        """
        # Workers report only the number of an image; the reason is found here, once per image.
        name = self.reader.name(index)
        try:
            decode_image(self.reader.read(index), channels=self.in_channels, name=name)
        except UnreadableImageError as error:
            text = str(error).removeprefix(f"image {name}: ")
            return Unreadable(index, self.reader.shard(index), name, error.reason, text)
        return Unreadable(index, self.reader.shard(index), name, "damaged", "it was readable at the second attempt")

    def _load(self, place: Tensor, index: int, crop: Place) -> int:
        """Fills a row with the first readable image at or after an index, and returns the number of unreadable ones.

        After ``MAX_IN_A_ROW`` unreadable images, or all of the split, the row is black, and ``UnreadableImages`` ends
        the run.

        Args:
            place: (in_channels, H, W) uint8, the row to fill.
            index: Number of the sample in its split.
            crop: Place of the crop.
        """
        count = len(self.reader)
        max_skipped = min(MAX_IN_A_ROW, count)
        for num_skipped in range(max_skipped):
            number = (index + num_skipped) % count
            data = self.reader.read(number)
            try:
                image = decode_image(data, channels=self.in_channels, name=f"sample {number}", reuse_memory=True)
            except UnreadableImageError:
                continue
            place.copy_(fit_image(image, image_size=self.image_size, crop=crop))
            return num_skipped
        place.zero_()
        return max_skipped


@dataclass(eq=False)
class TokenBatches(Dataset[Batch]):
    """A dataset of whole batches of tokens; each batch is one gather from the memory-mapped store.

    Args:
        reader: The split of the store.
        order: Maps positions to samples.
        seed: Seed of the view of a sample in an epoch, if the store has several views.
    """

    reader: TokenReader
    order: Order
    _: KW_ONLY
    seed: int = 0

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; content is (B, N) int64."""
        rows = self.order(positions)
        index = rows.index.numpy()
        tokens, labels = self.reader.read(index, self._views(rows))
        replacement = torch.from_numpy(self.reader.replacements(index))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), *rows, replacement=replacement)

    def _views(self, rows: Rows) -> npt.NDArray[np.int64] | int:
        """Returns the view of each row, (B,) int64, a function of (seed, index, epoch); 0 if there is only one view."""
        if self.reader.views == 1:
            return 0
        words = random_bits("view", seed=self.seed, index=rows.index, epoch=rows.epoch)[:, 0]
        return (words % self.reader.views).numpy()


@dataclass(eq=False)
class _WithVectors(Dataset[Batch]):
    """A dataset of batches with the vectors of their samples.

    Args:
        batches: The dataset of the batches.
        reader: Reader of the vectors of the split.
    """

    batches: ImageBatches | TokenBatches
    reader: VectorReader

    def __getitems__(self, positions: range) -> Batch:
        batch = self.batches.__getitems__(positions)
        shown = torch.where(batch.replacement < 0, batch.index, batch.replacement)
        return batch._replace(vectors=torch.from_numpy(self.reader.read(shown.numpy())))


class StepLoader(DataLoader[Batch]):
    """A loader whose position is the Trainer's step.

    It has ``state_dict`` and ``load_state_dict`` because Lightning resumes within an epoch only with loaders that have
    a state. ``unreadable`` counts unreadable images, in the process that iterates.
    """

    unreadable: UnreadableImages | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # any iterator serves
        # super().__iter__() runs here and not at the first next(), since the sampler reads the step now.
        try:
            with _keep_sigchld() if self.num_workers else nullcontext():
                return self._serve(super().__iter__())
        except (RuntimeError, OSError, EOFError) as error:
            self._check_workers(error)
            raise

    def _serve(self, batches: Iterator[Batch | _WorkerFailure]) -> Iterator[Batch]:
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                self._check_workers(error)
                raise
            if batch is None:
                return
            if isinstance(batch, _WorkerFailure):
                raise batch.error
            if self.unreadable is not None:
                self.unreadable.add(batch.index.numpy(), batch.replacement.numpy())
            yield batch

    def _check_workers(self, error: Exception) -> None:
        """Raises ``DataWorkerError`` if an error follows the death of a worker.

        Torch notices a death within 5 s, or a connection to the worker breaks first, while the process ends.
        """
        workers = [] if isinstance(error, RunError) else getattr(self._iterator, "_workers", [])
        deadline = time.monotonic() + _DEATH_SECONDS
        while workers and all(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.01)
        for worker in workers:
            if worker.exitcode:
                raise DataWorkerError(
                    f"a data loading worker was killed, most likely because it ran out of memory (process {worker.pid} "
                    f"ended with {worker.exitcode}); use fewer workers (data.num_workers, or --num-workers) or a "
                    "smaller batch (data.max_batch_per_device, or --batch-size), then run the same command again"
                ) from error

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: the sampler reads the Trainer's step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing, since the state is empty."""


@contextmanager
def _keep_sigchld() -> Iterator[None]:
    """Keeps the handler of SIGCHLD. Torch's would raise the death of a worker anywhere in the training process."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not handler:  # torch sets one in the main thread only
        signal.signal(signal.SIGCHLD, handler)


def make_loader(
    dataset: Dataset[Batch],
    order: Sampler[range],
    *,
    num_workers: int,
    unreadable_budget: float = 0.0,
    vectors: VectorReader | None = None,
) -> StepLoader:
    """Makes a loader of whole batches, in pinned memory if there is a GPU.

    Args:
        dataset: Dataset of images or tokens; ``__getitems__(range)`` returns a batch.
        order: Sampler that yields ranges of positions.
        num_workers: Number of worker processes; 0 reads in this process.
        unreadable_budget: Fraction of unreadable images that may be replaced, in [0, 1]; see ``UnreadableImages``.
        vectors: Reader of the vectors of the samples; None reads no vectors.
    """
    unreadable = None
    if isinstance(dataset, ImageBatches):
        unreadable = UnreadableImages(dataset.explain, num_samples=len(dataset.reader), budget=unreadable_budget)
    if vectors is not None:
        dataset = _WithVectors(cast("ImageBatches | TokenBatches", dataset), vectors)
    # The sampler yields whole ranges, so torch calls __getitems__ once per batch.
    made = StepLoader(
        _ErrorForwardingDataset(dataset) if num_workers else dataset,
        batch_sampler=cast("Sampler[list[int]]", order),  # our __getitems__ takes a range
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_job_signals,
    )
    made.unreadable = unreadable
    return made


class StepDataModule(LightningDataModule):
    """A data module that reads step, rank and world size from the Trainer; 0, 0 and 1 without a Trainer."""

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lets a module of stage 2 draw the masks of a batch, while it is on the host."""
        # Lightning warns if the LightningModule has this hook.
        draw = getattr(None if self.trainer is None else self.trainer.lightning_module, "draw_on_host", None)
        return batch if draw is None else cast("Batch", draw(batch))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the tensors of a batch; Lightning's own method would search it recursively."""
        # non_blocking: copies from pinned memory overlap with computation.
        moved = {name: part.to(device, non_blocking=True) for name, part in batch._asdict().items() if part is not None}
        return Batch(**moved)

    def _train_order(self, num_samples: int, *, per_device: int, accumulation: int) -> TrainBatchSampler:
        """Returns the micro-batches of this rank, from the Trainer's step to the end of the epoch."""
        return TrainBatchSampler(
            num_samples,
            per_device=per_device,
            accumulation=accumulation,
            world_size=self._world_size,
            rank=self._rank,
            current_step=self._current_step,
        )

    def _eval_order(self, num_samples: int, *, per_device: int) -> EvalBatchSampler:
        """Returns this rank's batches of validation samples, each sample once over all ranks."""
        return EvalBatchSampler(num_samples, per_device=per_device, world_size=self._world_size, rank=self._rank)

    def _current_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank


def _collate(batch: Any) -> Any:
    """Returns a batch unchanged: the dataset makes whole batches."""
    return batch


class _WorkerFailure(NamedTuple):
    """A user error of a worker, in place of its batch."""

    error: Exception


class _ErrorForwardingDataset(Dataset[Any]):
    """A dataset for workers that returns user errors instead of raising them.

    Torch would replace a raised error by one whose message is a traceback.
    """

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self.dataset = dataset

    def __getitems__(self, positions: range) -> Batch | _WorkerFailure:
        try:
            return cast("Batch", self.dataset.__getitems__(positions))  # type: ignore[attr-defined]  # all of ours do
        except Exception as error:
            if not isinstance(error, RunError) and exit_code_of(error) == INTERNAL_ERROR:
                raise  # for an error of ours, the traceback is useful
            return _WorkerFailure(error)
