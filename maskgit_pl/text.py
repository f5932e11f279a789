"""Escapes untrusted text, such as class names, for terminals, pictures, Markdown and code.

Data sets, pretrained folders and plug-ins contain names. They are stored unchanged and escaped on output, so that every
name is accepted and none can forge a heading, a link, a table cell or a line of the terminal.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata

__all__ = [
    "PrintableFormatter",
    "code_span",
    "markdown",
    "plain_label",
    "printable",
    "python_string",
]

_MAX_SHOWN = 200  # characters of a text
_MAX_LABEL = 60  # characters; longer labels leave no room for the axes
_AS_ENTITY = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
_SPECIAL = re.compile(
    r"[&<>|\\`*~$#!{}\[\]]"  # emphasis, code, links, images, HTML, tables, mathematics, headings, templates
    r"|(?<![^\W_])_|_(?![^\W_])"  # underscores that are not inside a word
    r"|:(?=//)|(?<=www)\.|@"  # addresses that the Markdown of GitHub turns into links
    r"|(?<!\S)[-+=]",  # lists and underlined headings, at any word, because a line may be wrapped there
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(?<!\S)(\d{1,9})([.)])(?!\S)")


def printable(text: object, *, limit: int | None = _MAX_SHOWN) -> str:
    r"""Returns one line without control characters, for terminals, logs and error messages.

    All kinds of spaces become a space. Control characters, line breaks, bidirectional and zero-width formatting, and
    characters that Unicode does not assign are written as Python escapes (``\x1b``).

    Args:
        text: Any object; its ``str`` is used.
        limit: Maximum number of characters; None for all. Longer texts end in ``...``.
    """
    # The limit comes first: a text of a gigabyte is not escaped as a whole.
    full = str(text)
    shown = full if limit is None else full[:limit]
    line = "".join(map(_printable_character, shown))
    return line if len(shown) == len(full) else f"{line}..."


class PrintableFormatter(logging.Formatter):
    """A formatter that makes each line of a log record printable, so that no name controls the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the lines of the record, each ``printable``."""
        return "\n".join(printable(line, limit=None) for line in super().format(record).split("\n"))


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    # Zs: all spaces, such as the no-break space. Line and paragraph separators are in other categories.
    if unicodedata.category(character) == "Zs":
        return " "
    return repr(character)[1:-1]


def markdown(text: object) -> str:
    """Returns Markdown that renders as ``printable(text)`` in a paragraph, heading or table cell, without markup."""
    line = " ".join(printable(text).split())
    escaped = _SPECIAL.sub(lambda found: _AS_ENTITY.get(found[0], f"\\{found[0]}"), line)
    return _NUMBERED.sub(r"\1\\\2", escaped)


def code_span(text: object) -> str:
    """Returns a Markdown code span; or ``markdown(text)``, if the text has characters that end a span or a cell."""
    line = " ".join(printable(text).split())
    return markdown(line) if not line or set("`|\\") & set(line) else f"`{line}`"


def python_string(text: str) -> str:
    """Returns a Python string literal of printable characters in double quotes that evaluates to ``text``."""
    return printable(json.dumps(text, ensure_ascii=False), limit=None)


def plain_label(text: object) -> str:
    r"""Returns a label for matplotlib: at most 60 characters of ``printable(text)``, with ``$`` escaped.

    matplotlib leaves labels that begin with an underscore out of a legend, so a space is put before one.
    """
    label = printable(text, limit=_MAX_LABEL).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label
