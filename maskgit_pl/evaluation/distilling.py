"""``distill`` trains a student that needs fewer steps than a model, and ``QualityMonitor`` measures it meanwhile.

A student of few steps can collapse to a few images of each class, which its loss does not show.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.checks import check_choice
from maskgit_pl.evaluation.classifier import find_classifier, open_images
from maskgit_pl.evaluation.evaluator import FeatureMetrics, compare_images
from maskgit_pl.evaluation.extractors import open_extractors
from maskgit_pl.evaluation.folders import data_name, find_run
from maskgit_pl.evaluation.likelihood import encode_real_grids
from maskgit_pl.evaluation.metrics import TokenGrids, compute_metrics
from maskgit_pl.evaluation.options import CLASSIFIER
from maskgit_pl.evaluation.pixels import pixel_extractor
from maskgit_pl.evaluation.reference import obtain_references, read_real_labels
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.runs.fitting import FitResult
from maskgit_pl.runs.plan import Folders
from maskgit_pl.runs.recipe import Overrides, Recipe, flag_words, list_recipes
from maskgit_pl.runs.tokenizing import tokenize
from maskgit_pl.runs.training import fit
from maskgit_pl.transformer.token_model import TokenModel

_METRICS = ("fid", "class_agreement", "diversity", "recall", "two_sample", "pixel_fid")
_NUM_IMAGES = 500
_BATCH = 100


def distill(
    model: str | Path,
    *,
    method: str = "dimo",
    num_steps: int = 1,
    data: str | Path | None = None,
    cluster: str = "single",
    run: str | Path | None = None,
    overrides: Overrides = (),
    bars: Bars = no_bars,
) -> FitResult:
    """Distils a model to fewer steps. Resumes an interrupted distillation, and does nothing for a finished one.

    The student is exported to ``RUN/pretrained`` with its decoding settings, so that it is used as any other model.

    Args:
        model: The teacher: a run, a pretrained folder, or the name of a model in the package.
        method: Recipe ``distill-METHOD``: dimo or guidance.
        num_steps: T of the student, in [1, N].
        data: Data folder. Default: that of the model's training.
        cluster: A file of ``recipes/cluster``.
        run: Run of the student, see ``runs.Folders``. Default: ``MODEL-METHOD-T`` beside the model's run.
        overrides: Overrides of recipe values; see ``Recipe.read``.
        bars: Shows the progress of the token store.

    Raises:
        FileNotFoundError: if model, data, recipe or the classifier of the data do not exist.
        ValueError: if a value is out of range, or the model is autoregressive or has another tokenizer than its own.
        RunError: see ``runs.fit``.
    """
    prefix = "distill-"
    known = [name.removeprefix(prefix) for name in list_recipes("transformer") if name.startswith(prefix)]
    check_choice("method", method, known)
    found = find_run(model, data=None if data is None else Path(data))
    pipe = MaskGIT.from_pretrained(found.pretrained)
    pipe.transformer.schedule_for("distillation")
    find_classifier(found.classifier, open_images(found.data, pipe.tokenizer.image_size, pipe.tokenizer.channels))
    recipe = Recipe.read(
        "transformer",
        names=f"{prefix}{method}",
        dataset=data_name(found.data),
        cluster=cluster,
        overrides=[f"--model.decoding.num_steps={num_steps}", *flag_words(overrides)],
    )
    folders = Folders(
        run=found.run.with_name(f"{found.run.name}-{method}-{num_steps}") if run is None else run,
        data=found.data,
        tokenizer=found.pretrained / "tokenizer",
        pretrained=found.pretrained,
    )
    tokenize(recipe, **folders, bars=bars)
    return fit(recipe, callbacks=[QualityMonitor(found.references, found.data)], **folders)


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
