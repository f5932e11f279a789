"""A search for the best decoding of a model, measured on the val split, with its page and its figure.

``tuning`` runs it:

1. Measure the trials. Trial 0 is the model's own decoding; ``search_space`` makes the others.
2. Measure the best trials and the model's own decoding again, with other noise and twice the number of images.
3. The best of step 2 wins. Without the second measurement, the winner would be the trial with the luckiest noise.

The figure shows the best decoding with every mask schedule, as a metric over the number of steps (paper, Figure 8,
right). The paper trains a model for each schedule; here one model is decoded with all.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.errors import code_span, markdown, plain_label
from maskgit_pl.evaluation.metrics import direction, find_metric, format_value, is_better, title
from maskgit_pl.evaluation.options import Spec, choose_plot_steps, decoding_key, describe_decoding, with_steps
from maskgit_pl.evaluation.pages import (
    LineEnd,
    Page,
    figure_to_png,
    heading,
    markdown_table,
    name_lines,
    paragraph,
    plot_by_steps,
    plot_floor,
    terminal_table,
    terminal_word,
)
from maskgit_pl.evaluation.search_space import Search, SearchSpace
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.schedules import MaskSchedule, mask_schedules

if TYPE_CHECKING:
    from rich.table import Table


__all__ = [
    "FINALISTS",
    "Curves",
    "Measure",
    "ScheduleCurves",
    "SearchPlan",
    "SearchResult",
    "Trial",
    "draw_curves",
    "find_schedule_trial",
    "make_page",
    "make_table",
    "measure_curves",
    "schedule_specs",
    "search",
]

# (decoding, num_images, seed, purpose) -> numbers by name
Measure: TypeAlias = Callable[[DecodingConfig, int, int, str], Mapping[str, float]]
Curves: TypeAlias = Mapping[str, Mapping[int, Mapping[str, float]]]  # by schedule, T and name of the metric

FINALISTS = 3  # trials of step 2, besides the model's own decoding
_CONFIRMATION_OFFSET = 1_000_000  # between the seeds of steps 1 and 2, so that no image has the same noise
_SHOWN_TRIALS = 10  # of the table of trials
_COLUMNS = ("class_agreement", "fid/classifier", "kid/classifier", "diversity", "seconds_per_image")
_MARKED, _TRAINED = "#d1460f", "#14427a"
_OTHERS = ("#c58b3a", "#6d9a5c", "#a0709f", "#5aa0a3", "#b3605b", "#8a8a8a", "#9a8c4f", "#7f86c4")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A decoding with its measured values.

    Args:
        number: Index of the trial; 0 is the model's own decoding.
        decoding: The decoding.
        numbers: Values by name, such as ``fid/classifier``.
    """

    number: int
    decoding: DecodingConfig
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class SearchPlan:
    """The budget of a search.

    Args:
        metric: Name of the metric, such as ``fid/classifier``.
        trials: Maximum number of trials, including trial 0.
        num_images: Number of images per trial; the second measurement takes twice as many.
        seed: Seed of the random draws, and of the first image: all trials have the same noise.
        method: Random draws or a grid.
        seconds: Time limit in seconds, after which no trial begins; None for no limit.
        current: The decoding in ``decoding.json``; if it is one of the trials, it is measured again with the best.
    """

    metric: str
    trials: int
    num_images: int
    seed: int = 0
    method: Search = "random"
    seconds: float | None = None
    current: DecodingConfig | None = None


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        trials: All trials, in order.
        confirmed: The model's own decoding and the best trials, measured again with other noise; trial 0 first.
        winner: The best of ``confirmed``.
        num_images: Number of images of each trial in ``confirmed``.
        seed: Seed of the first image in ``confirmed``.
        metric: Name of the metric of the search.
        folder: Folder of the page and the figure.
        figure: True if there is a figure.
        decoding_file: Path of the written ``decoding.json``; None if the model already had the winning decoding.
        old_decoding_file: Path of the copy of the previous ``decoding.json``; None if there was none.
        num_measured: Number of new measurements, without those that the ledger already held.
    """

    trials: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    winner: Trial
    num_images: int
    seed: int
    metric: str
    folder: Path = Path()
    figure: bool = False
    decoding_file: Path | None = None
    old_decoding_file: Path | None = None
    num_measured: int = 0

    @property
    def before(self) -> Trial:
        """The model's own decoding, measured again."""
        return self.confirmed[0]


def search(
    measure: Measure,
    space: SearchSpace,
    plan: SearchPlan,
    *,
    on_trial: Callable[[Trial], object] = lambda trial: None,
) -> SearchResult:
    """Runs a search; the module docstring describes its steps.

    Args:
        measure: Measures a decoding, given the number of images, the seed and a remark for the ledger.
        space: The decodings of the trials.
        plan: Metric and budget.
        on_trial: Called after each trial and each confirmation.
    """
    metric, num_images = plan.metric, plan.num_images
    start, trials = time.monotonic(), list[Trial]()
    # 1.
    for number, decoding in enumerate(space.iter_trials(plan.trials, seed=plan.seed, method=plan.method)):
        late = plan.seconds is not None and time.monotonic() - start >= plan.seconds
        if trials and late:
            break
        trials.append(Trial(number, decoding, measure(decoding, num_images, plan.seed, f"trial {number}")))
        on_trial(trials[-1])
    # 2.
    confirmed, seed = [], plan.seed + _CONFIRMATION_OFFSET
    for trial in _choose_finalists(trials, metric, plan.current):
        purpose = f"confirmation of trial {trial.number}"
        confirmed.append(replace(trial, numbers=measure(trial.decoding, 2 * num_images, seed, purpose)))
        on_trial(confirmed[-1])
    # 3. A tie keeps the earlier one, which is the model's own decoding if it takes part.
    winner = confirmed[0]
    for trial in confirmed[1:]:
        winner = trial if is_better(metric, trial.numbers[metric], winner.numbers[metric]) else winner
    return SearchResult(tuple(trials), tuple(confirmed), winner, 2 * num_images, seed, metric)


def _choose_finalists(trials: Sequence[Trial], metric: str, current: DecodingConfig | None) -> list[Trial]:
    """Returns trial 0, the trial with the current decoding, and the best others, without equal decodings."""
    others = _sort_trials(trials[1:], metric)
    # The current decoding is a trial if an earlier run of this search wrote its winner.
    chosen = [trials[0], *(trial for trial in others if trial.decoding == current)][:2]
    # If it is among the best anyway, it takes no additional place.
    most = len(chosen) + FINALISTS - sum(trial in others[:FINALISTS] for trial in chosen)
    for trial in others:
        if len(chosen) < most and all(trial.decoding != other.decoding for other in chosen):
            chosen.append(trial)
    return chosen


def _sort_trials(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Returns trials sorted by a metric, the best first."""
    sign = -1 if find_metric(metric).higher_is_better else 1
    return sorted(trials, key=lambda trial: sign * trial.numbers[metric])


@dataclass(frozen=True)
class ScheduleCurves:
    """The values of each mask schedule at each number of steps.

    Args:
        curves: Values by schedule, T and name of the metric.
        trained: Name of the training schedule.
        decoding: Description of the decoding that all points share.
        num_images: Number of images per point.
    """

    curves: Curves
    trained: str
    decoding: str
    num_images: int

    def best(self, metric: str) -> tuple[str, int, float]:
        """Returns the schedule, T and value of the best point of a metric."""
        points = [
            (name, steps, numbers[metric]) for name, line in self.curves.items() for steps, numbers in line.items()
        ]
        # Of equal points, the first one wins.
        found = points[0]
        for point in points[1:]:
            found = point if is_better(metric, point[2], found[2]) else found
        return found


def measure_curves(
    measure: Measure, pipe: MaskGIT, result: SearchResult, *, num_images: int, seed: int, bars: Bars = no_bars
) -> ScheduleCurves | None:
    """Measures the best decoding of a search with each mask schedule at several numbers of steps.

    Args:
        measure: Measures a decoding.
        pipe: The model.
        result: The search.
        num_images: Number of images per point.
        seed: Seed of the first image.
        bars: Progress bars.

    Returns:
        The curves, or None if no trial follows a mask schedule.
    """
    trial = find_schedule_trial(result)
    if trial is None:
        _log.info("no figure is drawn, because no trial follows a mask schedule")
        return None
    trained, specs = schedule_specs(pipe.transformer.schedule_for("tune"))
    steps = choose_plot_steps(pipe.tokenizer.grid[0] * pipe.tokenizer.grid[1])
    advance = bars("mask schedules", len(specs) * sum(steps))
    curves: dict[str, dict[int, Mapping[str, float]]] = {name: {} for name in specs}
    for num_steps in steps:
        for name, spec in specs.items():
            # Same seed at every point: the curves differ by the schedule, not by the noise.
            point = replace(with_steps(trial.decoding, num_steps), mask_schedule=spec)
            curves[name][num_steps] = measure(point, num_images, seed, f"mask schedule {name}, {num_steps} steps")
            advance(num_steps)
    return ScheduleCurves(curves, trained, describe_decoding(trial.decoding, steps=False), num_images)


def find_schedule_trial(result: SearchResult) -> Trial | None:
    """Returns the best trial whose selector follows a mask schedule, or None if there is no such trial."""
    for trial in (result.winner, *_sort_trials(result.trials, result.metric)):
        selector = trial.decoding.token_selector
        if selector is not None and token_selectors.build(selector).follows_schedule:
            return trial
    return None


def schedule_specs(trained: MaskSchedule) -> tuple[str, dict[str, Spec | None]]:
    """Returns the name of the training schedule, and the schedules to decode with.

    Args:
        trained: Schedule of the training.

    Returns:
        The registered name of ``trained``, or its ``repr`` if it has none; and the specs of all registered schedules
        without required arguments, by name. The spec of the training schedule is None.
    """
    built = mask_schedules.build_all()
    # None as spec keeps the model's own schedule, which may have arguments that no registered name has.
    trained_name = next((name for name, schedule in built.items() if schedule == trained), repr(trained))
    return trained_name, {name: None if name == trained_name else name for name in sorted({*built, trained_name})}


def draw_curves(figure: ScheduleCurves, *, metric: str, floor: float | None) -> bytes:
    """Draws a line per schedule, with the training schedule emphasised.

    Args:
        figure: The measured curves.
        metric: Name of the metric, such as ``fid/classifier``.
        floor: Value of real images; None draws no line.

    Returns:
        A PNG.

    Source: paper, Figure 8, right.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = page.subplots()
    values = {name: {at: numbers[metric] for at, numbers in line.items()} for name, line in figure.curves.items()}
    plot_by_steps(axes, values, {name: _colour(figure, name) for name in values}, front=figure.trained)
    if floor is not None:
        plot_floor(axes, floor, f"real images: {format_value(metric, floor, more_digits=1)}")
    _format_axes(axes, figure, metric)
    name_lines(page, axes, {name: _line_end(figure, name, metric) for name in figure.curves})
    return figure_to_png(page)


def _line_end(figure: ScheduleCurves, name: str, metric: str) -> LineEnd:
    steps, numbers = list(figure.curves[name].items())[-1]
    is_trained = name == figure.trained
    label = f"{name} (trained)" if is_trained else name
    return LineEnd(label, (steps, numbers[metric]), _colour(figure, name), bold=is_trained)


def _colour(figure: ScheduleCurves, name: str) -> str:
    others = [other for other in figure.curves if other != figure.trained]
    return _TRAINED if name == figure.trained else _OTHERS[others.index(name) % len(_OTHERS)]


def _format_axes(axes: Any, figure: ScheduleCurves, metric: str) -> None:
    name, at, value = figure.best(metric)
    up = find_metric(metric).higher_is_better
    axes.plot([at], [value], marker="*", markersize=17, color=_MARKED, markeredgecolor="white", zorder=5)
    label = f"best: {plain_label(name)}, T = {at}\n{format_value(metric, value, more_digits=1)}"
    axes.annotate(
        label, (at, value), (0, 14 if up else -14),
        textcoords="offset points", color=_MARKED, fontsize=9.5, ha="center",
        va="bottom" if up else "top", zorder=5,
    )  # fmt: skip
    axes.set_ylabel(f"{title(metric)} of {figure.num_images} images ({direction(metric)})")
    axes.set_title(
        f"one model, trained with {plain_label(figure.trained)}, decoded with each mask schedule",
        fontsize=11,
        loc="left",
    )
    axes.margins(y=0.14)


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
    best = _sort_trials(result.trials, result.metric)[:_SHOWN_TRIALS]
    lines += markdown_table(_headings(result), _rows(result, best, markdown), left=2)
    if figure is not None:
        lines += ["", *_figure_lines(figure, result.metric)]
    rows = [{"trial": each.number, **each.numbers, "decoding": decoding_key(each.decoding)} for each in result.trials]
    return Page("tuning", "\n".join(lines) + "\n", rows, folder=result.folder)


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
