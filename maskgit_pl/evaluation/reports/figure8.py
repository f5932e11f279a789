"""Figure 8 of the paper: the mask schedules (left), and the quality of the model of each against T (right)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from maskgit_pl.evaluation.drawing import LineEnd, name_lines, save_figure
from maskgit_pl.evaluation.reports.tables import ScheduleResult
from maskgit_pl.text import plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Figure8", "draw"]

_COLOURS = {  # from those that decide late (concave) to those that decide early (convex)
    "exp": "#5b2a86",
    "cubic": "#3f51b5",
    "square": "#2a7fb8",
    "cosine": "#0d7d6c",
    "linear": "#7a7a7a",
    "sqrt": "#d98b1f",
    "log": "#c0392b",
}
_OTHERS = ("#a0709f", "#6d9a5c", "#b3605b", "#8a7f4f")
_REAL = "#3a7d44"
_POINTS = 200
_FAR = 3  # times below the least: a line there would leave half of the panel empty


@dataclass(frozen=True)
class Figure8:
    """What the figure shows.

    Args:
        results: One for each schedule.
        num_tokens: N, which ``log`` and ``exp`` depend on.
        metric: Such as ``fid/classifier``.
        num_images: Images of a point.
        floor: What as many real images come to; None draws no line.
        dataset: For the title.
    """

    results: Sequence[ScheduleResult]
    num_tokens: int
    metric: str
    num_images: int
    floor: float | None
    dataset: str


def draw(figure: Figure8, path: Path) -> None:
    """Writes the PNG."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(12.6, 5.2), layout="constrained")
    left, right = page.subplots(1, 2, gridspec_kw={"wspace": 0.14})
    colours = _colours(figure.results)
    _draw_schedules(left, figure, colours)
    _draw_quality(right, figure, colours)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    ends = {
        result.schedule: LineEnd(
            f"{result.schedule}, best T = {result.best_steps}",
            (max(result.curve), result.curve[max(result.curve)]),
            colours[result.schedule],
        )
        for result in figure.results
    }
    name_lines(page, right, ends)
    save_figure(page, path)


def _colours(results: Sequence[ScheduleResult]) -> Mapping[str, str]:
    others = iter(_OTHERS * (1 + len(results) // len(_OTHERS)))
    return {result.schedule: _COLOURS.get(result.schedule) or next(others) for result in results}


def _draw_schedules(axes: Axes, figure: Figure8, colours: Mapping[str, str]) -> None:
    progress = torch.linspace(0, 1, _POINTS)
    for result in figure.results:
        ratio = result.mask_schedule(progress, figure.num_tokens).clamp(0, 1)
        axes.plot(progress, ratio, color=colours[result.schedule], linewidth=1.8, label=plain_label(result.schedule))
    axes.set_xlabel("progress r = t / T")
    axes.set_ylabel("mask ratio gamma(r)")
    axes.set_title(f"mask schedules, N = {figure.num_tokens} tokens", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=2)


def _draw_quality(axes: Axes, figure: Figure8, colours: Mapping[str, str]) -> None:
    axes.set_xscale("log", base=2)
    values = [value for result in figure.results for value in result.curve.values()]
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        low, high = min(values), max(values)
        ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300) if low / 1.3 <= tick <= high * 1.3]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for result in figure.results:
        steps = sorted(result.curve)
        colour = colours[result.schedule]
        axes.plot(
            steps, [result.curve[step] for step in steps], color=colour, linewidth=1.6, marker="o", markersize=3.5
        )
        axes.plot([result.best_steps], [result.curve[result.best_steps]], color=colour, marker="*", markersize=14,
                  markeredgecolor="white", zorder=5)  # fmt: skip
    if figure.floor is not None:
        near = figure.floor > min(values) / _FAR
        if near:
            axes.axhline(figure.floor, color=_REAL, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        place = axes.get_yaxis_transform() if near else axes.transAxes
        label = f"as many real images: {figure.floor:.2f}"
        axes.text(0.01, figure.floor if near else 0.02, label, color=_REAL, transform=place, fontsize=9, va="bottom")
    shown = sorted({step for result in figure.results for step in result.curve})
    axes.set_xticks(shown, [str(step) for step in shown])
    axes.minorticks_off()
    axes.set_xlabel("decoding steps T")
    axes.set_ylabel(f"{figure.metric} of {figure.num_images} images (lower is better)")
    axes.set_title(
        f"{plain_label(figure.dataset)}: a model for each schedule, stars at its best T", fontsize=11, loc="left"
    )
