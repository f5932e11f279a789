"""The figure of ``tune``: one model decoded with every mask schedule, as a metric over the number of steps.

Source: paper, Figure 8, right. The paper trains a model for each schedule; here one model is decoded with all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.decoding_search import Measure, SearchResult, Trial, sort_trials
from maskgit_pl.evaluation.decodings import Spec, choose_plot_steps, describe_decoding, with_steps
from maskgit_pl.evaluation.drawing import LineEnd, figure_to_png, name_lines, plot_by_steps, plot_floor
from maskgit_pl.evaluation.metric_names import direction, find_metric, format_value, is_better, title
from maskgit_pl.progress import Bars, no_bars
from maskgit_pl.schedules import MaskSchedule, mask_schedules
from maskgit_pl.text import plain_label

if TYPE_CHECKING:
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["Curves", "ScheduleCurves", "draw_curves", "find_schedule_trial", "measure_curves", "schedule_specs"]

Curves = Mapping[str, Mapping[int, Mapping[str, float]]]

_MARKED, _TRAINED = "#d1460f", "#14427a"
_log = logging.getLogger(__name__)
_OTHERS = ("#c58b3a", "#6d9a5c", "#a0709f", "#5aa0a3", "#b3605b", "#8a8a8a", "#9a8c4f", "#7f86c4")


def find_schedule_trial(result: SearchResult) -> Trial | None:
    """Returns the best trial whose selector follows a mask schedule, or None if there is no such trial."""
    for trial in (result.winner, *sort_trials(result.trials, result.metric)):
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
