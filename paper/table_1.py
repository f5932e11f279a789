"""Table 1 of the paper, class-conditional generation: our rows beside the published ones.

The published rows are measured on ImageNet with 50,000 images, in the features of Inception.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Table 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image

from maskgit_pl.cli import run_script
from maskgit_pl.cli.flags import Numbers, ReportFlags, Runs, write_page
from maskgit_pl.evaluation import (
    CASConfig,
    EvaluatedModel,
    Evaluator,
    check_cas,
    check_model_decoding,
    open_models,
)
from maskgit_pl.evaluation.ledger import REAL, Row
from maskgit_pl.evaluation.pages import (
    Page,
    choose_classes,
    code_cell,
    describe_provenance,
    describe_reference,
    format_value,
    heading,
    image_to_png,
    markdown,
    markdown_table,
    metrics_of,
    paragraph,
    seeds_cell,
    title,
    word_cell,
)
from maskgit_pl.grids import image_grid
from maskgit_pl.processes import progress_bars
from paper.timing import BATCH_SIZES, measure_costs

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
OTHER_STEPS = "FID by number of steps"  # purpose of rows whose T is not that of their model
SETTINGS = ("backbone", "settings")  # columns of the cost of a model that its other rows get
# Metrics that the table does not show, or elsewhere.
_NO_COLUMN = ("diversity", "seconds_per_image", "two_sample_auc", "brightness_spread", "contrast_spread", "weave")
_NAMED_AFTER_NETWORK = ("fid", "sfid", "kid", "is")


@dataclass(frozen=True)
class CasFlags:
    """The training of the classification accuracy score (CAS), up to the scale of the paper.

    Args:
        cas_model: timm network of the classification accuracy score (CAS), or none to skip it (default:
            resnet50, or resnet18 below 64 pixels).
        cas_images: Number of images that the network is trained on (default: --num-images).
        cas_max_steps: Training steps of that network.
        cas_batch_size: Images per training step.
        cas_precision: Training precision.
    """

    cas_model: str = CASConfig.model
    cas_images: int | None = None
    cas_max_steps: int = CASConfig.max_steps
    cas_batch_size: int = CASConfig.batch
    cas_precision: Literal["32-true", "bf16-mixed"] = CASConfig.precision

    def __post_init__(self) -> None:
        if self.cas_images is not None and self.cas_images < 1:
            raise ValueError(f"cas_images must be >= 1, got {self.cas_images}")
        check_cas(self.config)  # before anything is generated

    @property
    def config(self) -> CASConfig | None:
        """The training, or None if the score is skipped."""
        if self.cas_model == "none":
            return None
        return CASConfig(
            model=self.cas_model,
            max_steps=self.cas_max_steps,
            batch=self.cas_batch_size,
            precision=self.cas_precision,
        )


def table_1(
    runs: Runs = (),
    *,
    num_steps: Numbers = (),
    report: ReportFlags = ReportFlags(),
    accuracy_score: CasFlags = CasFlags(),
) -> None:
    """Writes Table 1: class-conditional generation, with the times of decoding and training.

    The page, RESULTS/DATASET/table-1.md with .csv and .png, has a row per model and the rows of the paper. Runs that
    differ only in their seed share a row. Measurements that the ledger of the results holds are reused.

    Example: python -m paper.table_1 runs/fashion-mnist-adaln --num-images 2000 --num-steps 1,2,4,8,16

    Args:
        runs: Run folders (runs/NAME) or pretrained folders of the same data.
        num_steps: Numbers of steps T, at which the FID of each MaskGIT is measured, too, in the first network.

    Raises:
        FileNotFoundError: if a run, the data or the classifier of the data do not exist.
        ValueError: if there is no run, the runs have different data or classes, or an option is out of range.
    """
    with progress_bars() as bars:
        evaluator, models = open_models(runs, report, bars)
        count, seed = report.num_images, report.seed
        curve = [
            (index, model.pipe.decoding_with(num_steps=number))
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
        rows += evaluator.measure_real(num_images=count, model=models[0]).values()  # tokens are those of the first
        first, *_ = evaluator.networks
        measure = partial(evaluator.measure_samples, num_images=count, seed=seed, networks=[first], metrics="fast")
        other_steps = [
            measure(models[index], decoding, purpose=OTHER_STEPS)[first] | marks[index] for index, decoding in curve
        ]
        scores = _measure_scores(evaluator, models, marks, accuracy_score, report)
    page = make_generation_page(rows, scores, costs, other_steps)
    # The sheet has the first seed of each model.
    shown = {cost["settings"]: model for cost, model in reversed(list(zip(costs, models, strict=True)))}
    sheet = image_to_png(_draw_samples(evaluator, [*reversed(shown.values())], seed))
    write_page(replace(page, folder=report.results / evaluator.dataset, pictures={"table-1.png": sheet}))


def _measure_scores(
    evaluator: Evaluator,
    models: Sequence[EvaluatedModel],
    marks: Sequence[Row],
    flags: CasFlags,
    report: ReportFlags,
) -> list[Row]:
    """Measures the CAS of each model and of real images; no rows without the score."""
    if flags.config is None:
        return []
    count = min(flags.cas_images or report.num_images, evaluator.data.summary.samples["train"])
    measure = partial(evaluator.measure_cas, config=flags.config, num_images=count, seed=report.seed)
    scores = [measure(model, model.pipe.decoding) | mark for model, mark in zip(models, marks, strict=True)]
    return [*scores, measure(None, None)]


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


def make_generation_page(
    samples: Sequence[Row], cas: Sequence[Row], costs: Sequence[Row] = (), other_steps: Sequence[Row] = ()
) -> Page:
    """Returns the page of Table 1. Rows with equal ``settings`` are the seeds of a model.

    ``samples`` has rows of real images, too; ``other_steps`` rows at other T, in the first network.
    """
    counts = ", ".join(dict.fromkeys(word_cell(row, "num_images") for row in samples))
    lines = heading("Table 1: class-conditional generation")
    lines += paragraph(
        f"{counts} images of each model, evenly distributed over the classes, are compared with",
        f"{describe_reference(samples)}. The last line of each table shows the same number of real training images",
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
        model, backbone = word_cell(group[0], "model"), word_cell(group[0], "backbone")
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
        if name not in _NO_COLUMN
    }
    columns |= {
        "parameters": lambda group: _millions(group[0]),
        "steps": lambda group: word_cell(group[0], "num_steps"),
    }
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
        f"A {word_cell(first, 'classifier')} was trained on {word_cell(first, 'training_images')} images of one kind",
        f"for {word_cell(first, 'training_steps')} steps, and tested on the {word_cell(first, 'real_images')} real val",
        "images.",
    )
    columns = {f"top-{k} %": _seeds(f"top{k}", lambda share: f"{100 * share:.2f}") for k in (1, 5)}
    return [*lines, "", *_model_table(rows, columns, "trained on images of")]


def _millions(row: Mapping[str, Any]) -> str:
    value = row.get("parameters")
    return "" if value is None else f"{value / 1e6:.2f}M"


if __name__ == "__main__":
    sys.exit(run_script(table_1, prog="python -m paper.table_1"))
