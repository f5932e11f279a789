"""Pages of reports: Markdown, CSV and pictures, and the functions that all reports build them with.

A word of a ledger row is untrusted: ``markdown``, ``plain_label`` and the cells escape it.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from maskgit_pl.evaluation.metrics import FeatureMetric, format_value, known_metrics, title
from maskgit_pl.files import write_atomically
from maskgit_pl.text import code_span, markdown, plain_label, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = [
    "Page",
    "choose_classes",
    "code_cell",
    "describe_provenance",
    "describe_reference",
    "figure_to_png",
    "format_seeds",
    "format_value",
    "heading",
    "image_to_png",
    "markdown",
    "markdown_table",
    "metric_cell",
    "metrics_of",
    "paragraph",
    "plain_label",
    "seeds_cell",
    "title",
    "word_cell",
]

_SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Page:
    """A page of a report, such as a table or figure of the paper with our measurements."""

    name: str  # of its files without suffix, such as ``table-1``
    lines: Sequence[str]  # of Markdown
    rows: Sequence[Mapping[str, Any]]  # ours, unrounded
    pictures: Mapping[str, bytes] = field(default_factory=dict)  # contents of PNG files by file name
    folder: Path = Path()  # that the page is written to, such as ``results/fashion-mnist``

    @property
    def markdown(self) -> str:
        """The text as Markdown."""
        return "\n".join([*self.lines, ""])

    @property
    def csv(self) -> str:
        """The rows as CSV with every column that any row has: values unrounded, mappings as JSON."""
        stream = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value
             for name, value in row.items()}
            for row in self.rows
        )  # fmt: skip
        return stream.getvalue()

    @property
    def contents(self) -> dict[str, bytes]:
        """The contents of all files by name: ``NAME.md``, ``NAME.csv`` and the pictures."""
        return {f"{self.name}.md": self.markdown.encode(), f"{self.name}.csv": self.csv.encode(), **self.pictures}

    def write(self) -> list[Path]:
        """Writes all files, each atomically, and returns their paths."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.contents.items():
            with write_atomically(self.folder / name) as stream:
                stream.write(content)
        return [self.folder / name for name in self.contents]


def typed_command() -> str:
    """Returns the command of this process as it was typed, of ``maskgit`` or ``paper/``; empty in another program."""
    program = Path(sys.argv[0])
    if program.stem == "maskgit" or program.parts[-2:] == ("maskgit_pl", "__main__.py"):
        command = ["maskgit"]
    elif program.parts[-2:-1] == ("paper",):
        command = ["python", "-m", f"paper.{program.stem}"]
    else:
        return ""
    return shlex.join([*command, *sys.argv[1:]])


def heading(text: str) -> list[str]:
    """Returns the first lines of a page: its title and the command that makes it."""
    command = typed_command()
    return [f"# {text}", "", *([f"    {printable(command, limit=None)}", ""] if command else [])]


def paragraph(*sentences: str) -> list[str]:
    """Returns sentences as lines of at most 118 characters."""
    return textwrap.wrap(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False)


def code_cell(text: str) -> str:
    """Returns a table cell with a text as code; an empty text gives an empty cell."""
    return code_span(text) if text else ""


def word_cell(row: Mapping[str, Any], name: str) -> str:
    """Returns a word or count of a row as a table cell, which is empty if the row has none."""
    value = row.get(name)
    return "" if value is None else markdown(value)


def metrics_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the metrics that any row has: those of features in the order of tables, then others in that of rows."""
    metrics = known_metrics()  # once: the names of plug-ins are read from all installed packages
    computed = [name for name, metric in metrics.items() if isinstance(metric, FeatureMetric)]
    names = dict.fromkeys([*computed, *(name for row in rows for name in row)])
    return [
        name for name in names if name.partition("/")[0] in metrics and any(row.get(name) is not None for row in rows)
    ]


def metric_cell(row: Mapping[str, Any], name: str, *, more_digits: int = 0) -> str:
    """Returns the value of a metric as a table cell, which is empty if the row has none; see ``format_value``."""
    value = row.get(name)
    return "" if value is None else format_value(name, value, more_digits=more_digits)


def format_seeds(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Returns the value of one seed, or the mean and the range of several: ``2.10 (2.00 to 2.20)``; empty for none."""
    if len(values) < 2:
        return "".join(map(text, values))
    return f"{text(fmean(values))} ({text(min(values))} to {text(max(values))})"


def seeds_cell(rows: Sequence[Mapping[str, Any]], name: str, text: Callable[[float], str] | None = None) -> str:
    """Returns the values of a column, by default of a metric, as a table cell with the rows of all seeds."""
    return format_seeds([row[name] for row in rows if row.get(name) is not None], text or partial(format_value, name))


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Returns the lines of a Markdown table. The first ``left`` columns are aligned left, numbers right."""
    first, *lines = ("| " + " | ".join(cells) + " |" for cells in (headings, *rows))
    return [first, "|" + "---|" * left + "---:|" * (len(headings) - left), *lines]


def describe_reference(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describes the real images that the rows compare with: their number and their source."""
    sources = dict.fromkeys(
        f"{word_cell(row, 'real_images')} real images of {_reference_name(row)}"
        if row.get("real_images")
        else f"the statistics of {_reference_name(row)}"
        for row in rows
    )
    return " and ".join(sources)


def _reference_name(row: Mapping[str, Any]) -> str:
    """Returns the name of the split or file that a row compares with."""
    return markdown(row.get("reference_file") or f"the {row.get('split') or 'val'} split")


def describe_provenance(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a paragraph with the data, the code and the device of the rows; each value occurs once."""
    columns = {"data": "dataset", "data fingerprint": "data", "commit": "commit", "date": "date", "device": "device"}
    facts = [
        f"{name} " + ", ".join(
            markdown(value)
            for value in dict.fromkeys(str(row.get(column) or "")[: 12 if column == "commit" else None] for row in rows)
            if value
        )
        for name, column in columns.items()
    ]  # fmt: skip
    return paragraph(f"Measured on: {'; '.join(facts)}. The ledger has every row with its decoding and all digests.")


def choose_classes(num_classes: int) -> list[int]:
    """Returns the classes that a sheet of images shows: 10 evenly spaced ones, or all if there are fewer."""
    count = min(num_classes, _SHOWN_CLASSES)
    # Evenly spaced, because neighbouring classes of ImageNet are similar.
    return [number * num_classes // count for number in range(count)]


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
