"""Text for people: numbers, counts and sizes, hints, and untrusted text made safe to print.

Data sets, pretrained folders and plug-ins contain names, such as those of classes. They are stored unchanged
and escaped on output (``printable``, ``markdown``, ``python_string`` ...), so that every name is accepted and
none can forge a heading, a link, a table cell or a line of the terminal.
"""

from __future__ import annotations

import json
import logging
import math
import re
import unicodedata
from collections.abc import Collection, Sequence
from difflib import get_close_matches

_MAX_SHOWN = 200  # characters of a text
_MAX_VALUE = 80  # characters of a value in a message
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

    All kinds of spaces become a space. Control characters, line breaks, bidirectional and zero-width
    formatting, and characters that Unicode does not assign are written as Python escapes (``\x1b``).

    Args:
        text: Any object; its ``str`` is used.
        limit: Maximum number of characters; None for all. Longer texts end in ``...``.
    """
    # The limit comes first: a text of a gigabyte is not escaped as a whole.
    full = str(text)
    visible = full if limit is None else full[:limit]
    line = "".join(map(_printable_character, visible))
    return line if len(visible) == len(full) else f"{line}..."


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    # Zs: all spaces, such as the no-break space. Line and paragraph separators are in other categories.
    if unicodedata.category(character) == "Zs":
        return " "
    return repr(character)[1:-1]


class PrintableFormatter(logging.Formatter):
    """A formatter that makes each line of a log record printable, so that no name controls the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the lines of the record, each ``printable``."""
        return "\n".join(printable(line, limit=None) for line in super().format(record).split("\n"))


def list_some(texts: Sequence[str], *, most: int = 3, separator: str = ", ") -> str:
    """Lists the first texts, and the number of the others: ``a, b, c and 2 more``."""
    return separator.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def markdown(text: object) -> str:
    """Returns Markdown that renders as ``printable(text)`` in a paragraph, heading or table cell, without markup."""
    line = " ".join(printable(text).split())
    escaped = _SPECIAL.sub(lambda match: _AS_ENTITY.get(match[0], f"\\{match[0]}"), line)
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


def shorten(value: object) -> str:
    """Returns ``repr(value)``, at most 80 characters long, with control characters escaped."""
    # A long list would fill the terminal, and repr() of it takes time.
    if isinstance(value, list | tuple | dict | set) and len(value) > _MAX_VALUE:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = repr(value[: _MAX_VALUE + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # an integer of over 4,300 digits; a structure nested too deep
        return f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def did_you_mean(name: str, choices: Collection[str]) -> str:
    """Returns ``"did you mean 'x'?"`` for the choice closest to ``name``, or an empty string if none is close."""
    lower_name, names = name.lower(), {choice.lower(): choice for choice in choices}
    close = get_close_matches(lower_name, names, n=1) or [
        candidate for candidate in names if lower_name and candidate.startswith(lower_name)
    ]
    return f"did you mean {names[close[0]]!r}?" if close else ""


def count_text(count: int, noun: str) -> str:
    """Formats a count with its noun, such as ``1 node``, ``1,024 nodes`` or ``2 classes``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def size_text(count: float) -> str:
    """Returns a number of bytes with a unit and three digits, such as ``1.34 GB`` or ``512 bytes``."""
    # Decimal units, as disks are sold and as df -H prints them.
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            size = count / factor
            return f"{size:.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"
    return f"{count:.0f} bytes"


def parse_size(text: str) -> float:
    """Parses a number of bytes above 0, such as ``80GB``, ``24GiB`` or ``4e10``."""
    match = re.fullmatch(r"(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*(?:([KMGTP])(i?))?[bB]?", text)
    power = 1 + "KMGTP".index(match[2]) if match and match[2] else 0
    size = float(match[1]) * (1024 if match[3] else 1000) ** power if match else 0.0
    if not 0 < size < math.inf:
        raise ValueError(f"must be a size such as 80GB, 24GiB or 4e10, got {text}")
    return size
