"""Callbacks that write pictures after each validation, to the stage's folder and to the loggers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.pipeline.imaging_grids import image_grid, reconstruction_grid, save_png
from maskgit_pl.pipeline.networks import PretrainedTokenizer
from maskgit_pl.training.tolerant_logger import TolerantLogger

__all__ = ["ReconstructionPictures", "SamplePictures"]

log = logging.getLogger(__name__)

_MOST_CLASSES, _MOST_OF_A_CLASS = 10, 8
_MOST_PAIRS = 16


class ReconstructionPictures(Callback):
    """A callback that writes ``reconstructions.png`` after each validation of stage 1.

    Args:
        folder: Folder of the stage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        pair = cast("_Reconstructs", pl_module).reconstructions()
        if pair is not None:
            originals, reconstructions = (part[:_MOST_PAIRS] for part in pair)
            _publish(reconstruction_grid(originals, reconstructions), self.folder, "reconstructions", trainer)


class SamplePictures(Callback):
    """A callback that writes ``samples.png`` after each validation of stage 2, always with the same classes and seeds.

    Every rank samples tokens, since sharded networks must run the same number of forward passes on each rank. Only rank
    0 turns the tokens into pixels and writes the picture. A network with conditioning vectors gets those of validation
    samples of the classes.

    Args:
        folder: Folder of the stage.
        class_names: Names of all classes; up to 10 evenly spaced classes are shown.
        images_per_class: Images per class, at most 8.
        seed: Seed of the first image; image i has seed + i.
        find_vectors: Returns the vectors (B, C) of B labels and seeds; None for a network without conditioning vectors.
    """

    def __init__(
        self,
        folder: Path,
        *,
        class_names: Sequence[str],
        images_per_class: int = 8,
        seed: int = 0,
        find_vectors: Callable[[Sequence[int], Sequence[int]], Tensor] | None = None,
    ) -> None:
        self.folder = folder
        self.find_vectors = find_vectors
        shown = min(len(class_names), _MOST_CLASSES)
        self.classes = [number * len(class_names) // shown for number in range(shown)]
        self.captions = [class_names[label] for label in self.classes]
        self.images_per_class = min(images_per_class, _MOST_OF_A_CLASS)
        self.labels = [label for label in self.classes for _ in range(self.images_per_class)]
        self.seeds = [seed + number for number in range(len(self.labels))]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        model = cast("_Samples", pl_module)
        # Every rank runs all steps: with FSDP2, each forward pass is a collective.
        vectors = {} if self.find_vectors is None else {"vectors": self.find_vectors(self.labels, self.seeds)}
        (last,) = deque(model.sample(self.labels, self.seeds, **vectors), maxlen=1)  # keeps no other step in memory
        if trainer.is_global_zero:
            images = model.tokenizer.decode(last.tokens)
            picture = image_grid(images, columns=self.images_per_class, row_captions=self.captions)
            _publish(picture, self.folder, "samples", trainer)


class _Reconstructs(Protocol):
    def reconstructions(self) -> tuple[Tensor, Tensor] | None: ...


class _Samples(Protocol):
    @property
    def tokenizer(self) -> PretrainedTokenizer: ...

    def sample(
        self, labels: Sequence[int], seeds: Sequence[int], vectors: Tensor | None = None
    ) -> Iterator[DecodingStep]: ...


def _publish(picture: Image.Image, folder: Path, name: str, trainer: Trainer) -> None:
    """Writes a picture to the folder and to the loggers; a failed write is skipped with a warning."""
    try:
        save_png(picture, folder / f"{name}.png")
    except OSError as error:
        log.warning("%s cannot be written: %s; training continues", folder / f"{name}.png", error)
    for logger in trainer.loggers:
        if isinstance(logger, TolerantLogger):
            logger.log_image(name, picture, trainer.global_step)
