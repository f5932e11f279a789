"""The figure of a search: one model, decoded by every mask schedule, quality against T. Measured here, and drawn.

Source: paper, Figure 8, right: one model for each schedule there, one model decoded by each schedule here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.decoders.tuning import Found, Meter, Trial, better, direction, ranked, shown
from maskgit_pl.evaluation.decodings import Spec, with_steps
from maskgit_pl.evaluation.drawing import LineEnd, name_lines, save_figure
from maskgit_pl.evaluation.protocol import METRICS
from maskgit_pl.schedules import MaskSchedule, mask_schedules
from maskgit_pl.text import plain_label

__all__ = ["Curves", "Figure8", "draw_curves", "following", "plot_steps", "schedule_curves", "schedule_specs"]

Curves = dict[str, dict[int, dict[str, Any]]]

_PLOT_STEPS = (2, 3, 4, 6, 8, 12, 16, 24)
_MARKED, _TRAINED, _REAL = "#d1460f", "#14427a", "#3a7d44"
_OTHERS = ("#c58b3a", "#6d9a5c", "#a0709f", "#5aa0a3", "#b3605b", "#8a8a8a", "#9a8c4f", "#7f86c4")


def following(found: Found, key: str) -> Trial | None:
    """The best decoding that follows a mask schedule, for a figure of schedules; None where none does."""
    for trial in (found.winner, *ranked(found.trials, key)):
        if token_selectors.build(trial.decoding.token_selector).follows_schedule:
            return trial
    return None


def schedule_specs(trained: MaskSchedule) -> tuple[str, dict[str, Spec | None]]:
    """The name of the schedule of the training, and each registered one that needs no argument, by name.

    None stands for the one of the training, under its ``repr`` where it is registered under no name.
    """
    built = mask_schedules.build_all()
    own = next((name for name, schedule in built.items() if schedule == trained), repr(trained))
    return own, {name: None if name == own else name for name in sorted({*built, own})}


def plot_steps(num_tokens: int) -> tuple[int, ...]:
    """The T that schedules are drawn at: at most half as many as there are tokens."""
    return tuple(number for number in _PLOT_STEPS if number <= max(2, num_tokens // 2))


def schedule_curves(
    meter: Meter,
    decoding: DecodingConfig,
    trained: MaskSchedule,
    *,
    num_tokens: int,
    num_images: int,
    seed: int,
    on_point: Callable[[int], object] = lambda steps: None,
) -> tuple[str, Curves]:
    """Measures a decoding at several T with each registered mask schedule that needs no argument.

    Args:
        meter: Measures.
        decoding: All but T and the mask schedule.
        trained: The schedule object of the training.
        num_tokens: N.
        num_images: Images of a point.
        seed: Of the first image.
        on_point: Told the T of each point when it is measured.

    Returns:
        The name of the schedule of the training, and for each name and T what was measured.

    Source: paper, Figure 8, right: one model for each schedule there, one model decoded by each schedule here.
    """
    own_name, specs = schedule_specs(trained)
    curves: Curves = {name: {} for name in specs}
    for num_steps in plot_steps(num_tokens):
        for name, spec in specs.items():
            point = replace(with_steps(decoding, num_steps), mask_schedule=spec)
            purpose = f"mask schedule {name}, {num_steps} steps"
            curves[name][num_steps] = meter(point, num_images=num_images, seed=seed, purpose=purpose)
            on_point(num_steps)
    return own_name, curves


@dataclass(frozen=True)
class Figure8:
    """Quality against T for every mask schedule.

    Args:
        curves: By the schedule's name and T.
        trained: Name of the schedule of the training.
        decoding: In words: what all of them share.
        num_images: Images of a point.
    """

    curves: Curves
    trained: str
    decoding: str
    num_images: int

    def best(self, key: str) -> tuple[str, int, float]:
        """Schedule, T and value of the best point."""
        points = [(name, steps, numbers[key]) for name, line in self.curves.items() for steps, numbers in line.items()]
        found = points[0]
        for point in points[1:]:
            found = point if better(key, point[2], found[2]) else found
        return found


def draw_curves(figure: Figure8, path: Path, *, key: str, floor: float | None) -> None:
    """Draws the figure: a line a schedule, its name at the end, the schedule of the training in front.

    Args:
        figure: What was measured.
        path: A PNG.
        key: The metric.
        floor: The value of real images; None for none.

    Source: paper, Figure 8, right.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = page.subplots()
    axes.set_xscale("log", base=2)
    values = [numbers[key] for line in figure.curves.values() for numbers in line.values()]
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
    for name, line in figure.curves.items():
        own = name == figure.trained
        axes.plot(
            list(line), [numbers[key] for numbers in line.values()],
            color=_colour(figure, name), linewidth=3 if own else 1.4, zorder=3 if own else 2,
            marker="o", markersize=5.5 if own else 3,
        )  # fmt: skip
    if floor is not None:
        axes.axhline(floor, color=_REAL, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        axes.text(0.01, floor, f"real images: {shown(key, floor)}", transform=axes.get_yaxis_transform(),
                  color=_REAL, fontsize=9, va="bottom")  # fmt: skip
    _finish(axes, figure, key)
    name_lines(page, axes, {name: _end(figure, name, key) for name in figure.curves})
    save_figure(page, path)


def _end(figure: Figure8, name: str, key: str) -> LineEnd:
    steps, numbers = list(figure.curves[name].items())[-1]
    own = name == figure.trained
    label = f"{name} (trained)" if own else name
    return LineEnd(label, (steps, numbers[key]), _colour(figure, name), bold=own)


def _colour(figure: Figure8, name: str) -> str:
    others = [other for other in figure.curves if other != figure.trained]
    return _TRAINED if name == figure.trained else _OTHERS[others.index(name) % len(_OTHERS)]


def _finish(axes: Any, figure: Figure8, key: str) -> None:
    steps = sorted({number for line in figure.curves.values() for number in line})
    name, at, value = figure.best(key)
    axes.plot([at], [value], marker="*", markersize=17, color=_MARKED, markeredgecolor="white", zorder=5)
    axes.annotate(
        f"best: {plain_label(name)}, T = {at}\n{shown(key, value)}", (at, value), (0, 14 if METRICS[key] else -14),
        textcoords="offset points", color=_MARKED, fontsize=9.5, ha="center",
        va="bottom" if METRICS[key] else "top", zorder=5,
    )  # fmt: skip
    axes.set_xticks(steps, [str(number) for number in steps])
    axes.minorticks_off()
    axes.set_xlabel("decoding steps T")
    axes.set_ylabel(f"{key} of {figure.num_images} images ({direction(key)})")
    axes.set_title(
        f"one model, trained with {plain_label(figure.trained)}, decoded by every mask schedule",
        fontsize=11,
        loc="left",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.14)
