"""Figure 8 of the paper: the mask ratio of each schedule, and the FID of its model over the number of steps T.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Figure 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from maskgit_pl.decoding import ParallelDecoder
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.pages import figure_to_png
from maskgit_pl.schedules import MaskSchedule
from maskgit_pl.text import plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
_REAL = "#3a7d44"
_POINTS = 513  # points of a curve of mask ratios


def draw_figure_8(
    schedules: Mapping[str, MaskSchedule],
    curves: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    num_tokens: int,
    network: str,
    num_images: int,
    floor: float,
    dataset: str,
) -> bytes:
    """Draws the mask schedules on the left, and the FID of the model of each over T on the right, as a PNG.

    A line is the mean of the values of each T, its bars their range, and its star the best T. ``floor`` is the FID of
    as many real images as ``num_images``, the images of each point.
    """
    page = Figure(figsize=(13.4, 5.2), layout="constrained")
    left, right = page.subplots(1, 2)
    _plot_ratios(left, schedules, num_tokens)
    left.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=2)
    means = {name: {steps: fmean(values) for steps, values in curve.items()} for name, curve in curves.items()}
    colours, values = _choose_colours(means), [value for curve in means.values() for value in curve.values()]
    right.set_xscale("log", base=2)
    if max(values) > 4 * min(values):
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
    # The legend is in the order of the line ends.
    for name, curve in sorted(means.items(), key=lambda item: -item[1][max(item[1])]):
        lowest, highest = ([bound(each) for each in curves[name].values()] for bound in (min, max))
        right.vlines(list(curve), lowest, highest, color=colours[name], linewidth=1.2, alpha=0.6, zorder=2)
        best = min(curve, key=lambda steps: curve[steps])
        right.plot(list(curve), list(curve.values()), color=colours[name], marker="o", linewidth=1.5, markersize=3.5,
                   zorder=2, label=plain_label(f"{name}, best T = {best}"))  # fmt: skip
        right.plot([best], [curve[best]], color=colours[name], marker="*", markersize=14, markeredgecolor="white",
                   zorder=5)  # fmt: skip
    right.axhline(floor, color=_REAL, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1, label=f"real images: {floor:.2f}")
    steps = sorted({step for curve in means.values() for step in curve})
    right.set_xticks(steps, [str(step) for step in steps])
    for axis in (right.xaxis, right.yaxis):
        axis.set_minor_locator(NullLocator())
    right.set_xlabel("decoding steps T")
    right.set_ylabel(f"{plain_label(f'FID ({network})')} of {num_images} images (lower is better)")
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    right.set_title(f"{plain_label(dataset)}: one model per schedule", fontsize=11, loc="left")
    return figure_to_png(page)


def draw_schedules(schedules: Mapping[str, MaskSchedule], *, num_tokens: int) -> bytes:
    """Draws the mask ratio of each schedule for N tokens over the progress, as a PNG. The names are the legend."""
    page = Figure(figsize=(6.4, 4.4), layout="constrained")
    _plot_ratios(page.subplots(), schedules, num_tokens)
    page.legend(loc="outside right center", frameon=False)
    return figure_to_png(page)


def count_known_tokens(schedule: MaskSchedule, *, num_tokens: int, num_steps: int) -> list[int]:
    """Counts the tokens of an image that are known after each of T decoding steps, T in [1, N]."""
    # The counts come from the decoder itself, so that the table shows what decoding does.
    decoder = ParallelDecoder(schedule, token_selectors.build("confidence"), num_steps=num_steps)
    return [num_tokens - step.after[0] for step in decoder.plan([num_tokens], num_tokens)]


def _plot_ratios(axes: Axes, schedules: Mapping[str, MaskSchedule], num_tokens: int) -> None:
    progress = torch.linspace(0, 1, _POINTS)
    ratios = {name: schedule(progress, num_tokens).clamp(0, 1) for name, schedule in schedules.items()}
    colours = _choose_colours(ratios)
    # The order of the legend is that of the curves from top to bottom.
    for number, name in enumerate(sorted(ratios, key=lambda name: -float(ratios[name].mean()))):
        style = ("solid", "dashed", "dashdot")[number // 10 % 3]  # colours repeat, styles tell the lines apart
        axes.plot(progress.numpy(), ratios[name].numpy(), color=colours[name], label=plain_label(name), linestyle=style,
                  linewidth=1.8)  # fmt: skip
    axes.set(xlabel="progress r = t / T", ylabel="mask ratio gamma(r)", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"mask schedules, N = {num_tokens} tokens", fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _choose_colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour per schedule; schedules that the paper does not have share a few colours."""
    names = list(names)
    others = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: _COLOURS.get(name) or next(others) for name in names}
