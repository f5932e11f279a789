"""Pages of reports: Markdown, CSV and pictures, and the functions that all reports build them with.

Figures share curves over the number of steps, labels at line ends, and PNG output.
"""

from __future__ import annotations

import io
import json
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from maskgit_pl.errors import code_span, plain_label, printable
from maskgit_pl.evaluation.ledger import format_csv, has_column
from maskgit_pl.evaluation.metrics import computed_metrics, find_metric, format_value
from maskgit_pl.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image
    from rich.table import Table

__all__ = [
    "LineEnd",
    "Page",
    "choose_classes",
    "code_cell",
    "command_line",
    "figure_to_png",
    "format_seeds",
    "heading",
    "image_to_png",
    "is_metric",
    "markdown_table",
    "metrics_of",
    "name_lines",
    "paragraph",
    "plot_by_steps",
    "plot_floor",
    "spread",
    "terminal_table",
    "terminal_word",
]

_SHOWN_CLASSES = 10
_LABEL_HEIGHT = 0.047  # minimum distance of two labels at line ends, as a fraction of the axes' height
_REAL = "#3a7d44"
_FAR = 3  # a floor more than 3 times below the lowest curve would leave half of the panel empty


@dataclass(frozen=True)
class Page:
    """A page of a report, such as a table or figure of the paper with our measurements.

    Args:
        name: File name without suffix, such as ``table-1``.
        markdown: The text, with the published rows next to ours.
        rows: Our rows, unrounded.
        pictures: Contents of PNG files by file name.
        folder: Folder that the page is written to, such as ``results/fashion-mnist``.
    """

    name: str
    markdown: str
    rows: Sequence[Mapping[str, Any]]
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def csv(self) -> str:
        """The rows as CSV, with every column that any row has."""
        return format_csv(self.rows)

    def write(self) -> list[Path]:
        """Writes ``NAME.md``, ``NAME.csv`` and the pictures, and returns the paths."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Atomic writes: a reader never sees half a page.
        contents = {f"{self.name}.md": self.markdown.encode(), f"{self.name}.csv": self.csv.encode(), **self.pictures}
        for name, content in contents.items():
            with write_atomically(self.folder / name) as stream:
                stream.write(content)
        return [self.folder / name for name in contents]


def heading(title: str, command: str) -> list[str]:
    """Returns the first lines of a page: the title, and the command that produces the page."""
    return [f"# {title}", "", f"    {printable(command, limit=None)}", ""]


def paragraph(*sentences: str) -> list[str]:
    """Returns sentences as lines of at most 118 characters."""
    return textwrap.wrap(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False)


def code_cell(text: str) -> str:
    """Returns a table cell with a text as code; an empty text gives an empty cell."""
    return code_span(text) if text else ""


def metrics_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the metrics that any row has: those of features in the order of tables, then others in that of rows."""
    names = dict.fromkeys([*computed_metrics(), *(name for row in rows for name in row)])
    return [name for name in names if is_metric(name) and has_column(rows, name)]


def is_metric(name: str) -> bool:
    """Returns True if a name such as ``fid/classifier`` is that of a metric."""
    try:
        find_metric(name)
    except ValueError:
        return False
    return True


def format_seeds(name: str, values: Sequence[float]) -> str:
    """Returns the value of one seed, or the mean and the range of several: ``2.10 (2.00 to 2.20)``; empty for none."""
    if len(values) < 2:
        return "".join(format_value(name, value) for value in values)
    mean, low, high = (format_value(name, value) for value in (fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Returns the lines of a Markdown table.

    Args:
        headings: Heading of each column.
        rows: Cells, in Markdown.
        left: Number of first columns that are aligned left; the others hold numbers and are aligned right.
    """
    lines = [_line(headings), "|" + "---|" * left + "---:|" * (len(headings) - left)]
    return [*lines, *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def terminal_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """Returns a table for a terminal of 80 columns.

    Args:
        title: Line above the table.
        headings: Heading of each column; the last word moves to a second line, to make the column narrow.
        rows: Cells, in Rich's markup; an empty row ends a section.
        left: Number of first columns that are aligned left.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=title, box=SIMPLE, padding=0)
    for place, text in enumerate(headings):
        # A heading of several words would make its column wider than the numbers in it.
        table.add_column("\n".join(text.rsplit(" ", 1)), justify="left" if place < left else "right")
    for row in rows:
        table.add_row(*row) if row else table.add_section()
    return table


def terminal_word(text: str) -> str:
    """Returns a cell of ``terminal_table`` with a text that is not read as markup."""
    from rich.markup import escape

    return escape(printable(text))


def command_line(words: Sequence[object], flags: Mapping[str, object]) -> str:
    """Returns a command line, which a page states to make itself reproducible.

    Args:
        words: The command and its positional arguments.
        flags: Values by flag name with underscores. None is left out, a sequence becomes a comma-separated list, and a
            mapping becomes JSON.
    """
    # Flags are written as they are typed, with hyphens and quotes.
    given = {name.replace("_", "-"): value for name, value in flags.items() if value is not None}
    return " ".join([*map(str, words), *(f"--{name} {shlex.quote(_word(value))}" for name, value in given.items())])


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_word, value))
    return str(value.as_posix() if isinstance(value, Path) else value)


def choose_classes(num_classes: int) -> list[int]:
    """Returns the classes that a sheet of images shows: 10 evenly spaced ones, or all if there are fewer."""
    shown = min(num_classes, _SHOWN_CLASSES)
    # Evenly spaced, because neighbouring classes of ImageNet are similar.
    return [number * num_classes // shown for number in range(shown)]


def image_to_png(picture: Image.Image) -> bytes:
    """Returns a picture as a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def figure_to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150, format="png")
    return stream.getvalue()


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
