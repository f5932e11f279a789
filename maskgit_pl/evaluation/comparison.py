"""``compare``: measures token selectors at several numbers of steps, all with the same noise, and writes a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.folders import check_model_decoding, find_run, open_data, open_evaluator, open_model
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.metrics import title
from maskgit_pl.evaluation.options import ComparisonOptions, Spec, default_steps, round_to_classes, with_steps
from maskgit_pl.evaluation.pages import (
    Page,
    choose_classes,
    describe_provenance,
    heading,
    image_to_png,
    markdown_table,
    metric_cell,
    metrics_of,
    paragraph,
)
from maskgit_pl.grids import image_grid
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.registry import describe
from maskgit_pl.text import markdown

_STEPS = (4, 8, 16, 32)
_SHEET_STEPS = 8
_DISTANCES = ("fid", "kid")


def compare(
    run: Path | str,
    *,
    data: Path | None = None,
    selectors: Sequence[Spec] | None = None,
    num_steps: Sequence[int] | None = None,
    num_images: int = 1000,
    out: Path | None = None,
    options: ComparisonOptions | None = None,
    bars: Bars = no_bars,
) -> Page:
    """Measures token selectors of one model with the same noise, and writes a page, a CSV and a sheet of images.

    Measurements that the ledger holds are reused.

    Args:
        run: Run folder or pretrained folder.
        data: Data folder; None for the data that the run was trained on.
        selectors: Names and mappings; None for all selectors.
        num_steps: Numbers of decoding steps; None for 4, 8, 16 and 32, as far as there are tokens.
        num_images: Number of images per row, at least 2 per class.
        out: Folder of the page and the ledger; None for ``RUN/comparison`` and ``RUN/evaluation``.
        options: Guidance, seed and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the run or the data do not exist.
        TypeError: if a selector or a guidance schedule does not accept its arguments.
        ValueError: if a name is unknown, the model is autoregressive, the classes of the data are not the
            model's, or a number is out of range.
    """
    options = options or ComparisonOptions()
    folders = find_run(run, data=data)
    model = open_model(folders, options.device, dtype=options.dtype, negative_model=options.negative_model, out=out)
    pipe = model.pipe
    pipe.transformer.schedule_for("compare")
    # Few steps first, since they are fast: a command that is stopped early has complete comparisons.
    steps = sorted(num_steps or default_steps(pipe.transformer.network.config.num_tokens, _STEPS))
    assert pipe.decoding.token_selector is not None  # the model is not autoregressive
    specs = label_selectors(selectors, pipe.decoding.token_selector)
    base = pipe.decoding_with(guidance=options.guidance, guidance_scale=options.guidance_scale)
    plan = {
        (number, label): replace(with_steps(base, number), token_selector=spec)
        for number, (label, spec) in product(steps, specs.items())
    }
    for decoding in plan.values():  # all are checked before the first one is measured
        check_model_decoding(pipe, decoding)
    images = open_data(folders, pipe, num_workers=options.num_workers)
    count = round_to_classes(num_images, images.num_classes)
    ledger = Ledger(model.folder / FILE_NAME)
    evaluator = open_evaluator(folders, images, ledger, device=pipe.device, batch_size=options.batch_size, bars=bars)

    (real,) = evaluator.measure_real(num_images=count, metrics="fast").values()
    rows, advance = list[Row](), bars("token selectors", len(plan))
    for (_, label), decoding in plan.items():
        measured = evaluator.measure_samples(
            model, decoding, num_images=count, seed=options.seed, metrics="fast", purpose=f"selector {label}"
        )
        rows += [{"selector": label, **row} for row in measured.values()]
        advance(1)
    # The ledger keeps no images: those of the sheet are generated for it. A column has one class and one noise.
    sheet_steps = min(steps, key=lambda number: (abs(number - _SHEET_STEPS), number))
    classes = choose_classes(images.num_classes)
    parts = [
        torch.as_tensor(pipe.generate(classes, decoding=plan[sheet_steps, label], seed=options.seed, output_type="pt"))
        for label in specs
    ]
    sheet = image_grid(
        torch.cat(parts),
        columns=len(classes),
        row_captions=list(specs),
        column_captions=[pipe.class_names[label] for label in classes],
    )
    page = make_comparison_page(rows, real, sheet_steps=sheet_steps)
    page = replace(page, folder=out or folders.run / "comparison", pictures={"selectors.png": image_to_png(sheet)})
    page.write()
    return page


def make_comparison_page(rows: Sequence[Row], real: Row, *, sheet_steps: int) -> Page:
    """Returns the page of a comparison: an introduction, the FID of each selector over T, and a table of all values."""
    first = rows[0]
    lines = heading("Comparison of token selectors")
    lines += paragraph(
        f"{first['num_images']} images per row, evenly distributed over the classes, seed {first['seed']}. Image i of",
        "every row has the same noise. FID and KID are the Frechet and the kernel distance from all",
        f"{first['real_images']} real val images, in the features of the data set's own classifier and not of",
        f"Inception; only values from {first['num_images']} images are comparable. The classifier is correct for",
        f"{real['class_agreement']:.1%} of the real val images. The last line shows {real['num_images']} real training",
        "images instead of generated ones. The lowest distance of each T is bold. If the class agreement is above that",
        "of real images, the generated images are more typical than real ones; their diversity is then low. Times are",
        "wall-clock times on one machine.",
    )
    lines += ["", *describe_provenance(rows), "", "![one row per selector, one column per class](selectors.png)", ""]
    lines += [f"`selectors.png`: T = {sheet_steps}, one row per selector, one column per class and noise.", ""]

    steps = sorted({row["num_steps"] for row in rows})
    fid_cells = {(row["selector"], row["num_steps"]): _cell(rows, row, "fid") for row in rows}
    cells = [
        [markdown(label), *(fid_cells.get((label, number), "") for number in steps)]
        for label in dict.fromkeys(row["selector"] for row in rows)
    ]
    cells.append([f"real images, {real['num_images']}", *[metric_cell(real, "fid")] * len(steps)])
    lines += ["## FID by number of steps T (lower is better)", ""]
    lines += markdown_table(["token selector", *(f"T = {number}" for number in steps)], cells)

    columns, ordered = metrics_of(rows), sorted(rows, key=lambda row: (row["num_steps"], row["fid"]))
    cells = [
        [str(row["num_steps"]), markdown(row["selector"]), *(_cell(rows, row, name) for name in columns)]
        for row in ordered
    ]
    cells.append(["", "real images", *(metric_cell(real, name) for name in columns)])
    lines += ["", "## All metrics", ""]
    lines += markdown_table(["T", "token selector", *map(title, columns)], cells, left=2)
    return Page("comparison", lines, ordered)


def _cell(rows: Sequence[Row], row: Row, name: str) -> str:
    """Returns a value as text; the lowest distance of each number of steps is bold."""
    cell = metric_cell(row, name)
    if name not in _DISTANCES or not cell:
        return cell  # of the other values, higher or lower is not always better
    least = min(other[name] for other in rows if other["num_steps"] == row["num_steps"])
    return f"**{cell}**" if row[name] == least else cell


def label_selectors(selectors: Sequence[Spec] | None, model_selector: Spec) -> dict[str, Spec]:
    """Returns the selectors to compare, by label; None for all that require no argument.

    A selector that is given by name takes the choice temperature of the model's own selector, if both have
    one, so that selectors are compared at equal randomness. A mapping is used as it is.

    Raises:
        ValueError: if a name is unknown, or a number is out of range.
    """
    temperature = getattr(token_selectors.build(model_selector), "choice_temperature", None)
    labelled: dict[str, Spec] = {}
    for spec in token_selectors.build_all() if selectors is None else selectors:
        has_one = hasattr(token_selectors.build(spec), "choice_temperature")
        if has_one and temperature is not None and isinstance(spec, str):
            labelled[spec] = {"name": spec, "choice_temperature": temperature}
        else:
            labelled[describe(spec)] = spec
    return labelled
