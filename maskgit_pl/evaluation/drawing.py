"""What the figures have in common: names at the ends of lines instead of a legend, and how a figure is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.files import write_atomically
from maskgit_pl.text import plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LineEnd", "name_lines", "save_figure", "spread"]

_LABEL_HEIGHT = 0.047  # of the axes: how far apart the names at the ends of lines are at least


@dataclass(frozen=True)
class LineEnd:
    """Where a line ends, and what it is called there.

    Args:
        label: Its name.
        point: In the units of the axes.
        colour: Of the name.
        bold: Whether it stands out.
    """

    label: str
    point: tuple[float, float]
    colour: str
    bold: bool = False


def name_lines(figure: Figure, axes: Axes, ends: Mapping[str, LineEnd], *, least: float = _LABEL_HEIGHT) -> None:
    """Writes names at the right ends of lines, moved apart where lines end close to one another.

    Args:
        figure: Everything else must be drawn already.
        axes: Where the lines are.
        ends: By any name.
        least: How far apart names are, as a share of the axes' height.
    """
    figure.draw_without_rendering()  # ends of lines have their places from here on
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: float(to_axes.transform(end.point)[1]) for name, end in ends.items()}
    for name, height in spread(heights, least=least).items():
        end = ends[name]
        axes.annotate(
            plain_label(end.label), end.point, (1.035, height), textcoords="axes fraction", color=end.colour,
            fontsize=10 if end.bold else 9, fontweight="bold" if end.bold else "normal", va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as stream:
        figure.savefig(stream, dpi=150, format="png")


def spread(heights: Mapping[str, float], *, least: float) -> dict[str, float]:
    """Heights moved apart to at least ``least`` from one another, in their order and as little as that takes.

    Neighbours that are too close become a group around the middle of what they want.
    """
    names = sorted(heights, key=lambda name: heights[name])
    groups: list[list[str]] = []
    for name in names:
        groups.append([name])
        while len(groups) > 1 and _bottom(groups[-1], heights, least) - _top(groups[-2], heights, least) < least:
            groups[-2:] = [groups[-2] + groups[-1]]
    return {
        name: _bottom(group, heights, least) + place * least for group in groups for place, name in enumerate(group)
    }


def _bottom(group: Sequence[str], heights: Mapping[str, float], least: float) -> float:
    return sum(heights[name] for name in group) / len(group) - least * (len(group) - 1) / 2


def _top(group: Sequence[str], heights: Mapping[str, float], least: float) -> float:
    return _bottom(group, heights, least) + least * (len(group) - 1)
