"""Datasets and the loader of whole batches of images or tokens, and the base class of the data modules.

Batches are drawn by their positions in the training stream. The position of a data module is the Trainer's
step, so a resumed run continues there.

An unreadable image is replaced by the next readable one of its split (index + 1, + 2, ... modulo n), with its label:
a function of the data and the index. The training process counts and lists replacements; too many end the run.

Used by ``ShardData``, ``IndexedDataModule``, ``tokenize`` and the evaluation.
"""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Callable, Iterator, Sequence
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
from maskgit_pl.data.augmentations import CENTER, Augment, Augmentations
from maskgit_pl.data.batches import Batch
from maskgit_pl.data.image_bytes import UnreadableImageError
from maskgit_pl.data.images import decode_image
from maskgit_pl.data.manifest import ShardReader
from maskgit_pl.data.order import Order, Rows, TrainBatchSampler, eval_batches
from maskgit_pl.data.token_store import TokenReader
from maskgit_pl.errors import INTERNAL_ERROR, DataBudgetError, DataWorkerError, RunError, exit_code_of
from maskgit_pl.processes import ignore_job_signals
from maskgit_pl.randomness import random_bits

ALWAYS_ALLOWED = 10  # different images; so few never end a run, even with little data
MAX_IN_A_ROW = 100  # so many consecutive images mean that a shard is damaged
_MAX_LISTED = 20  # images in an error message; the JSON file lists all
_WAY_OUT = "repair or leave out these images and make the shards again, or raise data.unreadable_budget"
_DEATH_SECONDS = 1.0  # longest time in which a process ends after its connections


@dataclass(eq=False)
class ImageBatches(Dataset[Batch]):
    """A dataset of whole batches of images, decoded and cropped in the worker."""

    reader: ShardReader
    order: Order  # from positions to samples
    _: KW_ONLY
    image_size: ImageSize  # side of square images, or (height, width), in pixels
    in_channels: int  # 1 or 3
    augmentations: Augmentations = CENTER
    seed: int = 0  # of the augmentations, in [0, 2**32)

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; content is (B, in_channels, H, W) uint8, channels-last.

        1. Map the positions to samples.
        2. Decode each sample into its row, or the next readable sample.
        3. Take the labels of the samples shown.
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
        rows_read = (rows.index + num_skipped) % count
        replacement = rows_read.masked_fill(num_skipped == 0, -1)
        labels = torch.from_numpy(self.reader.labels(rows_read.numpy()))  # 3.
        return Batch(content, labels, *rows, replacement)

    def explain(self, index: int) -> str:
        """Reads an unreadable image again, by its number in the split. Returns ``SHARD:MEMBER: REASON: ERROR``."""
        # Workers report only the number of an image; the reason is found here, once per image.
        name = self.reader.name(index)
        try:
            decode_image(self.reader.read(index), channels=self.in_channels, name=name)
        except UnreadableImageError as error:
            return f"{name}: {error.reason}: {str(error).removeprefix(f'image {name}: ')}"
        return f"{name}: damaged: it was readable at the second attempt"

    def _load(self, row: Tensor, index: int, augment: Augment) -> int:
        """Fills a row (in_channels, H, W) with the first readable image at or after an index.

        Returns the number of unreadable ones.
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
            row.copy_(augment(image, height_width(self.image_size)))
            return num_skipped
        raise DataBudgetError(
            f"data budget: {max_skipped} images in a row cannot be read, the first is {self.explain(index)}; {_WAY_OUT}"
        )


@dataclass(eq=False)
class TokenBatches(Dataset[Batch]):
    """A dataset of whole batches of tokens; each batch is one gather from the memory-mapped store."""

    reader: TokenReader
    order: Order  # from positions to samples
    _: KW_ONLY
    seed: int = 0  # of the view of a sample in an epoch, if the store has several views

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; content is (B, N) int64."""
        rows = self.order(positions)
        index = rows.index.numpy()
        tokens, labels = self.reader.read(index, self._views(rows))
        replacement = torch.from_numpy(self.reader.replacements(index))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), *rows, replacement)

    def _views(self, rows: Rows) -> npt.NDArray[np.int64] | int:
        """Returns the view of each row, (B,) int64, a function of (seed, index, epoch); 0 if there is only one view."""
        if self.reader.views == 1:
            return 0
        words = random_bits("view", seed=self.seed, index=rows.index, epoch=rows.epoch)[:, 0]
        return (words % self.reader.views).numpy()


class UnreadableImages:
    """A counter of the unreadable images of a split, which ends the run if there are too many.

    The counts begin at 0 in each process, also after a resume.

    Args:
        explain: Maps the number of an unreadable sample to a description; called once per image.
        num_samples: Number of samples in the split, n.
        budget: Fraction of the samples seen that may be unreadable, in [0, 1]. Above 0, 10 different images
            are always allowed; 0 allows none.
    """

    def __init__(self, explain: Callable[[int], str], *, num_samples: int, budget: float) -> None:
        self.budget = budget
        self.num_samples = num_samples
        self.seen = 0
        self.count = 0  # number of times that an unreadable sample was drawn; one of two epochs counts twice
        self.images: dict[int, str] = {}  # the description of each
        self._explain = explain

    def add(self, index: npt.NDArray[np.int64], replacement: npt.NDArray[np.int64]) -> None:
        """Counts the unreadable images of a batch: of samples drawn and their replacements, both (B,) int64.

        Every sample from the drawn one up to its replacement, which is excluded, is unreadable.
        """
        self.seen += len(index)
        row = np.flatnonzero(replacement >= 0)
        for drawn, replaced_by in zip(index[row].tolist(), replacement[row].tolist(), strict=True):
            length = (replaced_by - drawn) % self.num_samples
            self.count += length
            for number in (position % self.num_samples for position in range(drawn, drawn + length)):
                if number not in self.images:
                    self.images[number] = self._explain(number)
        allowed = ALWAYS_ALLOWED if self.budget > 0 else 0
        if len(self.images) <= allowed or self.count <= self.budget * self.seen:
            return
        lines = [text for _, text in sorted(self.images.items())]
        more = [f"... and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        listed = "\n  ".join([*lines[:_MAX_LISTED], *more])
        raise DataBudgetError(
            f"data budget: unreadable images must be at most {self.budget:g} of all images, or {allowed} in total, "
            f"got {len(self.images)} ({self.count} times in {self.seen} images):\n  {listed}\n{_WAY_OUT}"
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the count and the list of all images as JSON values."""
        return {"seen": self.seen, "unreadable": self.count, "images": dict(sorted(self.images.items()))}


class StepLoader(DataLoader[Batch]):
    """A loader whose position is the Trainer's step.

    It has ``state_dict`` and ``load_state_dict`` because Lightning resumes within an epoch only with loaders
    that have a state. ``unreadable`` counts unreadable images, in the process that iterates.
    """

    unreadable: UnreadableImages | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # any iterator serves
        # super().__iter__() runs here and not at the first next(), since the sampler reads the step now.
        with self._naming_killed_workers(), _keep_sigchld() if self.num_workers else nullcontext():
            try:
                return self._serve(super().__iter__())
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                # Raised at the first batch: Lightning would hide an error that is raised here.
                return self._serve(iter([_WorkerFailure(_no_workers(error))]))

    def _serve(self, batches: Iterator[Batch | _WorkerFailure]) -> Iterator[Batch]:
        while True:
            with self._naming_killed_workers():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, _WorkerFailure):
                raise batch.error
            if self.unreadable is not None:
                self.unreadable.add(batch.index.numpy(), batch.replacement.numpy())
            yield batch

    @contextmanager
    def _naming_killed_workers(self) -> Iterator[None]:
        """Raises ``DataWorkerError`` in place of an error that follows the death of a worker.

        Torch notices a death within 5 s, or a connection to the worker breaks first, while the process ends.
        """
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            workers = [] if isinstance(error, RunError) else getattr(self._iterator, "_workers", [])
            deadline = time.monotonic() + _DEATH_SECONDS
            while workers and all(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
                time.sleep(0.01)
            killed = next((worker for worker in workers if worker.exitcode), None)
            if killed is None:
                raise
            raise DataWorkerError(
                f"a data loading worker was killed, most likely because it ran out of memory (process {killed.pid} "
                f"ended with {killed.exitcode}); use fewer workers (data.num_workers, or --num-workers) or a smaller "
                "batch (data.max_batch_per_device, or --batch-size), then run the same command again"
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
    order: Sampler[range] | Sequence[range],
    *,
    num_workers: int,
    unreadable_budget: float = 0.0,
) -> StepLoader:
    """Makes a loader of whole batches, in pinned memory if there is a GPU.

    Args:
        dataset: Dataset of images or tokens; ``__getitems__(range)`` returns a batch.
        order: Ranges of positions, one for each batch.
        num_workers: Number of worker processes; 0 reads in this process.
        unreadable_budget: Fraction of unreadable images that may be replaced, in [0, 1]; see ``UnreadableImages``.
    """
    unreadable = None
    if isinstance(dataset, ImageBatches):
        unreadable = UnreadableImages(dataset.explain, num_samples=len(dataset.reader), budget=unreadable_budget)
    # Torch calls __getitems__ once per batch, with the whole range.
    loader = StepLoader(
        _ErrorForwardingDataset(dataset) if num_workers else dataset,
        batch_sampler=cast("Sampler[list[int]]", order),  # our __getitems__ takes a range
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_job_signals,
    )
    loader.unreadable = unreadable
    return loader


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

    def _eval_order(self, num_samples: int, *, per_device: int) -> list[range]:
        """Returns this rank's batches of validation samples, each sample once over all ranks."""
        return eval_batches(num_samples, per_device=per_device, world_size=self._world_size, rank=self._rank)

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
            batch = cast("Batch", self.dataset.__getitems__(positions))  # type: ignore[attr-defined]  # all of ours do
            _share(batch)
        except Exception as error:
            if not isinstance(error, RunError) and exit_code_of(error) == INTERNAL_ERROR:
                raise  # for an error of ours, the traceback is useful
            return _WorkerFailure(error)
        return batch


def _share(batch: Batch) -> None:
    """Moves a batch to shared memory, as torch does when a worker sends it: a failure there would hang the run."""
    try:
        for part in batch:
            if isinstance(part, Tensor):
                part.share_memory_()  # type: ignore[no-untyped-call]  # torch: untyped
    except RuntimeError as error:
        raise _no_workers(error) from error


def _no_workers(error: Exception) -> DataWorkerError:
    return DataWorkerError(
        f"data loading workers failed: {error}; enlarge /dev/shm (docker run --shm-size=8g), or use no workers "
        "(data.num_workers 0, or --num-workers 0), then run the same command again"
    )
