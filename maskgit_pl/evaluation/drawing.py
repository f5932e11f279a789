"""Functions that several figures share: curves over the number of steps, labels at line ends, and PNG output."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskgit_pl.text import plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LineEnd", "figure_to_png", "name_lines", "plot_by_steps", "plot_floor", "spread"]

_LABEL_HEIGHT = 0.047  # minimum distance of two labels at line ends, as a fraction of the axes' height
_REAL = "#3a7d44"
_FAR = 3  # a floor more than 3 times below the lowest curve would leave half of the panel empty


@dataclass(frozen=True)
class LineEnd:
    """The right end of a line with its label.

    Args:
        label: Name of the line.
        point: Coordinates of the end, in the units of the axes.
        colour: Colour of the label.
        bold: True for a line that is emphasised.
        second_line: Text below the name; empty for none.
    """

    label: str
    point: tuple[float, float]
    colour: str
    bold: bool = False
    second_line: str = ""


def plot_by_steps(
    axes: Axes, curves: Mapping[str, Mapping[int, float]], colours: Mapping[str, str], *, front: str | None = None
) -> None:
    """Plots a metric over the number of decoding steps, one line per name.

    The vertical axis is logarithmic if the values span more than a factor of 4.

    Args:
        axes: Empty axes.
        curves: Values by name and number of steps.
        colours: Colours by name.
        front: Name of the line that is emphasised; None for none.
    """
    values = [value for curve in curves.values() for value in curve.values()]
    # Steps double from one typical value to the next; a metric such as KID may be negative, which has no logarithm.
    axes.set_xscale("log", base=2)
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
    for name, curve in curves.items():
        steps, in_front = sorted(curve), name == front
        axes.plot(
            steps, [curve[step] for step in steps], color=colours[name], linewidth=3 if in_front else 1.5,
            marker="o", markersize=5.5 if in_front else 3.5, zorder=3 if in_front else 2,
        )  # fmt: skip
    every = sorted({step for curve in curves.values() for step in curve})
    axes.set_xticks(every, [str(step) for step in every])
    axes.minorticks_off()
    axes.set_xlabel("decoding steps T")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_floor(axes: Axes, floor: float, label: str) -> None:
    """Draws the value of real images as a dashed line, or only its label if it is far below all curves.

    Args:
        axes: Axes of ``plot_by_steps``.
        floor: Value of real images.
        label: Text above the line.
    """
    # A distant floor gets its label at the bottom of the axes instead of a line in data coordinates.
    near = floor > axes.dataLim.ymin / _FAR
    if near:
        axes.axhline(floor, color=_REAL, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    place = axes.get_yaxis_transform() if near else axes.transAxes
    axes.text(0.01, floor if near else 0.02, label, color=_REAL, transform=place, fontsize=9, va="bottom")


def name_lines(figure: Figure, axes: Axes, ends: Mapping[str, LineEnd], *, least: float = _LABEL_HEIGHT) -> None:
    """Writes labels at the right ends of lines, and moves them apart if they would overlap.

    Args:
        figure: Figure in which everything else is drawn.
        axes: Axes with the lines.
        ends: Line ends by name.
        least: Minimum distance of two labels, as a fraction of the axes' height.
    """
    figure.draw_without_rendering()  # the layout, and with it the places of the line ends, is computed here
    # Data coordinates may be logarithmic; the labels are spread in fractions of the axes' height.
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: float(to_axes.transform(end.point)[1]) for name, end in ends.items()}
    for name, height in spread(heights, least=least).items():
        end = ends[name]
        text = "\n".join(plain_label(line) for line in (end.label, end.second_line) if line)
        axes.annotate(
            text, end.point, (1.035, height), textcoords="axes fraction", color=end.colour,
            fontsize=10 if end.bold else 9, fontweight="bold" if end.bold else "normal", va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def figure_to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150, format="png")
    return stream.getvalue()


def spread(heights: Mapping[str, float], *, least: float) -> dict[str, float]:
    """Moves heights apart to a minimum distance, in their order and as little as possible.

    1. Take the heights in ascending order; each starts a group of its own.
    2. While a group overlaps the one below, merge the two. A group stands around the mean of its heights.

    Args:
        heights: Heights by name.
        least: Minimum distance.

    Returns:
        New heights by name.
    """
    names = sorted(heights, key=lambda name: heights[name])
    groups: list[list[str]] = []
    for name in names:
        groups.append([name])  # 1.
        # 2.
        while len(groups) > 1 and _bottom(groups[-1], heights, least) - _top(groups[-2], heights, least) < least:
            groups[-2:] = [groups[-2] + groups[-1]]
    return {
        name: _bottom(group, heights, least) + place * least for group in groups for place, name in enumerate(group)
    }


def _bottom(group: Sequence[str], heights: Mapping[str, float], least: float) -> float:
    return sum(heights[name] for name in group) / len(group) - least * (len(group) - 1) / 2


def _top(group: Sequence[str], heights: Mapping[str, float], least: float) -> float:
    return _bottom(group, heights, least) + least * (len(group) - 1)
