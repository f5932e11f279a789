"""The page of a search for a decoding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskgit_pl.evaluation.comparison import two_lines
from maskgit_pl.evaluation.decodings import describe_decoding, plain
from maskgit_pl.evaluation.metric_names import direction, format_value, title
from maskgit_pl.evaluation.schedule_curves import ScheduleCurves
from maskgit_pl.evaluation.tuning import SearchResult, Trial, ranked
from maskgit_pl.text import code_span, markdown, printable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RealNumbers", "as_markdown", "as_table", "columns_of"]

_SHOWN_TRIALS = 10
_COLUMNS = ("class_agreement", "fid/classifier", "kid/classifier", "diversity", "seconds_per_image")


@dataclass(frozen=True)
class RealNumbers:
    """Numbers of real training images in place of generated ones.

    Args:
        numbers: Distances from the val split, and the classifier's accuracy as ``class_agreement``.
        count: Number of training images.
    """

    numbers: Mapping[str, float]
    count: int


def columns_of(metric: str) -> list[str]:
    """Returns the columns of a table of trials, the metric of the search first."""
    return [metric, *(name for name in _COLUMNS if name != metric)]


def as_markdown(result: SearchResult, real: RealNumbers, *, command: str, figure: ScheduleCurves | None) -> str:
    """Returns the search as a page.

    Args:
        result: The search.
        real: Numbers of as many real images as the search was confirmed with.
        command: What makes it again.
        figure: The curves that were drawn; None for none.
    """
    count = result.num_images // 2
    lines = [
        "# A way to decode",
        "",
        f"    {printable(command, limit=None)}",
        "",
        *_explanation(result, real, count),
        "",
    ]
    lines += ["## Measured again", "", *_trial_lines(result, result.confirmed, winner=True), "", _verdict(result), ""]
    if result.winner.number:
        lines += ["```json", json.dumps(plain(result.winner.decoding), indent=2), "```", ""]
    lines += [f"## The best of {len(result.trials)} trials, {count} images each", ""]
    lines += _trial_lines(result, ranked(result.trials, result.metric)[:_SHOWN_TRIALS])
    if figure is not None:
        lines += ["", *_figure_lines(figure, result.metric)]
    return "\n".join(lines) + "\n"


def as_table(result: SearchResult) -> Table:
    """Returns what was measured again, for a terminal."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=f"measured again with fresh noise, {result.num_images} images each", box=SIMPLE, padding=0)
    columns = columns_of(result.metric)
    for heading in ("trial", "decoding", *(two_lines(title(name)) for name in columns)):
        table.add_column(heading, justify="left" if heading == "decoding" else "right")
    for trial in result.confirmed:
        style = "bold" if trial.number == result.winner.number else ""
        cells = [_cell(trial, name) for name in columns]
        table.add_row(str(trial.number), describe_decoding(trial.decoding), *cells, style=style)
    return table


def _explanation(result: SearchResult, real: RealNumbers, count: int) -> list[str]:
    floor = [f"{title(name)} {format_value(name, real.numbers[name])}" for name in ("fid/classifier", "kid/classifier")]
    return [
        f"{len(result.trials)} trials of {count} images against {result.metric} ({direction(result.metric)}), all with",
        "the same noise; trial 0 is the model's decoding as it was. Then trial 0 and the best",
        f"{len(result.confirmed) - 1} others were measured again with fresh noise and {result.num_images} images; the",
        "best of these is the result.",
        "Distances are from the real val images in the features of the data set's own classifier, not of Inception,",
        f"which is right on {real.numbers['class_agreement']:.1%} of them; {real.count} real training images in place",
        f"of generated ones have {' and '.join(floor)}.",
    ]


def _verdict(result: SearchResult) -> str:
    metric = result.metric
    before, after = result.before.numbers[metric], result.winner.numbers[metric]
    if result.winner.number == 0:
        return f"The model's decoding as it was is the best of them, {metric} {before:.4g}: nothing is changed."
    return f"Trial {result.winner.number} wins: {metric} {before:.4g} before, {after:.4g} now. It is the recipe below."


def _trial_lines(result: SearchResult, trials: Sequence[Trial], *, winner: bool = False) -> list[str]:
    columns = columns_of(result.metric)
    lines = ["| trial | decoding | " + " | ".join(map(title, columns)) + " |"]
    lines.append("|---:|---|" + "---:|" * len(columns))
    for trial in trials:
        cells = [_cell(trial, name) for name in columns]
        row = [str(trial.number), markdown(describe_decoding(trial.decoding)), *cells]
        if winner and trial.number == result.winner.number:
            row = [f"**{cell}**" for cell in row]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _cell(trial: Trial, name: str) -> str:
    return format_value(name, trial.numbers[name], more_digits=1) if name in trial.numbers else ""


def _figure_lines(figure: ScheduleCurves, metric: str) -> list[str]:
    steps = sorted({number for line in figure.curves.values() for number in line})
    name, at, value = figure.best(metric)
    lines = [
        "## Mask schedules",
        "",
        f"![{metric} against the number of steps for each mask schedule](tuning.png)",
        "",
        f"{title(metric)} ({direction(metric)}) of {figure.num_images} images a point, the same noise for all: one",
        f"model, trained with {code_span(figure.trained)}, decoded by each schedule with: {markdown(figure.decoding)}.",
        f"Best: {markdown(name)} at T = {at}, {format_value(metric, value, more_digits=1)}.",
        "",
        "| mask schedule | " + " | ".join(f"T = {number}" for number in steps) + " |",
        "|---|" + "---:|" * len(steps),
    ]
    for schedule, line in figure.curves.items():
        label = f"{markdown(schedule)} (trained)" if schedule == figure.trained else markdown(schedule)
        cells = [format_value(metric, line[number][metric], more_digits=1) for number in steps]
        cells = [
            f"**{cell}**" if (schedule, each) == (name, at) else cell for cell, each in zip(cells, steps, strict=True)
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines
