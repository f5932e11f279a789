"""The page and the terminal table of ``tune``."""

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
    """Returns the page of a search.

    Args:
        result: The search.
        real: Values of real training images, in the same number as the images of the second measurement: distances
            from the val split, ``class_agreement`` (the accuracy of the classifier), and ``num_images``.
        command: Command that produces the page.
        figure: Curves of the figure; None for no figure.
    """
    count = result.num_images // 2  # images per trial: the second measurement takes twice as many
    lines = [
        *heading("Search for a decoding", command),
        *_explanation(result, real, count),
        "",
        "## Second measurement",
        "",
    ]
    lines += markdown_table(_headings(result), _rows(result, result.confirmed, markdown, "**{}**"), left=2)
    lines += ["", _verdict(result), ""]
    # Trial 0 is the previous decoding; only another one is printed.
    if result.winner.number:
        lines += ["```json", json.dumps(asdict(result.winner.decoding), indent=2), "```", ""]
    lines += [f"## Best of {len(result.trials)} trials, {count} images each", ""]
    best = sort_trials(result.trials, result.metric)[:_SHOWN_TRIALS]
    lines += markdown_table(_headings(result), _rows(result, best, markdown), left=2)
    if figure is not None:
        lines += ["", *_figure_lines(figure, result.metric)]
    rows = [{"trial": each.number, **each.numbers, "decoding": decoding_key(each.decoding)} for each in result.trials]
    return Page("tuning", "\n".join(lines) + "\n", rows, folder=result.folder)


def make_table(result: SearchResult) -> Table:
    """Returns the second measurement as a table for the terminal."""
    above = f"second measurement with other noise, {result.num_images} images each"
    rows = _rows(result, result.confirmed, terminal_word, "[bold]{}[/]")
    return terminal_table(above, _headings(result), rows, left=2)


def _headings(result: SearchResult) -> list[str]:
    return ["trial", "decoding", *map(title, _columns(result))]


def _columns(result: SearchResult) -> list[str]:
    """Returns the names of the values in a table, with the metric of the search first."""
    return [result.metric, *(name for name in _COLUMNS if name != result.metric)]


def _rows(
    result: SearchResult, trials: Sequence[Trial], word: Callable[[str], str], bold: str = "{}"
) -> Iterator[list[str]]:
    """Yields the cells of each trial.

    Args:
        result: The search.
        trials: Trials of the table.
        word: Escapes a text for the markup of the table.
        bold: Format of the cells of the winner.
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
        f"{len(result.trials)} trials of {count} images were compared by {result.metric} ({direction(result.metric)}),",
        "all with the same noise. Trial 0 is the previous decoding of the model. Trial 0 and the best",
        f"{len(result.confirmed) - 1} others were then measured again with other noise and {result.num_images} images.",
        "The best of this second measurement wins. Distances are measured from the real val images, in the features of",
        "the data set's own classifier and not of Inception; the classifier is correct for",
        f"{real['class_agreement']:.1%} of these images. For comparison, {real['num_images']} real training images",
        f"have {' and '.join(floor)}.",
    )


def _verdict(result: SearchResult) -> str:
    metric = result.metric
    before, after = result.before.numbers[metric], result.winner.numbers[metric]
    if result.winner.number == 0:
        return f"The previous decoding of the model is the best, with {metric} {before:.4g}. Nothing was changed."
    return f"Trial {result.winner.number} wins: {metric} was {before:.4g} and is now {after:.4g}. The new decoding is:"


def _figure_lines(figure: ScheduleCurves, metric: str) -> list[str]:
    steps = sorted({number for line in figure.curves.values() for number in line})
    name, at, value = figure.best(metric)
    lines = ["## Mask schedules", "", f"![{metric} against the number of steps for each mask schedule](tuning.png)", ""]
    lines += paragraph(
        f"{title(metric)} ({direction(metric)}) from {figure.num_images} images per point, with the same noise for all",
        f"points. The model was trained with {code_span(figure.trained)} and is decoded with each schedule and",
        f"{markdown(figure.decoding)}.",
        f"Best: {markdown(name)} at T = {at}, {format_value(metric, value, more_digits=1)}.",
    )
    rows = []
    for schedule, line in figure.curves.items():
        label = f"{markdown(schedule)} (trained)" if schedule == figure.trained else markdown(schedule)
        # One row per schedule, one column per T; the best cell of the whole table is bold.
        cells = {number: format_value(metric, line[number][metric], more_digits=1) for number in steps}
        if schedule == name:
            cells[at] = f"**{cells[at]}**"
        rows.append([label, *cells.values()])
    return [*lines, "", *markdown_table(["mask schedule", *(f"T = {number}" for number in steps)], rows)]
