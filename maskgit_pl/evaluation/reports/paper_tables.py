"""Tables 1 to 3 and Figure 8 of the paper: the measurements, and the pages with the published rows of the paper.

``api`` opens the runs with ``open_models`` and calls one of the ``measure_*`` functions. Rows that the ledger holds are
read from it. Our rows have separate tables per feature network, because values of different networks, data or numbers
of images are not comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from maskgit_pl.checks import pixels_text
from maskgit_pl.errors import code_span, markdown
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
from maskgit_pl.evaluation.generation import Task, edit, hide_pixels
from maskgit_pl.evaluation.ledger import FILE_NAME, REAL, Ledger, Row, has_column, read_number
from maskgit_pl.evaluation.metrics import computed_metrics, format_value, metric_name, title
from maskgit_pl.evaluation.opening import (
    check_data,
    create_evaluated_model,
    give_val_vectors,
    open_data,
    open_evaluator,
    open_model,
)
from maskgit_pl.evaluation.options import PLOT_STEPS, CASConfig
from maskgit_pl.evaluation.pages import (
    Page,
    choose_classes,
    code_cell,
    heading,
    image_to_png,
    markdown_table,
    paragraph,
)
from maskgit_pl.evaluation.reports.options import ReportOptions
from maskgit_pl.evaluation.reports.schedule_ablation import (
    CLASSIFIER_ON_REAL_IMAGES,
    EDITING,
    GENERATION,
    SCHEDULES,
    PublishedGeneration,
    ScheduleResult,
    ablate,
    check_budgets,
    draw_figure_8,
)
from maskgit_pl.evaluation.run_folders import RunFolders, read_run_recipe
from maskgit_pl.pipeline.grids import image_grid
from maskgit_pl.processes import Bars

__all__ = [
    "FORMULAS",
    "TASKS",
    "OpenedModels",
    "compare_with_paper",
    "make_editing_page",
    "make_generation_page",
    "make_schedule_page",
    "measure_editing",
    "measure_generation",
    "measure_schedules",
    "open_models",
]

FORMULAS = {  # gamma(r) as Table 3 prints it; exp and log as in the released code
    "exp": "1 - 2^(-log2(N) (1 - r))",
    "cubic": "1 - r^3",
    "square": "1 - r^2",
    "cosine": "cos(pi r / 2)",
    "linear": "1 - r",
    "sqrt": "1 - r^0.5",
    "log": "-log2(r) / log2(N)",
}
TASKS: dict[Task, str] = {
    "outpaint-right": "outpainting, the right 50 %",
    "inpaint-centre": "inpainting, the centre 50 % x 50 %",
}
_NAMED_AFTER_NETWORK = ("fid", "sfid", "kid", "is")
_SHOWN_DIGITS = 8
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


def measure_generation(opened: OpenedModels, cas: CASConfig | None, cas_images: int | None) -> Page:
    """Measures Table 1: class-conditional generation.

    Args:
        opened: Models and options.
        cas: Training of the classification accuracy score; None leaves the score out.
        cas_images: Number of training images of the score; None for that of a row.
    """
    evaluator, count, seed = opened.evaluator, opened.options.num_images, opened.options.seed
    rows: list[Row] = []
    for model in opened.models:
        rows += evaluator.measure_samples(model, model.pipe.decoding, num_images=count, seed=seed).values()
    rows += evaluator.measure_real(num_images=count).values()
    scores = [] if cas is None else _accuracy_scores(opened, cas, cas_images or count)
    page = make_generation_page(rows, scores, command=opened.command)
    return replace(page, folder=opened.folder, pictures={"table-1.png": image_to_png(_sheet(opened))})


def _accuracy_scores(opened: OpenedModels, cas: CASConfig, num_images: int) -> list[Row]:
    """Returns the rows of the classification accuracy score of each model, and of the same number of real images."""
    evaluator, seed = opened.evaluator, opened.options.seed
    count = min(num_images, evaluator.data.summary.samples["train"])
    return [
        *(evaluator.measure_cas(each, each.pipe.decoding, cas, num_images=count, seed=seed) for each in opened.models),
        evaluator.measure_cas(None, None, cas, num_images=count, seed=seed),
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


def make_generation_page(samples: Sequence[Row], cas: Sequence[Row], *, command: str) -> Page:
    """Returns the page of Table 1: class-conditional generation.

    Args:
        samples: Rows of generated images and of real images.
        cas: Rows of the classification accuracy score; empty leaves it out.
        command: Command that produces the page.
    """
    lines = [*heading("Table 1: class-conditional generation", command), *_explain(samples), ""]
    # One table per network, in the order in which the networks were measured.
    for network in dict.fromkeys(row["network"] for row in samples):
        own = [row for row in samples if row["network"] == network]
        lines += [f"## In the features of {markdown(network)}", "", *_generation_lines(own), ""]
    if cas:
        lines += ["## Classification accuracy score", "", *_cas_lines(cas), ""]
    lines += [*_describe_provenance(samples), "", "## Published", "", *_published_generation()]
    return _make_page("table-1", lines, [*samples, *cas], picture="table-1.png")


def _explain(rows: Sequence[Row]) -> list[str]:
    counts = ", ".join(dict.fromkeys(_word(row, "num_images") for row in rows))
    return paragraph(
        f"{counts} images of each model, evenly distributed over the classes, are compared with",
        f"{_describe_reference(rows)}. The last line of each table shows the same number of real training images",
        "instead of generated ones: the value of a perfect model with this number of images. FID falls with the number",
        "of images and depends on the network, so that it is only comparable for the same number of images, network",
        "and data. KID has no such bias. IS is measured only in networks that know the classes.",
    )


def _generation_lines(rows: Sequence[Row]) -> list[str]:
    network = str(rows[0]["network"])
    # A column is left out if no row has the metric, e.g. IS in a network that does not know the classes.
    shown = _shown_metrics(rows)
    headings = [markdown(title(metric_name(name, network) if name in _NAMED_AFTER_NETWORK else name)) for name in shown]
    # Real images come last, below the models.
    models = [row for row in rows if row["model"] != REAL] + [row for row in rows if row["model"] == REAL]
    return markdown_table(
        ["model", "run", *headings, "parameters", "steps", "ms per image"],
        [
            [_word(row, "model"), code_cell(row["run"]), *(_cell(row, name) for name in shown), _millions(row),
             _word(row, "num_steps"), _cell(row, "seconds_per_image")]
            for row in models
        ],
        left=2,
    )  # fmt: skip


def _shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Returns the metrics that any row has; diversity is shown for variants of a model, not for models."""
    return [name for name in computed_metrics() if name != "diversity" and has_column(rows, name)]


def _cas_lines(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    lines = paragraph(
        f"A {_word(first, 'classifier')} was trained on {_word(first, 'training_images')} images of one kind for",
        f"{_word(first, 'training_steps')} steps, and tested on the {_word(first, 'real_images')} real val images.",
    )
    cells = [
        [f"{_word(row, 'model')} {code_cell(row['run'])}".strip(),
         *(f"{100 * float(row[name]):.2f}" for name in ("top1", "top5"))] for row in rows
    ]  # fmt: skip
    return [*lines, "", *markdown_table(["trained on images of", "top-1 %", "top-5 %"], cells)]


def _published_generation() -> list[str]:
    def decimals(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    def cells(row: PublishedGeneration) -> list[str]:
        quality = [decimals(row.fid), row.inception_score or "", decimals(row.precision), decimals(row.recall)]
        cost = [row.parameters, row.steps]
        return [row.model, str(row.size), *quality, *cost, decimals(row.cas_top1), decimals(row.cas_top5)]

    real = ["classifier trained on real images", *[""] * 7, *map(str, CLASSIFIER_ON_REAL_IMAGES)]
    headings = ["model", "size", "FID (inception)", "IS (inception)", "precision", "recall", "parameters", "steps",
                "CAS top-1", "CAS top-5"]  # fmt: skip
    lines = ["ImageNet, 50,000 images, Inception's features (arXiv:2202.04200, Table 1).", ""]
    return lines + markdown_table(headings, [*map(cells, GENERATION), real])


def make_editing_page(rows: Sequence[Row], *, command: str) -> Page:
    """Returns the page of Table 2: outpainting and inpainting of val images.

    Args:
        rows: Rows of edited, masked and unedited images.
        command: Command that produces the page.
    """
    lines = [*heading("Table 2: outpainting and inpainting", command)]
    lines += paragraph(
        "Each val image is edited once: the model gets its class and its visible part, and generates the rest. The",
        f"results are compared with {_describe_reference(rows)}. `unedited` shows the same images without a change,",
        "and `masked` shows them with grey pixels in the part to generate: these are the best and the worst case. The",
        "part to generate consists of whole tokens: the right half is rounded up and the centre is rounded down. Of",
        "7 x 7 tokens, these are 4 columns, or 3 x 3 tokens.",
    )
    lines += [""]
    for task, name in TASKS.items():
        own = [row for row in rows if row["task"] == task]
        if own:
            lines += [f"## {name[0].upper()}{name[1:]}", "", *_editing_lines(own), "", *_published_editing(task), ""]
    return _make_page("table-2", [*lines, *_describe_provenance(rows)], rows, picture="table-2.png")


def _editing_lines(rows: Sequence[Row]) -> list[str]:
    shown = _shown_metrics(rows)
    return markdown_table(
        ["result", "run", "network", *map(title, shown), "images", "steps"],
        [
            [_word(row, "model"), code_cell(row["run"]), _word(row, "network"), *(_cell(row, name) for name in shown),
             _word(row, "num_images"), _word(row, "num_steps")]
            for row in rows
        ],
        left=3,
    )  # fmt: skip


def _published_editing(task: Task) -> list[str]:
    cells = [
        [row.model, str(row.size), f"{row.fid:.2f}", f"{row.inception_score:.2f}"]
        for row in EDITING
        if row.task == task
    ]
    headings = ["published, Places2", "size", "FID (inception)", "IS (inception)"]
    return markdown_table(headings, cells)


def make_schedule_page(results: Sequence[ScheduleResult], *, command: str) -> Page:
    """Returns the page of Table 3: mask schedules, each used in the training and the decoding of its model.

    Args:
        results: Results of the schedules in the order of the paper's table; see ``ablate``.
        command: Command that produces the page.
    """
    networks = list(dict.fromkeys(network for result in results for network in result.fresh))
    any_row = next(iter(results[0].fresh.values()))
    rows = [row for result in results for row in result.fresh.values()]
    fids = {result.schedule: float(result.fresh[networks[0]]["fid"]) for result in results}
    lines = heading("Table 3: mask schedules", command)
    steps = ", ".join(map(str, sorted(results[0].curve)))
    lines += paragraph(
        "Each schedule has its own model, trained and decoded with this schedule. All models have the same training",
        f"budget, and are decoded without guidance at T in {{{steps}}}. The best T has the lowest",
        f"fid/{markdown(networks[0])}; the values next to it are measured again at this T, with other noise",
        f"({any_row['num_images']} images). NLL is the mean negative log-likelihood per masked token in nats, under",
        "the masks of the schedule, as in the paper. It falls if fewer tokens are masked, so that it does not compare",
        "models. The bound is the order-agnostic ELBO in bits per token, which is comparable for all schedules (lower",
        "is better).",
    )
    lines += ["", *_schedule_lines(results, networks), "", *compare_with_paper(fids, networks[0]), ""]
    flat = [_flatten(result, networks) for result in results]
    return _make_page("table-3", [*lines, *_describe_provenance(rows)], flat, picture="figure-8.png")


def _schedule_lines(results: Sequence[ScheduleResult], networks: Sequence[str]) -> list[str]:
    published = {row.schedule: row for row in SCHEDULES}
    # IS has a column only for networks that know the classes.
    scored = [network for network in networks if has_column([result.fresh[network] for result in results], "is")]
    headings = ["schedule", "gamma(r)", "best T", *(f"FID ({markdown(name)})" for name in networks)]
    headings += [*(f"IS ({markdown(name)})" for name in scored), "NLL", "bound, bits", "paper: T", "FID", "IS", "NLL"]
    cells = []
    for result in results:
        likelihood, paper = result.likelihood, published.get(result.schedule)
        row = [code_span(result.schedule), FORMULAS.get(result.schedule, ""), str(result.best_steps)]
        row += [_cell(result.fresh[name], "fid") for name in networks]
        row += [_cell(result.fresh[name], "is") for name in scored]
        row += [_with_error(likelihood, "masked_nll"), _with_error(likelihood, "elbo_bits_per_token")]
        if paper is not None:
            row += [str(paper.best_steps), f"{paper.fid:.2f}", f"{paper.inception_score:.1f}", f"{paper.nll:.2f}"]
        # A schedule that the paper does not have gets empty cells in the paper's columns.
        cells.append(row + [""] * (len(headings) - len(row)))
    return markdown_table(headings, cells, left=2)


def _with_error(row: Mapping[str, Any], name: str) -> str:
    value, error = read_number(row, name), read_number(row, f"{name}_error")
    return "" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def compare_with_paper(fids: Mapping[str, float], network: str) -> list[str]:
    """Returns a paragraph that compares our order of the schedules with the paper's.

    Args:
        fids: Our FIDs by schedule.
        network: Label of the network of the FIDs.
    """
    paper = {row.schedule: row.fid for row in SCHEDULES if row.schedule in fids}
    if len(paper) < 2:
        return ["Fewer than two schedules of the paper were measured, so that their order cannot be compared."]
    ours = sorted(paper, key=lambda name: fids[name])
    theirs = sorted(paper, key=lambda name: paper[name])
    pairs = list(combinations(theirs, 2))  # (better, worse) in the paper
    agreeing = sum(fids[better] < fids[worse] for better, worse in pairs)
    verdict = "holds here" if ours == theirs else "does not hold here"
    return paragraph(
        f"**The paper's order {verdict}.** By the paper's FID, the order is {' < '.join(theirs)}. By our",
        f"fid/{markdown(network)}, it is {' < '.join(f'{name} {fids[name]:.2f}' for name in ours)}. {agreeing} of",
        f"{len(pairs)} pairs are in the paper's order; a random order has half of them. Each schedule has one training",
        "and one set of noise, so that small differences do not rank schedules.",
    )


def _flatten(result: ScheduleResult, networks: Sequence[str]) -> dict[str, object]:
    # The row of the CSV: values of all networks, likelihoods, and the FID at every T.
    flat: dict[str, object] = {"schedule": result.schedule, "run": result.run, "best_steps": result.best_steps}
    for network in networks:
        row = result.fresh[network]
        flat |= {f"{name}/{network}": row[name] for name in _shown_metrics([row])}
    flat |= {name: cell for name, cell in result.likelihood.items() if "nll" in name or "elbo" in name}
    flat |= {f"fid/{networks[0]} at T = {steps}": value for steps, value in sorted(result.curve.items())}
    kept = ("num_images", "parameters", "commit", "date", "dataset", "data", "transformer", "tokenizer", "config",
            "judge", "reference")  # fmt: skip
    return flat | {name: result.fresh[networks[0]].get(name, "") for name in kept}


def _make_page(name: str, lines: Sequence[str], rows: Sequence[Mapping[str, Any]], *, picture: str) -> Page:
    shown = f"![{picture.removesuffix('.png')}]({picture})"
    return Page(name, "\n".join([*lines, "", shown, ""]), rows)


def _describe_reference(rows: Sequence[Row]) -> str:
    """Returns the number and the source of the real images that the rows compare with."""
    found = dict.fromkeys(
        f"{_word(row, 'real_images')} real images of {_reference_name(row)}"
        if row.get("real_images")
        else f"the statistics of {_reference_name(row)}"
        for row in rows
    )
    return " and ".join(found)


def _reference_name(row: Mapping[str, Any]) -> str:
    """Returns the name of the split or file that a row compares with."""
    return markdown(row.get("reference_file") or f"the {row.get('split') or 'val'} split")


def _describe_provenance(rows: Sequence[Row]) -> list[str]:
    """Returns two paragraphs: data, code and device of the rows; digests of references, networks and models."""
    # Each value occurs once, although all rows repeat it.
    facts = []
    for name, column in (("data", "dataset"), ("data fingerprint", "data"), ("commit", "commit"), ("date", "date"),
                         ("device", "device")):  # fmt: skip
        values = dict.fromkeys(str(row.get(column) or "")[: 12 if column == "commit" else None] for row in rows)
        facts.append(f"{name} {', '.join(markdown(value) for value in values if value)}")
    compared = _join_names(rows, _reference_name, "reference")
    networks = _join_names(rows, lambda row: _word(row, "network"), "judge")
    models = dict.fromkeys(
        f"{code_cell(row['run'])} tokenizer {_digest(row, 'tokenizer')}, transformer {_digest(row, 'transformer')}"
        for row in rows
        if row.get("run")
    )
    return [
        *paragraph(f"Measured on: {'; '.join(facts)}. The ledger has every row with its decoding."),
        "",
        *paragraph(
            f"First digits of SHA-256. Reference: {compared}. Weights of the feature networks: {networks}. Weights of",
            f"the models: {'; '.join(models) or 'none'}.",
        ),
    ]


def _join_names(rows: Sequence[Row], name: Callable[[Row], str], digest: str) -> str:
    return ", ".join(dict.fromkeys(f"{name(row)} {_digest(row, digest)}" for row in rows))


def _digest(row: Mapping[str, Any], name: str) -> str:
    """Returns the first digits of a digest, which a row may lack."""
    return markdown(str(row.get(name) or "")[:_SHOWN_DIGITS]) or "not recorded"


def _cell(row: Mapping[str, Any], name: str) -> str:
    """Returns a value as text, or an empty cell if the row has none."""
    value = read_number(row, name)
    return "" if value is None else format_value(name, value)


def _word(row: Mapping[str, Any], name: str) -> str:
    """Returns a word or count as Markdown, or an empty text if the row has none."""
    value = row.get(name)
    return "" if value is None else markdown(value)


def _millions(row: Mapping[str, Any]) -> str:
    value = read_number(row, "parameters")
    return "" if value is None else f"{value / 1e6:.2f}M"
