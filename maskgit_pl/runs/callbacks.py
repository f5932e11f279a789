"""The interface of the callbacks that a recipe names, and those that report progress, pictures and bad images.

A recipe has ``callbacks: [NAME]`` for one of another package. ``runs.fitting`` adds it after those that every run has.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from maskgit_pl.data.loader import UnreadableImages
from maskgit_pl.files import try_write_text
from maskgit_pl.grids import class_captions, image_grid, reconstruction_grid, save_png
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.training.loggers import TolerantLogger
from maskgit_pl.transformer.token_model import TokenModel

log = logging.getLogger(__name__)

_MOST_CLASSES, _IMAGES_PER_CLASS = 10, 8
_MOST_PAIRS = 16
_SECONDS_BETWEEN_LINES = 15.0


class CallbackSpec(ABC):
    """The base of registered callbacks: a frozen dataclass of the values in a recipe, which builds a callback."""

    @abstractmethod
    def create(self, folder: Path) -> Callback:
        """Builds the callback of a run, on every rank.

        A callback that keeps a state between steps returns it from ``state_dict`` as plain values, so that a
        resumed run continues it.

        Args:
            folder: Folder of the stage, ``runs/RUN/STAGE``. Only rank 0 may write to it.
        """


callbacks: Registry[CallbackSpec] = Registry("callback", "maskgit_pl.callbacks", check=derives_from(CallbackSpec))


class ProgressLines(Callback):
    """A callback that logs step, metrics, speed and remaining time on rank 0, at most once per interval.

    It is for batch logs and CI, in place of a progress bar.
    """

    def __init__(self) -> None:
        self._start = (0.0, 0)  # time and step at the start of training
        self._last = 0.0  # time of the last line

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.monotonic()
        self._start = (self._last, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._last = time.monotonic()
        begun, first = self._start
        # Speed since the start of this process: a resumed run counts only its own steps.
        speed = (trainer.global_step - first) / max(self._last - begun, 1e-9)
        left = (trainer.max_steps - trainer.global_step) / speed if speed > 0 else float("inf")
        metrics = trainer.progress_bar_metrics.items()
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics if isinstance(value, int | float))
        log.info("step %d/%d  %s  %.2f steps/s  %.0f s left", trainer.global_step, trainer.max_steps, text, speed, left)


class ReconstructionPictures(Callback):
    """A callback that writes ``reconstructions.png`` to the folder of stage 1 after each validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        pair = cast(Any, pl_module).reconstructions
        if pair is not None:
            originals, reconstructions = (part[:_MOST_PAIRS] for part in pair)
            _publish(reconstruction_grid(originals, reconstructions), self.folder, "reconstructions", trainer)


class SamplePictures(Callback):
    """A callback that writes ``samples.png`` after each validation of stage 2, always with the same classes and seeds.

    Every rank samples tokens, since sharded networks must run the same number of forward passes on each rank.
    Only rank 0 turns the tokens into pixels and writes the picture.

    Args:
        folder: Folder of the stage.
        class_names: Names of all classes; up to 10 evenly spaced classes are shown, with 8 images each.
    """

    def __init__(self, folder: Path, *, class_names: Sequence[str]) -> None:
        self.folder = folder
        count = min(len(class_names), _MOST_CLASSES)
        classes = [number * len(class_names) // count for number in range(count)]
        self.captions = class_captions(class_names, classes)
        self.labels = [label for label in classes for _ in range(_IMAGES_PER_CLASS)]
        self.seeds = [*range(len(self.labels))]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        model = cast("TokenModel", pl_module)
        # Every rank runs all steps: with FSDP2, each forward pass is a collective.
        (last,) = deque(model.sample(self.labels, self.seeds), maxlen=1)  # keeps no other step in memory
        if trainer.is_global_zero:
            images = model.tokenizer.decode(last.tokens)
            picture = image_grid(images, columns=_IMAGES_PER_CLASS, row_captions=self.captions)
            _publish(picture, self.folder, "samples", trainer)


class UnreadableReport(Callback):
    """A callback that reports unreadable images at the end of the run, or when it fails.

    One line summarizes them, and ``unreadable.json`` (``unreadable-rank1.json`` ... on other ranks) lists each image
    of the train and val split with its reason. The counts start at 0 with each process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}
        found = {split: getattr(loader, "unreadable", None) for split, loader in loaders.items()}
        counters = {k: images for k, images in found.items() if isinstance(images, UnreadableImages) and images.count}
        if not counters:
            return
        rank = trainer.global_rank
        path = self.folder / ("unreadable.json" if rank == 0 else f"unreadable-rank{rank}.json")
        content = {split: images.as_json() for split, images in counters.items()}
        try_write_text(path, json.dumps(content, indent=1) + "\n")
        for split, images in counters.items():
            log.warning(
                "data, split %s: %d of %d images could not be read and were replaced by the next image of the split; "
                "list: %s",
                split,
                images.count,
                images.seen,
                path,
            )


def _publish(picture: Image.Image, folder: Path, name: str, trainer: Trainer) -> None:
    """Writes a picture to the folder and to the loggers; a failed write is skipped with a warning."""
    try:
        save_png(picture, folder / f"{name}.png")
    except OSError as error:
        log.warning("%s cannot be written: %s; training continues", folder / f"{name}.png", error)
    for logger in trainer.loggers:
        if isinstance(logger, TolerantLogger):
            logger.log_image(name, picture, trainer.global_step)
