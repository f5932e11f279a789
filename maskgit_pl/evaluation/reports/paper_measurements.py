"""The measurements for Tables 1 to 3 and Figure 8 of the paper. Rows that the ledger holds are read from it.

``api`` opens the runs with ``open_models`` and calls one of the ``measure_*`` functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from maskgit_pl.evaluation.decodings import PLOT_STEPS
from maskgit_pl.evaluation.editing_tasks import edit, hide_pixels
from maskgit_pl.evaluation.evaluated_model import EvaluatedModel
from maskgit_pl.evaluation.evaluator import Evaluator
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.opening import (
    check_data,
    create_evaluated_model,
    give_val_vectors,
    open_data,
    open_evaluator,
    open_model,
)
from maskgit_pl.evaluation.pages import Page, choose_classes, image_to_png
from maskgit_pl.evaluation.reports.options import ReportOptions
from maskgit_pl.evaluation.reports.paper_tables import (
    TASKS,
    make_editing_page,
    make_generation_page,
    make_schedule_page,
)
from maskgit_pl.evaluation.reports.schedule_ablation import ablate, check_budgets
from maskgit_pl.evaluation.reports.schedule_figures import draw_figure_8
from maskgit_pl.evaluation.run_folders import RunFolders, read_run_recipe
from maskgit_pl.image_format import pixels_text
from maskgit_pl.pipeline.imaging_grids import image_grid
from maskgit_pl.progress import Bars

__all__ = ["OpenedModels", "measure_editing", "measure_generation", "measure_schedules", "open_models"]

_SHOWN_EDITS = 12


@dataclass(frozen=True)
class OpenedModels:
    """The models of a report, with their evaluator.

    Args:
        evaluator: Evaluator on the data of the first run.
        models: Models in the order of the runs.
        options: Number of images, seed, folder and other options.
        command: Command that produces the page.
    """

    evaluator: Evaluator
    models: Sequence[EvaluatedModel]
    options: ReportOptions
    command: str

    @property
    def folder(self) -> Path:
        """The folder of the pages, ``results/DATASET``."""
        return self.options.results / self.evaluator.dataset


def open_models(folders: Sequence[RunFolders], options: ReportOptions, command: str, bars: Bars) -> OpenedModels:
    """Opens models, data and feature networks.

    Args:
        folders: Folders of each run; the data of the first one are used.
        options: Number of images, networks and other options.
        command: Command that produces the page.
        bars: Progress bars.

    Raises:
        ValueError: if the runs differ in classes or image size, a network is unknown, or there are too few images.
    """
    first = folders[0]
    models = [create_evaluated_model(each, open_model(each, options.device)) for each in folders]
    data = open_data(first, models[0].pipe, num_workers=options.num_workers)
    # All rows of a table must compare with the same real images.
    for model in models[1:]:
        check_data(model.pipe, data)
        give_val_vectors(model.pipe, data)
        if model.pipe.tokenizer.image_size != data.config.image_size:
            raise ValueError(
                f"run {model.run}: the image size must be that of the first run, {pixels_text(data.config.image_size)} "
                f"pixels, got {pixels_text(model.pipe.tokenizer.image_size)}; make a separate table for it"
            )
    options.check_classes(data.num_classes)
    evaluator = open_evaluator(
        first,
        models[0].pipe,
        data,
        Ledger(options.results / FILE_NAME),
        features=options.features,
        reference=options.reference,
        batch_size=options.batch_size,
        bars=bars,
    )
    return OpenedModels(evaluator, models, options, command)


def measure_generation(opened: OpenedModels) -> Page:
    """Measures Table 1: class-conditional generation."""
    evaluator, count, seed = opened.evaluator, opened.options.num_images, opened.options.seed
    rows: list[Row] = []
    for model in opened.models:
        rows += evaluator.measure_samples(model, model.pipe.decoding, num_images=count, seed=seed).values()
    rows += evaluator.measure_real(num_images=count).values()
    page = make_generation_page(rows, _accuracy_scores(opened), command=opened.command)
    return replace(page, folder=opened.folder, pictures={"table-1.png": image_to_png(_sheet(opened))})


def _accuracy_scores(opened: OpenedModels) -> list[Row]:
    """Returns the rows of the classification accuracy score of each model, and of the same number of real images."""
    evaluator, options = opened.evaluator, opened.options
    if options.cas is None:
        return []
    count = min(options.cas_images or options.num_images, evaluator.data.summary.samples["train"])
    return [
        *(
            evaluator.measure_cas(each, each.pipe.decoding, options.cas, num_images=count, seed=options.seed)
            for each in opened.models
        ),
        evaluator.measure_cas(None, None, options.cas, num_images=count, seed=options.seed),
    ]


def _sheet(opened: OpenedModels) -> Image.Image:
    """Draws a sheet with a row of real images, a row per model and a column per class."""
    data, models = opened.evaluator.data, opened.models
    classes = choose_classes(data.num_classes)
    # 50 images per class on average contain one of each class almost certainly.
    images, labels = opened.evaluator.read_real_images("val", 50 * data.num_classes)
    rows = [torch.stack([_first_of(images, labels, label) for label in classes])]
    for model in models:
        rows.append(torch.as_tensor(model.pipe.generate(classes, seed=opened.options.seed, output_type="pt")))
    captions = ["real images", *(f"{model.kind}, T = {model.pipe.decoding.num_steps}" for model in models)]
    names = [data.class_names[label] for label in classes]
    return image_grid(torch.cat(rows), columns=len(classes), row_captions=captions, column_captions=names)


def _first_of(images: Tensor, labels: Tensor, label: int) -> Tensor:
    """Returns the first image of a class, or a black one if the class has none."""
    found = (labels == label).nonzero()
    return images[int(found[0])] if len(found) else torch.zeros_like(images[0])


def measure_editing(opened: OpenedModels) -> Page:
    """Measures Table 2: outpainting and inpainting of val images. The picture shows the first model."""
    evaluator, options = opened.evaluator, opened.options
    rows = [
        row
        for model in opened.models
        for task in TASKS
        for row in evaluator.measure_editing(model, task, num_images=options.num_images, seed=options.seed)
    ]
    pipe = opened.models[0].pipe
    images, labels = evaluator.read_real_images("val", _SHOWN_EDITS)
    shown, captions = [images], ["held out"]
    for task in TASKS:
        shown += [hide_pixels(task, pipe.tokenizer, images), edit(task, pipe, images, labels, seed=options.seed)]
        captions += ["given", task]
    sheet = image_grid(torch.cat(shown), columns=len(images), row_captions=captions)
    page = make_editing_page(rows, command=opened.command)
    return replace(page, folder=opened.folder, pictures={"table-2.png": image_to_png(sheet)})


def measure_schedules(opened: OpenedModels, *, num_steps: Sequence[int] | None) -> Page:
    """Measures Table 3 and Figure 8: mask schedules, with a model per schedule.

    Args:
        opened: Models that differ only in their mask schedule.
        num_steps: Numbers of steps; None for the usual ones. Those above half the number of tokens are left out.

    Raises:
        ValueError: if the training budgets differ, two runs have the same schedule, or no number of steps is left.
    """
    evaluator, options, models = opened.evaluator, opened.options, opened.models
    # Schedules are only comparable for equal training budgets.
    check_budgets({each.run: read_run_recipe(each.folder.parent / "transformer" / "config.yaml") for each in models})
    results = ablate(evaluator, models, steps=num_steps or PLOT_STEPS, num_images=options.num_images, seed=options.seed)
    first, *_ = evaluator.networks
    floor = evaluator.measure_real(num_images=options.num_images, networks=[first])[first]
    figure = draw_figure_8(
        results,
        num_tokens=models[0].pipe.transformer.network.config.num_tokens,
        metric=f"fid/{first}",
        num_images=options.num_images,
        floor=float(floor["fid"]),
        dataset=evaluator.dataset,
    )
    page = make_schedule_page(results, command=opened.command)
    return replace(page, folder=opened.folder, pictures={"figure-8.png": figure})
