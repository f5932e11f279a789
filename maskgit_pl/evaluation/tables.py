"""Tables 1 and 2 of the paper, our rows beside the published ones.

Published Table 1 is measured on ImageNet with 50,000 images, Table 2 on Places2, both with the features of Inception.
``schedule_table`` has Table 3.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image

from maskgit_pl.checks import check_integer, pixels_text
from maskgit_pl.evaluation.classifier import check_cas
from maskgit_pl.evaluation.editing import Task, edit, hide_pixels
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
from maskgit_pl.evaluation.folders import (
    check_data,
    check_model_decoding,
    find_run,
    open_data,
    open_evaluator,
    open_model,
)
from maskgit_pl.evaluation.ledger import FILE_NAME, REAL, Ledger, Row
from maskgit_pl.evaluation.metrics import format_value, title
from maskgit_pl.evaluation.options import (
    CAS_TRAINING,
    CASConfig,
    ReportOptions,
    check_runs,
    round_to_classes,
    with_steps,
)
from maskgit_pl.evaluation.pages import (
    Page,
    choose_classes,
    code_cell,
    heading,
    image_to_png,
    markdown_table,
    metric_cell,
    metrics_of,
    paragraph,
    seeds_cell,
)
from maskgit_pl.evaluation.timing import BATCH_SIZES, measure_costs
from maskgit_pl.grids import image_grid
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.text import markdown

Runs = Sequence[Path | str]

_GENERATION = (  # paper, Table 1
    ("DCTransformer", "256", "36.51", "", "0.36", "0.67", "738M", ">1024", "", ""),
    ("BigGAN-deep", "256", "6.95", "198.2", "0.87", "0.28", "160M", "1", "43.99", "67.89"),
    ("Improved DDPM", "256", "12.26", "", "0.70", "0.62", "280M", "250", "", ""),
    ("ADM", "256", "10.94", "101.0", "0.69", "0.63", "554M", "250", "", ""),
    ("VQVAE-2", "256", "31.11", "~45", "0.36", "0.57", "13.5B", "5120", "54.83", "77.59"),
    ("VQGAN", "256", "15.78", "78.3", "", "", "1.4B", "256", "", ""),
    ("VQGAN* (autoregressive)", "256", "18.65", "80.4", "0.78", "0.26", "227M", "256", "53.10", "76.18"),
    ("MaskGIT", "256", "6.18", "182.1", "0.80", "0.51", "227M", "8", "63.14", "84.45"),
    ("BigGAN-deep", "512", "8.43", "232.5", "0.88", "0.29", "160M", "1", "44.02", "68.22"),
    ("ADM", "512", "23.24", "58.06", "0.73", "0.60", "559M", "250", "", ""),
    ("VQGAN* (autoregressive)", "512", "26.52", "66.8", "0.73", "0.31", "227M", "1024", "51.29", "74.24"),
    ("MaskGIT", "512", "7.32", "156.0", "0.78", "0.50", "227M", "12", "63.43", "84.79"),
    ("classifier trained on real images", *[""] * 7, "76.6", "93.1"),
)
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
OTHER_STEPS = "FID by number of steps"  # purpose of rows whose T is not that of their model
SETTINGS = ("backbone", "settings")  # columns of the cost of a model that its other rows get in Table 1
NO_COLUMN = ("diversity", "seconds_per_image")  # metrics that Tables 1 and 2 do not show, or elsewhere
_NAMED_AFTER_NETWORK = ("fid", "sfid", "kid", "is")
_SHOWN_EDITS = 12


def table_1(
    runs: Runs,
    options: ReportOptions | None = None,
    *,
    cas: CASConfig | None = CAS_TRAINING,
    cas_images: int | None = None,
    num_steps: Sequence[int] = (),
    bars: Bars = no_bars,
) -> Page:
    """Makes Table 1: class-conditional generation, with a row per model. Runs that differ in their seed are one model.

    Args:
        runs: Run folders or pretrained folders of the same data.
        options: Number of images, networks, folders and other options; None for the defaults.
        cas: Training of the classification accuracy score; None leaves the score out.
        cas_images: Number of training images of the score; None for that of a row.
        num_steps: Numbers of steps T, at which the FID of each MaskGIT is measured, too, in the first network.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if a run or the data do not exist.
        ValueError: if there is no run, the runs have different data or classes, or an option is out of range.
    """
    options = options or ReportOptions()
    if cas_images is not None:
        check_integer("cas_images", cas_images, "[1, inf)")
    check_cas(cas)
    evaluator, models = open_models("table 1", runs, options, bars)
    count, seed = options.num_images, options.seed
    curve = [
        (index, with_steps(model.pipe.decoding, number))
        for index, model in enumerate(models)
        for number in sorted({*num_steps} - {model.pipe.decoding.num_steps})
        if model.pipe.transformer.mask_schedule is not None
    ]
    for index, decoding in curve:  # all are checked before the first one is measured
        check_model_decoding(models[index].pipe, decoding)
    costs = measure_costs(evaluator.ledger, models, bars)
    marks = [{name: cost[name] for name in SETTINGS} for cost in costs]
    rows = [
        row | mark
        for model, mark in zip(models, marks, strict=True)
        for row in evaluator.measure_samples(model, model.pipe.decoding, num_images=count, seed=seed).values()
    ]
    rows += evaluator.measure_real(num_images=count).values()
    first, *_ = evaluator.networks
    measure = partial(evaluator.measure_samples, num_images=count, seed=seed, networks=[first], metrics="fast")
    other_steps = [
        measure(models[index], decoding, purpose=OTHER_STEPS)[first] | marks[index] for index, decoding in curve
    ]
    scores = []
    if cas is not None:
        count = min(cas_images or count, evaluator.data.summary.samples["train"])
        scores = [
            evaluator.measure_cas(model, model.pipe.decoding, cas, num_images=count, seed=seed) | mark
            for model, mark in zip(models, marks, strict=True)
        ]
        scores.append(evaluator.measure_cas(None, None, cas, num_images=count, seed=seed))
    page = make_generation_page(rows, scores, costs, other_steps)
    # The sheet has the first seed of each model.
    shown = {cost["settings"]: model for cost, model in reversed(list(zip(costs, models, strict=True)))}
    sheet = image_to_png(_draw_samples(evaluator, [*reversed(shown.values())], seed))
    return replace(page, folder=options.results / evaluator.dataset, pictures={"table-1.png": sheet})


def table_2(runs: Runs, options: ReportOptions | None = None, *, bars: Bars = no_bars) -> Page:
    """Makes Table 2: outpainting and inpainting of val images. The picture shows the first model.

    See ``table_1`` for arguments and errors.
    """
    options = options or ReportOptions()
    evaluator, models = open_models("table 2", runs, options, bars)
    rows = [
        row
        for model in models
        for task in _TASKS
        for row in evaluator.measure_editing(model, task, num_images=options.num_images, seed=options.seed)
    ]
    sheet = image_to_png(_draw_edits(evaluator, models[0].pipe, options.seed))
    folder = options.results / evaluator.dataset
    return replace(make_editing_page(rows), folder=folder, pictures={"table-2.png": sheet})


def open_models(
    task: str, runs: Runs, options: ReportOptions, bars: Bars
) -> tuple[Evaluator, Sequence[EvaluatedModel]]:
    """Opens the data of the first run and all models, which must have the classes and the image size of the first."""
    check_runs(task, runs)
    folders = [find_run(run, data=options.data) for run in runs]
    models = [open_model(folder, options.device) for folder in folders]
    data = open_data(folders[0], models[0].pipe, num_workers=options.num_workers)
    for model in models[1:]:
        check_data(model.pipe, data)
        if model.pipe.tokenizer.image_size != data.config.image_size:
            raise ValueError(
                f"run {model.run}: the image size must be that of the first run, {pixels_text(data.config.image_size)} "
                f"pixels, got {pixels_text(model.pipe.tokenizer.image_size)}; make a separate table for it"
            )
    round_to_classes(options.num_images, data.num_classes)
    evaluator = open_evaluator(
        folders[0],
        data,
        Ledger(options.results / FILE_NAME),
        device=models[0].pipe.device,
        batch_size=options.batch_size,
        features=options.features,
        reference=options.reference,
        bars=bars,
    )
    return evaluator, models


def _draw_samples(evaluator: Evaluator, models: Sequence[EvaluatedModel], seed: int) -> Image.Image:
    """Draws a sheet with a row of real images, a row per model and a column per class."""
    data = evaluator.data
    classes = choose_classes(data.num_classes)
    # 50 images per class on average contain one of each class almost certainly.
    images, labels = evaluator.read_real_images("val", 50 * data.num_classes)
    black = torch.zeros_like(images[0])  # of a class without an image
    rows = [torch.stack([next(iter(images[labels == label]), black) for label in classes])]
    rows += [torch.as_tensor(model.pipe.generate(classes, seed=seed, output_type="pt")) for model in models]
    captions = [
        f"{model.kind} ({model.pipe.transformer.network.config.backbone}), T = {model.pipe.decoding.num_steps}"
        for model in models
    ]
    return image_grid(
        torch.cat(rows),
        columns=len(classes),
        row_captions=["real images", *captions],
        column_captions=[data.class_names[label] for label in classes],
    )


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


def make_generation_page(
    samples: Sequence[Row], cas: Sequence[Row], costs: Sequence[Row] = (), other_steps: Sequence[Row] = ()
) -> Page:
    """Returns the page of Table 1. Rows with equal ``settings`` are the seeds of a model.

    ``samples`` has rows of real images, too; ``other_steps`` rows at other T, in the first network.
    """
    counts = ", ".join(dict.fromkeys(_word(row, "num_images") for row in samples))
    lines = heading("Table 1: class-conditional generation")
    lines += paragraph(
        f"{counts} images of each model, evenly distributed over the classes, are compared with",
        f"{_describe_reference(samples)}. The last line of each table shows the same number of real training images",
        "instead of generated ones: the value of a perfect model with this number of images. Its class agreement is",
        "that of all val images, since the classifier may know its training images by heart. FID falls with the number",
        "of images and depends on the network, so that it is only comparable for the same number of images, network",
        "and data. KID has no such bias. IS is measured only in networks that know the classes. Runs that differ only",
        "in their seed share a row: mean (lowest to highest value).",
    )
    # One table per network, in the order in which the networks were measured.
    for network in dict.fromkeys(row["network"] for row in samples):
        of_network = [row for row in samples if row["network"] == network]
        lines += ["", f"## In the features of {markdown(network)}", "", *_generation_lines(of_network, network)]
    if other_steps:
        first = other_steps[0]["network"]
        drawn = [*(row for row in samples if row["network"] == first and row["model"] != REAL), *other_steps]
        curves = [{**row, f"fid at {row['num_steps']}": row["fid"]} for row in drawn]
        steps = sorted({row["num_steps"] for row in drawn})
        columns = {f"T = {number}": _seeds(f"fid at {number}", partial(format_value, "fid")) for number in steps}
        lines += ["", f"## FID ({markdown(first)}) by number of steps T", ""]
        lines += ["An autoregressive model always takes a step per token.", "", *_model_table(curves, columns)]
    if costs:
        lines += ["", "## Time", "", *_cost_lines(costs)]
    if cas:
        lines += ["", "## Classification accuracy score", "", *_cas_lines(cas)]
    lines += ["", *describe_provenance(samples), "", "## Published", ""]
    lines += ["ImageNet, 50,000 images, Inception's features (arXiv:2202.04200, Table 1).", ""]
    headings = ["model", "size", "FID (inception)", "IS (inception)", "precision", "recall", "parameters", "steps",
                "CAS top-1", "CAS top-5"]  # fmt: skip
    lines += markdown_table(headings, _GENERATION)
    lines += ["", "![table-1](table-1.png)"]
    return Page("table-1", lines, [*samples, *other_steps, *cas, *costs])


_Cell: TypeAlias = Callable[[Sequence[Row]], str]


def _model_table(rows: Sequence[Row], columns: Mapping[str, _Cell], first: str = "model") -> list[str]:
    """Returns a table with a row for each model, whose seeds share it; real images come last."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["model"] == REAL):
        groups.setdefault(row.get("settings") or row["run"], []).append(row)
    cells = []
    for group in groups.values():
        model, backbone = _word(group[0], "model"), _word(group[0], "backbone")
        runs = dict.fromkeys(code_cell(row["run"]) for row in group)
        named = [f"{model} ({backbone})" if backbone else model, ", ".join(runs)]
        cells.append([*named, *(cell(group) for cell in columns.values())])
    return markdown_table([first, "run", *columns], cells, left=2)


def _seeds(name: str, text: Callable[[float], str] | None = None) -> _Cell:
    return lambda group: seeds_cell(group, name, text)


def _generation_lines(rows: Sequence[Row], network: str) -> list[str]:
    columns = {
        markdown(title(f"{name}/{network}" if name in _NAMED_AFTER_NETWORK else name)): _seeds(name)
        for name in metrics_of(rows)
        if name not in NO_COLUMN
    }
    columns |= {"parameters": lambda group: _millions(group[0]), "steps": lambda group: _word(group[0], "num_steps")}
    return _model_table(rows, columns)


def _cost_lines(costs: Sequence[Row]) -> list[str]:
    """Returns the times of decoding and of training of each model."""
    columns = {
        f"ms, batch {size}": _seeds(f"batch_{size}", lambda value: f"{1000 * value:.{1 + (value < 0.01)}f}")
        for size in BATCH_SIZES
    }
    columns["training, s"] = _seeds("training_seconds", "{:.0f}".format)
    devices = dict.fromkeys(markdown(cost["training_device"]) for cost in costs if cost["training_device"])
    return [
        *paragraph(
            "Milliseconds of the transformer per image, in batches of one image and of 64 that are evenly distributed",
            "over the classes, with the decoding of each model, guidance included, and without the tokenizer: medians",
            f"of runs that took turns, on {markdown(costs[0]['device'])}, torch {markdown(costs[0]['torch'])}.",
            "Autoregressive models have a KV cache.",
            "Training of stage 2: CPU seconds of all threads on a CPU, else wall-clock seconds, without validation, on",
            f"{' and '.join(devices) or 'an unknown device'}.",
        ),
        "",
        *_model_table(costs, columns),
    ]


def _cas_lines(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    lines = paragraph(
        f"A {_word(first, 'classifier')} was trained on {_word(first, 'training_images')} images of one kind for",
        f"{_word(first, 'training_steps')} steps, and tested on the {_word(first, 'real_images')} real val images.",
    )
    columns = {f"top-{k} %": _seeds(f"top{k}", lambda share: f"{100 * share:.2f}") for k in (1, 5)}
    return [*lines, "", *_model_table(rows, columns, "trained on images of")]


def make_editing_page(rows: Sequence[Row]) -> Page:
    """Returns the page of Table 2: outpainting and inpainting of val images."""
    lines = heading("Table 2: outpainting and inpainting")
    lines += paragraph(
        "Each val image is edited once: the model gets its class and its visible part, and generates the rest. The",
        f"results are compared with {_describe_reference(rows)}. `unedited` shows the same images without a change,",
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
    names = [name for name in metrics_of(rows) if name not in NO_COLUMN]
    return markdown_table(
        ["result", "run", "network", *map(title, names), "images", "steps"],
        [
            [_word(row, "model"), code_cell(row["run"]), _word(row, "network"),
             *(metric_cell(row, name) for name in names), _word(row, "num_images"), _word(row, "num_steps")]
            for row in rows
        ],
        left=3,
    )  # fmt: skip


def _describe_reference(rows: Sequence[Row]) -> str:
    """Returns the number and the source of the real images that the rows compare with."""
    sources = dict.fromkeys(
        f"{_word(row, 'real_images')} real images of {_reference_name(row)}"
        if row.get("real_images")
        else f"the statistics of {_reference_name(row)}"
        for row in rows
    )
    return " and ".join(sources)


def _reference_name(row: Mapping[str, Any]) -> str:
    """Returns the name of the split or file that a row compares with."""
    return markdown(row.get("reference_file") or f"the {row.get('split') or 'val'} split")


def describe_provenance(rows: Sequence[Row]) -> list[str]:
    """Returns a paragraph with the data, the code and the device of the rows; each value occurs once."""
    columns = {"data": "dataset", "data fingerprint": "data", "commit": "commit", "date": "date", "device": "device"}
    facts = [
        f"{name} " + ", ".join(
            markdown(value)
            for value in dict.fromkeys(str(row.get(column) or "")[: 12 if column == "commit" else None] for row in rows)
            if value
        )
        for name, column in columns.items()
    ]  # fmt: skip
    return paragraph(f"Measured on: {'; '.join(facts)}. The ledger has every row with its decoding and all digests.")


def _word(row: Mapping[str, Any], name: str) -> str:
    """Returns a word or count as Markdown, or an empty text if the row has none."""
    value = row.get(name)
    return "" if value is None else markdown(value)


def _millions(row: Mapping[str, Any]) -> str:
    value = row.get("parameters")
    return "" if value is None else f"{value / 1e6:.2f}M"
