"""The page of a search for a decoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from maskgit_pl.evaluation.decoding_search import SearchResult, Trial, sort_trials
from maskgit_pl.evaluation.decodings import decoding_key, describe_decoding
from maskgit_pl.evaluation.metric_names import direction, format_value, title
from maskgit_pl.evaluation.pages import Page, heading, markdown_table, paragraph, terminal_table, terminal_word
from maskgit_pl.evaluation.schedule_curves import ScheduleCurves
from maskgit_pl.text import code_span, markdown

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["make_page", "make_table"]

_SHOWN_TRIALS = 10
_COLUMNS = ("class_agreement", "fid/classifier", "kid/classifier", "diversity", "seconds_per_image")


def make_page(result: SearchResult, real: Mapping[str, float], *, command: str, figure: ScheduleCurves | None) -> Page:
    """Returns the search as a page.

    Args:
        result: The search.
        real: Numbers of as many real training images as the search was confirmed with: distances from the val split,
            ``class_agreement``, which is the accuracy of the classifier, and ``num_images``.
        command: What makes it again.
        figure: The curves that were drawn; None for none.
    """
    count = result.num_images // 2
    lines = [*heading("A way to decode", command), *_explanation(result, real, count), "", "## Measured again", ""]
    lines += markdown_table(_headings(result), _rows(result, result.confirmed, markdown, "**{}**"), left=2)
    lines += ["", _verdict(result), ""]
    if result.winner.number:
        lines += ["```json", json.dumps(asdict(result.winner.decoding), indent=2), "```", ""]
    lines += [f"## The best of {len(result.trials)} trials, {count} images each", ""]
    best = sort_trials(result.trials, result.metric)[:_SHOWN_TRIALS]
    lines += markdown_table(_headings(result), _rows(result, best, markdown), left=2)
    if figure is not None:
        lines += ["", *_figure_lines(figure, result.metric)]
    rows = [{"trial": each.number, **each.numbers, "decoding": decoding_key(each.decoding)} for each in result.trials]
    return Page("tuning", "\n".join(lines) + "\n", rows, folder=result.folder)


def make_table(result: SearchResult) -> Table:
    """Returns what was measured again, for a terminal."""
    above = f"measured again with fresh noise, {result.num_images} images each"
    rows = _rows(result, result.confirmed, terminal_word, "[bold]{}[/]")
    return terminal_table(above, _headings(result), rows, left=2)


def _headings(result: SearchResult) -> list[str]:
    return ["trial", "decoding", *map(title, _columns(result))]


def _columns(result: SearchResult) -> list[str]:
    """Returns the names of the numbers of a table, the metric of the search first."""
    return [result.metric, *(name for name in _COLUMNS if name != result.metric)]


def _rows(
    result: SearchResult, trials: Sequence[Trial], word: Callable[[str], str], bold: str = "{}"
) -> Iterator[list[str]]:
    """Yields the cells of each trial.

    Args:
        result: The search.
        trials: Those that are shown.
        word: Makes markup of a decoding.
        bold: Marks the cells of the winner.
    """
    for trial in trials:
        cells = [
            format_value(name, trial.numbers[name], more_digits=1) if name in trial.numbers else ""
            for name in _columns(result)
        ]
        form = bold if trial.number == result.winner.number else "{}"
        yield [form.format(cell) for cell in (str(trial.number), word(describe_decoding(trial.decoding)), *cells)]


def _explanation(result: SearchResult, real: Mapping[str, float], count: int) -> list[str]:
    floor = [f"{title(name)} {format_value(name, real[name])}" for name in ("fid/classifier", "kid/classifier")]
    return paragraph(
        f"{len(result.trials)} trials of {count} images against {result.metric} ({direction(result.metric)}), all with",
        "the same noise; trial 0 is the model's decoding as it was. Then trial 0 and the best",
        f"{len(result.confirmed) - 1} others were measured again with fresh noise and {result.num_images} images; the",
        "best of these is the result. Distances are from the real val images in the features of the data set's own",
        f"classifier, not of Inception, which is right on {real['class_agreement']:.1%} of them; {real['num_images']}",
        f"real training images in place of generated ones have {' and '.join(floor)}.",
    )


def _verdict(result: SearchResult) -> str:
    metric = result.metric
    before, after = result.before.numbers[metric], result.winner.numbers[metric]
    if result.winner.number == 0:
        return f"The model's decoding as it was is the best of them, {metric} {before:.4g}: nothing is changed."
    return f"Trial {result.winner.number} wins: {metric} {before:.4g} before, {after:.4g} now. It is the recipe below."


def _figure_lines(figure: ScheduleCurves, metric: str) -> list[str]:
    steps = sorted({number for line in figure.curves.values() for number in line})
    name, at, value = figure.best(metric)
    lines = ["## Mask schedules", "", f"![{metric} against the number of steps for each mask schedule](tuning.png)", ""]
    lines += paragraph(
        f"{title(metric)} ({direction(metric)}) of {figure.num_images} images a point, the same noise for all: one",
        f"model, trained with {code_span(figure.trained)}, decoded by each schedule with: {markdown(figure.decoding)}.",
        f"Best: {markdown(name)} at T = {at}, {format_value(metric, value, more_digits=1)}.",
    )
    rows = []
    for schedule, line in figure.curves.items():
        label = f"{markdown(schedule)} (trained)" if schedule == figure.trained else markdown(schedule)
        cells = {number: format_value(metric, line[number][metric], more_digits=1) for number in steps}
        if schedule == name:
            cells[at] = f"**{cells[at]}**"
        rows.append([label, *cells.values()])
    return [*lines, "", *markdown_table(["mask schedule", *(f"T = {number}" for number in steps)], rows)]
