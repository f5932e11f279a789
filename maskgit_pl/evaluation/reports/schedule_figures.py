"""Figures of mask schedules: the mask ratios, and the FID of the model of each schedule over the number of steps.

These are the two panels of the paper's Figure 8. ``maskgit schedules`` draws only the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from maskgit_pl.decoding import ParallelDecoder
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.drawing import LineEnd, figure_to_png, name_lines, plot_by_steps, plot_floor
from maskgit_pl.schedules import MaskSchedule
from maskgit_pl.text import plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from maskgit_pl.evaluation.reports.schedule_ablation import ScheduleResult

__all__ = ["count_known_tokens", "draw_figure_8", "draw_schedules"]

_COLOURS = {  # from schedules that decide late (concave) to those that decide early (convex)
    "exp": "#5b2a86",
    "cubic": "#3f51b5",
    "square": "#2a7fb8",
    "cosine": "#0d7d6c",
    "linear": "#7a7a7a",
    "sqrt": "#d98b1f",
    "log": "#c0392b",
}
_OTHERS = ("#a0709f", "#6d9a5c", "#b3605b", "#8a7f4f")
_POINTS = 513  # points of a curve of mask ratios
_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300)


def count_known_tokens(schedule: MaskSchedule, *, num_tokens: int, num_steps: int) -> list[int]:
    """Counts the tokens of an image that are known after each decoding step.

    Args:
        schedule: The mask schedule.
        num_tokens: Number N of tokens.
        num_steps: Number T of steps, in [1, N].

    Returns:
        T counts, of which the last one is N.

    Raises:
        ValueError: if ``num_steps`` is out of range.
    """
    # The counts come from the decoder itself, so that the table shows what decoding does.
    decoder = ParallelDecoder(schedule, token_selectors.build("confidence"), num_steps=num_steps)
    return [num_tokens - masked for (masked,) in decoder.count_masked([num_tokens], num_tokens)[1:]]


def draw_schedules(schedules: Mapping[str, MaskSchedule], *, num_tokens: int) -> bytes:
    """Draws the mask ratio of each schedule over the progress.

    Args:
        schedules: Schedules by their name in the legend.
        num_tokens: Number N of tokens, which some schedules depend on.

    Returns:
        A PNG.

    Source: paper, Figure 8, left.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(6.4, 4.4), layout="constrained")
    _plot_ratios(page.subplots(), schedules, num_tokens)
    page.legend(loc="outside right center", frameon=False)
    return figure_to_png(page)


def draw_figure_8(
    results: Sequence[ScheduleResult],
    *,
    num_tokens: int,
    metric: str,
    num_images: int,
    floor: float | None,
    dataset: str,
) -> bytes:
    """Draws the mask schedules on the left, and the FID of the model of each over T on the right.

    Args:
        results: Results of the schedules.
        num_tokens: Number N of tokens, which ``log`` and ``exp`` depend on.
        metric: Name of the metric, such as ``fid/classifier``.
        num_images: Number of images per point.
        floor: Value of the same number of real images; None draws no line.
        dataset: Name of the data, for the title.

    Returns:
        A PNG.

    Source: paper, Figure 8.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(12.6, 5.2), layout="constrained")
    left, right = page.subplots(1, 2, gridspec_kw={"wspace": 0.14})
    _plot_ratios(left, {result.schedule: result.mask_schedule for result in results}, num_tokens)
    left.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=2)
    colours = _colours(result.schedule for result in results)
    _plot_quality(right, results, colours)
    if floor is not None:
        plot_floor(right, floor, f"real images: {floor:.2f}")
    right.set_ylabel(f"{metric} of {num_images} images (lower is better)")
    right.set_title(f"{plain_label(dataset)}: one model per schedule, star at the best T", fontsize=11, loc="left")
    ends = {
        result.schedule: LineEnd(
            f"{result.schedule}, best T = {result.best_steps}",
            (max(result.curve), result.curve[max(result.curve)]),
            colours[result.schedule],
        )
        for result in results
    }
    name_lines(page, right, ends)
    return figure_to_png(page)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour per schedule; schedules that the paper does not have share a few colours."""
    names = list(names)
    others = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: _COLOURS.get(name) or next(others) for name in names}


def _plot_ratios(axes: Axes, schedules: Mapping[str, MaskSchedule], num_tokens: int) -> None:
    progress = torch.linspace(0, 1, _POINTS)
    ratios = {name: schedule(progress, num_tokens).clamp(0, 1) for name, schedule in schedules.items()}
    colours = _colours(ratios)
    # The order of the legend is that of the curves from top to bottom.
    for number, name in enumerate(sorted(ratios, key=lambda name: -float(ratios[name].mean()))):
        style = ("solid", "dashed", "dashdot")[number // 10 % 3]  # colours repeat, styles tell the lines apart
        axes.plot(progress.numpy(), ratios[name].numpy(), color=colours[name], label=plain_label(name), linestyle=style,
                  linewidth=1.8)  # fmt: skip
    axes.set(xlabel="progress r = t / T", ylabel="mask ratio gamma(r)", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"mask schedules, N = {num_tokens} tokens", fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_quality(axes: Axes, results: Sequence[ScheduleResult], colours: Mapping[str, str]) -> None:
    plot_by_steps(axes, {result.schedule: result.curve for result in results}, colours)
    values = [value for result in results for value in result.curve.values()]
    # The default ticks of a logarithmic axis are powers of ten, which are too few here.
    if axes.get_yscale() == "log":
        ticks = [tick for tick in _TICKS if min(values) / 1.3 <= tick <= max(values) * 1.3]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    for result in results:
        axes.plot([result.best_steps], [result.curve[result.best_steps]], color=colours[result.schedule], marker="*",
                  markersize=14, markeredgecolor="white", zorder=5)  # fmt: skip
