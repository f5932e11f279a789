"""Table 2 of the paper, outpainting and inpainting: our rows beside the published ones.

The published rows are measured on Places2, in the features of Inception.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Table 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from maskgit_pl import MaskGIT
from maskgit_pl.cli import run_script
from maskgit_pl.cli.flags import ReportFlags, Runs, write_page
from maskgit_pl.evaluation import EvaluatedModel, Evaluator, open_models
from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.pages import (
    Page,
    code_cell,
    describe_provenance,
    describe_reference,
    heading,
    image_to_png,
    markdown_table,
    metric_cell,
    metrics_of,
    paragraph,
    title,
    word_cell,
)
from maskgit_pl.grids import image_grid
from maskgit_pl.processes import progress_bars
from paper.editing import Task, edit, hide_pixels

_EDITING: dict[Task, tuple[tuple[str, ...], ...]] = {  # paper, Table 2
    "outpaint-right": (
        ("Boundless (from prior work)", "256", "35.02", "6.15"),
        ("In&Out (from prior work)", "256", "23.57", "7.18"),
        ("InfinityGAN", "256", "10.60", "5.57"),
        ("Boundless, TFHub model", "256", "7.80", "5.99"),
        ("MaskGIT", "512", "6.78", "11.69"),
    ),
    "inpaint-centre": (
        ("DeepFill", "256", "11.51", "22.55"),
        ("ICT (trained on a subset of Places2)", "256", "13.63", "17.70"),
        ("HiFill", "512", "16.60", "19.93"),
        ("CoModGAN", "512", "7.13", "21.82"),
        ("MaskGIT", "512", "7.92", "22.95"),
    ),
}

_TASKS: dict[Task, str] = {
    "outpaint-right": "Outpainting, the right 50 %",
    "inpaint-centre": "Inpainting, the centre 50 % x 50 %",
}
# Metrics that the table does not show.
_NO_COLUMN = ("diversity", "seconds_per_image", "brightness_spread", "contrast_spread", "weave")
_SHOWN_EDITS = 12


def table_2(runs: Runs = (), *, report: ReportFlags = ReportFlags()) -> None:
    """Writes Table 2: outpainting and inpainting of val images.

    The page, RESULTS/DATASET/table-2.md with .csv and .png, has the rows of the paper, too; its picture shows the first
    model. Measurements that the ledger of the results holds are reused.

    Example: python -m paper.table_2 runs/fashion-mnist-adaln

    Args:
        runs: Run folders (runs/NAME) or pretrained folders of the same data.

    Raises:
        FileNotFoundError: if a run, the data or the classifier of the data do not exist.
        ValueError: if there is no run, the runs have different data or classes, or an option is out of range.
    """
    with progress_bars() as bars:
        evaluator, models = open_models(runs, report, bars)
        rows = [
            row
            for model in models
            for task in _TASKS
            for row in measure_editing(evaluator, model, task, num_images=report.num_images, seed=report.seed)
        ]
    sheet = image_to_png(_draw_edits(evaluator, models[0].pipe, report.seed))
    folder = report.results / evaluator.dataset
    write_page(replace(make_editing_page(rows), folder=folder, pictures={"table-2.png": sheet}))


def measure_editing(
    evaluator: Evaluator, model: EvaluatedModel, task: Task, *, num_images: int, seed: int
) -> Iterator[Row]:
    """Measures val images in three versions: edited, with the hidden part grey, and unedited.

    The model's own decoding is used. Each version and network has a row.
    """
    count = min(num_images, evaluator.data.summary.samples["val"])

    def make(version: str) -> tuple[Tensor, Tensor]:
        images, labels = evaluator.read_real_images("val", count)
        if version == "MaskGIT":
            size, bar = evaluator.batch_size, evaluator.bars(f"{model.run}: {task}", count)
            edited = edit(task, model.pipe, images, labels, seed=seed, batch_size=size, on_images=bar)
            return edited, labels
        return hide_pixels(task, model.pipe.tokenizer, images) if version == "masked" else images, labels

    # The masked and the unedited images are the worst and the best case, which the edited ones lie between.
    for version in ("MaskGIT", "masked", "unedited"):
        columns = {"task": task, "model": version}
        make_version = partial(make, version)
        yield from evaluator.measure_images(
            "editing", model, make_version, num_images=count, seed=seed, columns=columns
        ).values()


def _draw_edits(evaluator: Evaluator, pipe: MaskGIT, seed: int) -> Image.Image:
    """Draws a sheet of val images, with the part that is given and the edit of each task."""
    images, labels = evaluator.read_real_images("val", _SHOWN_EDITS)
    edits = [
        shown
        for task in _TASKS
        for shown in (hide_pixels(task, pipe.tokenizer, images), edit(task, pipe, images, labels, seed=seed))
    ]
    captions = ["held out", *(caption for task in _TASKS for caption in ("given", task))]
    return image_grid(torch.cat([images, *edits]), columns=len(images), row_captions=captions)


def make_editing_page(rows: Sequence[Row]) -> Page:
    """Returns the page of Table 2: outpainting and inpainting of val images."""
    lines = heading("Table 2: outpainting and inpainting")
    lines += paragraph(
        "Each val image is edited once: the model gets its class and its visible part, and generates the rest. The",
        f"results are compared with {describe_reference(rows)}. `unedited` shows the same images without a change,",
        "and `masked` shows them with grey pixels in the part to generate: these are the best and the worst case. The",
        "part to generate consists of whole tokens: the right half is rounded up and the centre is rounded down. Of",
        "7 x 7 tokens, these are 4 columns, or 3 x 3 tokens.",
    )
    for task, name in _TASKS.items():
        of_task = [row for row in rows if row["task"] == task]
        if of_task:
            published = ["published, Places2", "size", "FID (inception)", "IS (inception)"]
            lines += ["", f"## {name}", "", *_editing_lines(of_task), "", *markdown_table(published, _EDITING[task])]
    return Page("table-2", [*lines, "", *describe_provenance(rows), "", "![table-2](table-2.png)"], rows)


def _editing_lines(rows: Sequence[Row]) -> list[str]:
    names = [name for name in metrics_of(rows) if name not in _NO_COLUMN]
    return markdown_table(
        ["result", "run", "network", *map(title, names), "images", "steps"],
        [
            [word_cell(row, "model"), code_cell(row["run"]), word_cell(row, "network"),
             *(metric_cell(row, name) for name in names), word_cell(row, "num_images"), word_cell(row, "num_steps")]
            for row in rows
        ],
        left=3,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_script(table_2, prog="python -m paper.table_2"))
