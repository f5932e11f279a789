"""Pages of reports: Markdown, CSV and pictures, and the functions that all reports build them with."""

from __future__ import annotations

import io
import json
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.evaluation.ledger import format_csv
from maskgit_pl.files import write_atomically
from maskgit_pl.text import code_span, printable

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

__all__ = [
    "Page",
    "choose_classes",
    "code_cell",
    "command_line",
    "heading",
    "image_to_png",
    "markdown_table",
    "paragraph",
    "terminal_table",
    "terminal_word",
]

_SHOWN_CLASSES = 10


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


def image_to_png(picture: Image.Image) -> bytes:
    """Returns a picture as a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def choose_classes(num_classes: int) -> list[int]:
    """Returns the classes that a sheet of images shows: 10 evenly spaced ones, or all if there are fewer."""
    shown = min(num_classes, _SHOWN_CLASSES)
    # Evenly spaced, because neighbouring classes of ImageNet are similar.
    return [number * num_classes // shown for number in range(shown)]


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


def heading(title: str, command: str) -> list[str]:
    """Returns the first lines of a page: the title, and the command that produces the page."""
    return [f"# {title}", "", f"    {printable(command, limit=None)}", ""]


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Returns the lines of a Markdown table.

    Args:
        headings: Heading of each column.
        rows: Cells, in Markdown.
        left: Number of first columns that are aligned left; the others hold numbers and are aligned right.
    """
    lines = [_line(headings), "|" + "---|" * left + "---:|" * (len(headings) - left)]
    return [*lines, *map(_line, rows)]


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


def paragraph(*sentences: str) -> list[str]:
    """Returns sentences as lines of at most 118 characters."""
    return textwrap.wrap(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False)


def code_cell(text: str) -> str:
    """Returns a table cell with a text as code; an empty text gives an empty cell."""
    return code_span(text) if text else ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
