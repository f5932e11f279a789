"""A callback that reports images that could not be read in training: logged, summarized and listed in a file."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.data.unreadable import UnreadableImages, write_unreadable

__all__ = ["UnreadableReport"]

log = logging.getLogger(__name__)


class UnreadableReport(Callback):
    """A callback that reports unreadable images.

    The metric ``data/unreadable`` is their number on rank 0, logged at the Trainer's interval. At the end of the run,
    or when it fails, one line summarizes them, and ``unreadable.json`` (``unreadable-rank1.json`` ... on other ranks)
    lists each image of the train and val split with its reason. The counts start at 0 with each process.

    Args:
        folder: Folder of the stage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logged = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # added at run time
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer)
        self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._report(trainer)

    def _log(self, trainer: Trainer) -> None:
        count = sum(images.count for images in _counters(trainer).values())
        # Only changes are logged, so that a clean run has a single point.
        if count != self._logged:
            for logger in trainer.loggers:
                logger.log_metrics({"data/unreadable": count}, step=trainer.global_step)
            self._logged = count

    def _report(self, trainer: Trainer) -> None:
        counters = {split: images for split, images in _counters(trainer).items() if images.count}
        if not counters:
            return
        rank = trainer.global_rank
        path = self.folder / ("unreadable.json" if rank == 0 else f"unreadable-rank{rank}.json")
        write_unreadable(path, counters)
        for split, images in counters.items():
            log.warning(
                "data, split %s: %d of %d images could not be read (%s; %s) and were replaced by the next image of the "
                "split; list: %s",
                split, images.count, images.seen,
                _format_counts(images.by_reason()), _format_counts(images.by_shard()), path,
            )  # fmt: skip


def _counters(trainer: Trainer) -> dict[str, UnreadableImages]:
    """Returns the counter of each split that has one."""
    loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}
    found = {split: getattr(loader, "unreadable", None) for split, loader in loaders.items()}
    return {split: images for split, images in found.items() if isinstance(images, UnreadableImages)}


def _format_counts(counts: dict[str, int], most: int = 5) -> str:
    """Formats the first few counts: ``train-000000.tar 3, train-000004.tar 1``."""
    items: Iterable[tuple[str, int]] = list(counts.items())[:most]
    return ", ".join(f"{name} {count}" for name, count in items) + (", ..." if len(counts) > most else "")
