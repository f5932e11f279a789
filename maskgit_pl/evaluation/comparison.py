"""``compare``: measures token selectors at several numbers of steps, all with the same noise.

It measures the rows that the ledger lacks, and writes a page and a sheet of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import Remasking, token_selectors
from maskgit_pl.errors import markdown
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, collect_numbers
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.metrics import Metrics, format_value, title
from maskgit_pl.evaluation.opening import (
    check_model_decoding,
    create_evaluated_model,
    find_run,
    open_data,
    open_evaluator,
    open_model,
)
from maskgit_pl.evaluation.options import (
    ComparisonOptions,
    Spec,
    decoding_key,
    default_steps,
    round_to_classes,
    with_steps,
)
from maskgit_pl.evaluation.pages import (
    Page,
    choose_classes,
    command_line,
    heading,
    image_to_png,
    markdown_table,
    paragraph,
    terminal_table,
    terminal_word,
)
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.grids import image_grid
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.registry import describe

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Comparison",
    "MeasuredSelector",
    "compare",
    "draw_selector_sheet",
    "label_selectors",
    "list_selectors",
    "measure_real",
]

_STEPS = (4, 8, 16, 32)
_SHEET_STEPS = 8
_FID = "fid/classifier"
_DISTANCES = (_FID, "kid/classifier")
_COLUMNS = ("class_agreement", *_DISTANCES, "diversity", "steps_taken", "seconds_per_image")


@dataclass(frozen=True)
class MeasuredSelector:
    """A token selector at one number of steps, with its measured values.

    Args:
        label: Name of the selector, and the arguments that distinguish it.
        decoding: The decoding.
        numbers: Values by name, such as ``fid/classifier``.
    """

    label: str
    decoding: DecodingConfig
    numbers: Mapping[str, float]

    @property
    def num_steps(self) -> int:
        """The number T of steps."""
        return self.decoding.num_steps


@dataclass(frozen=True)
class Comparison:
    """A comparison of token selectors.

    Args:
        results: The selectors at each number of steps.
        real: Values of real training images instead of generated ones; ``class_agreement`` is the accuracy of the
            classifier on the val images.
        num_images: Number of images per selector and number of steps.
        seed: Seed of the first image.
        folder: Folder of the page, the CSV and the sheet.
        num_measured: Number of rows that the ledger lacked.
    """

    results: tuple[MeasuredSelector, ...]
    real: Mapping[str, float]
    num_images: int
    seed: int
    folder: Path = Path()
    num_measured: int = 0

    @property
    def ordered(self) -> list[MeasuredSelector]:
        """The results sorted by number of steps, then by FID."""
        return sorted(self.results, key=lambda row: (row.num_steps, row.numbers[_FID]))

    @property
    def sheet_steps(self) -> int:
        """The number of steps of the sheet of images: 8, or the closest one that was measured."""
        return min((row.num_steps for row in self.results), key=lambda steps: (abs(steps - _SHEET_STEPS), steps))

    @property
    def columns(self) -> list[str]:
        """The names of the values on the page: those of the terminal's table, then those of other metrics."""
        names = (name for row in self.results for name in row.numbers if "_deviation" not in name)
        return list(dict.fromkeys((*_COLUMNS, *names)))

    def table(self) -> Table:
        """Returns a table for the terminal, with the lowest distances of each number of steps in bold."""
        above = f"{self.num_images} images each, seed {self.seed}, the same noise for all"
        cells = self._iter_cells(_COLUMNS, terminal_word, "[bold]{}[/]")
        return terminal_table(above, _headings(_COLUMNS), cells, left=2)

    def page(self, command: str, introduction: Sequence[str]) -> Page:
        """Returns the page: an introduction, a table of the distances, and a table of all values.

        Args:
            command: Command that produces the page.
            introduction: Lines of Markdown.
        """
        lines = [*heading("Comparison of token selectors", command), *introduction, ""]
        lines += ["![one row per selector, one column per class](selectors.png)", ""]
        lines += [f"`selectors.png`: T = {self.sheet_steps}, one row per selector, one column per class and noise.", ""]
        lines += [f"## {_FID} by number of steps T (lower is better)", "", *self._format_distances(), ""]
        rows = [row for row in self._iter_cells(self.columns, markdown, "**{}**") if row]
        lines += ["## All metrics", "", *markdown_table(_headings(self.columns), rows, left=2)]
        values = [
            {
                "selector": row.label,
                "num_steps": row.num_steps,
                **{name: row.numbers.get(name) for name in self.columns},
                "decoding": decoding_key(row.decoding),
            }
            for row in self.ordered
        ]
        return Page("comparison", "\n".join(lines) + "\n", values, folder=self.folder)

    def _iter_cells(self, columns: Sequence[str], word: Callable[[str], str], bold: str) -> Iterator[list[str]]:
        """Yields the cells of each row, an empty row after each number of steps, and the row of real images.

        Args:
            columns: Names of the values.
            word: Escapes a text for the markup of the table.
            bold: Format of the lowest distance of each number of steps.
        """
        for steps, rows in groupby(self.ordered, key=lambda row: row.num_steps):
            for row in rows:
                yield [str(steps), word(row.label), *(self._cell(row, name, bold) for name in columns)]
            yield []
        real = {"diversity": 1.0, **self.real}
        yield ["", "real images", *(format_value(name, real[name]) if name in real else "" for name in columns)]

    def _cell(self, row: MeasuredSelector, name: str, bold: str) -> str:
        """Returns a value as text; the lowest distance of its number of steps is bold."""
        if name not in row.numbers:
            return ""
        cell = format_value(name, row.numbers[name])
        if name not in _DISTANCES:
            return cell  # of the other values, higher or lower is not always better
        least = min(other.numbers[name] for other in self.results if other.num_steps == row.num_steps)
        return bold.format(cell) if row.numbers[name] == least else cell

    def _format_distances(self) -> list[str]:
        steps = sorted({row.num_steps for row in self.results})
        cells: dict[str, dict[int, str]] = {}
        for row in self.results:
            cells.setdefault(row.label, {})[row.num_steps] = self._cell(row, _FID, "**{}**")
        rows = [[markdown(label), *(line.get(number, "") for number in steps)] for label, line in cells.items()]
        rows += [[f"real images, {self.real['num_images']}", *[format_value(_FID, self.real[_FID])] * len(steps)]]
        return markdown_table(["token selector", *(f"T = {number}" for number in steps)], rows)


def _headings(columns: Sequence[str]) -> list[str]:
    return ["T", "token selector", *map(title, columns)]


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
) -> Comparison:
    """Measures token selectors of one model with the same noise, and writes a page, a CSV and a sheet of images.

    Args:
        run: Run folder or pretrained folder.
        data: Data folder; None for the data that the run was trained on.
        selectors: Names and mappings; None for all selectors, ``remdm`` with each strategy.
        num_steps: Numbers of decoding steps; None for 4, 8, 16 and 32, as far as there are tokens.
        num_images: Number of images per row, at least 2 per class.
        out: Folder of the page and the ledger; None for ``RUN/comparison`` and ``RUN/evaluation``.
        options: Guidance, seed and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the run or the data do not exist.
        TypeError: if a selector or a guidance schedule does not accept its arguments.
        ValueError: if a name is unknown, the model is autoregressive, the classes of the data are not the model's, or a
            number is out of range.
    """
    options = options or ComparisonOptions()
    folders = find_run(run, data=data, classifier=options.classifier)
    pipe = open_model(folders, options.device, dtype=options.dtype, negative_model=options.negative_model)
    pipe.outline.check_parallel("compare")
    # Few steps first, since they are fast: a command that is stopped early has complete comparisons.
    steps = sorted(num_steps or default_steps(pipe.outline.num_tokens, _STEPS))
    assert pipe.decoding.token_selector is not None  # the model is not autoregressive
    specs = label_selectors(selectors, pipe.decoding.token_selector)
    base = pipe.decoding_with(guidance=options.guidance, guidance_scale=options.guidance_scale)
    plan = [
        (label, replace(with_steps(base, number), token_selector=spec))
        for number, (label, spec) in product(steps, specs.items())
    ]
    for _, decoding in plan:  # all are checked before the first one is measured
        check_model_decoding(pipe, decoding)
    images = open_data(folders, pipe, num_workers=options.num_workers)
    count = round_to_classes(num_images, images.num_classes)
    model = create_evaluated_model(folders, pipe, out)
    ledger = Ledger(model.folder / FILE_NAME)
    evaluator = open_evaluator(folders, pipe, images, ledger, batch_size=options.batch_size, bars=bars)
    comparison, introduction = _measure(evaluator, model, plan, num_images=count, seed=options.seed)
    comparison = replace(comparison, folder=out or folders.run / "comparison")
    flags = {"num_images": num_images, "seed": options.seed, "selectors": selectors, "num_steps": num_steps}
    flags |= {name: getattr(options, name) for name in ("guidance", "guidance_scale", "negative_model")}
    page = comparison.page(command_line(["maskgit compare", run], flags), introduction)
    shown = {row.label: row.decoding for row in comparison.results if row.num_steps == comparison.sheet_steps}
    # The ledger keeps no images: those of the sheet are generated for it.
    advance = bars("sheet of images", len(shown))
    sheet = draw_selector_sheet(pipe, shown, seed=options.seed, on_row=lambda: advance(1))
    replace(page, pictures={"selectors.png": image_to_png(sheet)}).write()
    return comparison


def _measure(
    evaluator: Evaluator,
    model: EvaluatedModel,
    plan: Sequence[tuple[str, DecodingConfig]],
    *,
    num_images: int,
    seed: int,
) -> tuple[Comparison, list[str]]:
    """Measures each decoding, and returns the comparison and the introduction of its page."""
    real = measure_real(evaluator, num_images)
    before, results = evaluator.num_measured, []
    advance = evaluator.bars("token selectors", len(plan))
    for label, decoding in plan:
        rows = evaluator.measure_samples(
            model, decoding, num_images=num_images, seed=seed, metrics="fast", purpose=f"selector {label}"
        )
        results.append(MeasuredSelector(label, decoding, collect_numbers(rows)))
        advance(1)
    count = evaluator.num_measured - before
    comparison = Comparison(tuple(results), real, num_images, seed, num_measured=count)
    # The columns of model and classifier are the same in all rows; those of the last one are used.
    (row,) = rows.values()
    return comparison, _introduce(comparison, row)


def _introduce(comparison: Comparison, row: Mapping[str, Any]) -> list[str]:
    count, real, schedule = comparison.num_images, comparison.real, comparison.results[0].decoding.mask_schedule
    used = trained = f"that of the training, {markdown(row['mask_schedule'])}"
    if schedule is not None:
        used = f"{markdown(describe(schedule))} of decoding.json, not {trained}"
    digests = {name: markdown(row[name][:8]) for name in ("tokenizer", "transformer", "judge")}
    return paragraph(
        f"{count} images per row, evenly distributed over the classes, seed {comparison.seed}. Image i of every row",
        f"has the same noise. FID and KID are the Frechet and the kernel distance from all {row['real_images']} real",
        "val images, in the features of the data set's own classifier and not of Inception; only values from",
        f"{count} images are comparable. The classifier is correct for {real['class_agreement']:.1%} of the real val",
        f"images. The last line shows {real['num_images']} real training images instead of generated ones. The",
        "lowest distance of each T is bold. If the class agreement is above that of real images, the generated images",
        f"are more typical than real ones; their diversity is then low. The mask schedule is {used}. `ledger.jsonl`",
        "has the decoding, commit and device of each row. First digits of the SHA-256 of the weights: tokenizer",
        f"{digests['tokenizer']}, transformer {digests['transformer']}, classifier {digests['judge']}. Times are",
        f"wall-clock times on one machine ({markdown(row['device'])}).",
    )


def measure_real(evaluator: Evaluator, num_images: int, metrics: Metrics = "fast") -> dict[str, float]:
    """Measures real training images, whose distances are a floor.

    Returns:
        Values by name, ``num_images``, and the accuracy of the classifier on the val images as ``class_agreement``.
    """
    ((label, row),) = evaluator.measure_real(num_images=num_images, metrics=metrics).items()
    accuracy = evaluator.networks[label].accuracy
    assert accuracy is not None  # the network is the classifier of the data
    return {**collect_numbers({label: row}), "class_agreement": accuracy, "num_images": row["num_images"]}


def label_selectors(wanted: Sequence[Spec] | None, own: Spec) -> dict[str, Spec]:
    """Returns the selectors to compare, by label.

    A selector that is given by name takes the choice temperature of the model's own selector, if both have one, so that
    selectors are compared at equal randomness. A mapping is used as it is.

    Args:
        wanted: Names and mappings; None for ``list_selectors``.
        own: The model's own selector.

    Raises:
        TypeError: if a selector does not accept its arguments.
        ValueError: if a name is unknown, a number is out of range, or the same selector is given twice.
    """
    temperature = getattr(token_selectors.build(own), "choice_temperature", None)
    specs = list_selectors() if wanted is None else [(describe(spec), spec) for spec in wanted]
    labelled: dict[str, Spec] = {}
    for label, spec in specs:
        if label in labelled:
            raise ValueError(f"token selectors must be different, got {label} twice")
        has_one = hasattr(token_selectors.build(spec), "choice_temperature")
        if has_one and temperature is not None and (isinstance(spec, str) or wanted is None):
            spec = {**({"name": spec} if isinstance(spec, str) else spec), "choice_temperature": temperature}
        labelled[label] = spec
    return labelled


def list_selectors() -> list[tuple[str, Spec]]:
    """Returns the labels and specs of all registered selectors without required arguments.

    ``remdm`` occurs once per strategy.
    """
    specs: list[tuple[str, Spec]] = []
    for name in token_selectors.build_all():
        if name == "remdm":
            specs += [(f"remdm {each}", {"name": "remdm", "strategy": each}) for each in get_args(Remasking)]
        else:
            specs.append((name, name))
    return specs


def draw_selector_sheet(
    pipe: MaskGIT,
    decodings: Mapping[str, DecodingConfig],
    *,
    seed: int,
    on_row: Callable[[], object] = lambda: None,
) -> Image.Image:
    """Draws a sheet of images, with one row per selector and one column per class.

    Args:
        pipe: The model.
        decodings: Decodings by the caption of the row.
        seed: Seed of the first column; column i has ``seed + i`` in all rows.
        on_row: Called after each row.
    """
    classes = choose_classes(len(pipe.class_names))
    images = []
    for decoding in decodings.values():
        images.append(pipe.generate(classes, decoding=decoding, seed=seed, output_type="pt"))
        on_row()
    return image_grid(
        torch.cat(images),
        columns=len(classes),
        row_captions=list(decodings),
        column_captions=[pipe.class_names[label] for label in classes],
    )
