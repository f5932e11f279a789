"""``QualityMonitor`` measures the images of a student while ``distill`` trains it.

A student of few steps can collapse to a few images of each class, which its loss does not show.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.evaluation.classifier import open_images
from maskgit_pl.evaluation.evaluator import FeatureMetrics, compare_images
from maskgit_pl.evaluation.extractors import open_extractors
from maskgit_pl.evaluation.likelihood import encode_real_grids
from maskgit_pl.evaluation.metrics import TokenGrids, compute_metrics
from maskgit_pl.evaluation.options import CLASSIFIER
from maskgit_pl.evaluation.pixels import pixel_extractor
from maskgit_pl.evaluation.reference import obtain_references, read_real_labels
from maskgit_pl.transformer.token_model import TokenModel

_METRICS = ("fid", "class_agreement", "diversity", "recall", "two_sample", "pixel_fid")
_NUM_IMAGES = 500
_BATCH = 100


class QualityMonitor(Callback):
    """A callback that measures images of the same classes and seeds at each validation, by the classifier of the data.

    It logs ``val/fid``, ``val/class_agreement``, ``val/diversity``, ``val/recall``, ``val/two_sample`` and
    ``val/pixel_fid``. FID of 500 images is higher than that of more, and a network sees fewer faults in them.

    Args:
        folder: Folder of the classifier of the data, ``runs/DATA-classifier``; see ``find_classifier``.
        data: Data folder.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.judge: FeatureMetrics | None = None
        self.pixels: FeatureMetrics | None = None
        self.grids: TokenGrids | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.judge is None:
            tokenizer = cast("TokenModel", pl_module).tokenizer
            images = open_images(self.data, tokenizer.image_size, tokenizer.channels)
            extractors = open_extractors(self.folder / "small", images, [CLASSIFIER], device="cpu")
            extractors.append(pixel_extractor())
            references, labels = obtain_references(self.folder, images, extractors), read_real_labels(images)
            self.judge, self.pixels = (FeatureMetrics(each, references[each.label], labels) for each in extractors)
            self.grids = encode_real_grids(tokenizer, images)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.judge is not None
        assert self.grids is not None
        model, judge = cast("TokenModel", pl_module), self.judge
        labels = [seed % model.config.network.num_classes for seed in range(_NUM_IMAGES)]
        parts = []
        # Every rank runs all steps: with FSDP2, each forward pass is a collective.
        for first in range(0, _NUM_IMAGES, _BATCH):
            seeds = range(first, first + _BATCH)
            (last,) = deque(model.sample(labels[first : first + _BATCH], seeds), maxlen=1)
            parts.append(last.tokens)
        tokens = torch.cat(parts)
        images = compare_images(
            lambda rows: model.tokenizer.decode(tokens[rows.start : rows.stop]),
            torch.tensor(labels),
            judge,
            pixels=self.pixels,
            tokens=self.grids.with_sampled(tokens),
        )
        known = judge.choose(also=["tokens", "pixels"])
        chosen = {name: metric for name, metric in known.items() if name in _METRICS}
        values = {f"val/{name}": value for name, value in compute_metrics(chosen, images).items() if value is not None}
        model.log_dict(values, prog_bar=True, logger=False)
        if not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
