"""Text of strangers, such as class names, made safe for terminals, pictures, Markdown and code.

A data set, a pretrained folder or a plug-in brings its own words. They are kept as they are and escaped where they are
shown, so that no name is refused and none can forge a heading, a link, a table cell or a line of the terminal.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import unicodedata

__all__ = ["PrintableFormatter", "argument_docs", "code_span", "markdown", "plain_label", "printable", "python_string"]

_MAX_SHOWN = 200  # characters of one text
_MAX_LABEL = 60  # longer ones leave no room for the axes
_AS_ENTITY = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
_SPECIAL = re.compile(
    r"[&<>|\\`*~$#!{}\[\]]"  # emphasis, code, links, images, HTML, tables, mathematics, headings, templates
    r"|(?<![^\W_])_|_(?![^\W_])"  # underscores, but for those inside a word
    r"|:(?=//)|(?<=www)\.|@"  # addresses that GitHub's Markdown makes links
    r"|(?<!\S)[-+=]",  # lists and underlined headings, wherever a line may be broken
    re.IGNORECASE,
)
_ARGUMENT = re.compile(r" {4}(?P<name>\w+): (?P<text>.*)")
_NUMBERED = re.compile(r"(?<!\S)(\d{1,9})([.)])(?!\S)")


def printable(text: object, *, limit: int | None = _MAX_SHOWN) -> str:
    r"""Returns one line without control characters, for terminals, logs and error messages.

    Spaces of all kinds become a space. Control characters, line breaks, bidirectional and zero-width formatting, and
    characters that Unicode does not assign are written as Python escapes (``\x1b``).

    Args:
        text: Anything; its ``str``.
        limit: Characters of ``text`` that are shown; None for all. Longer texts end in ``...``.
    """
    full = str(text)
    shown = full if limit is None else full[:limit]
    line = "".join(map(_printable_character, shown))
    return line if len(shown) == len(full) else f"{line}..."


class PrintableFormatter(logging.Formatter):
    """A formatter of log records that makes each line printable, so that no name controls the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the lines of the record, each ``printable``."""
        return "\n".join(printable(line, limit=None) for line in super().format(record).split("\n"))


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":
        return " "
    return repr(character)[1:-1]


def markdown(text: object) -> str:
    """Returns Markdown that renders as ``printable(text)`` in a paragraph, heading or table cell, never as markup."""
    line = " ".join(printable(text).split())
    escaped = _SPECIAL.sub(lambda found: _AS_ENTITY.get(found[0], f"\\{found[0]}"), line)
    return _NUMBERED.sub(r"\1\\\2", escaped)


def code_span(text: object) -> str:
    """Returns ``text`` as Markdown code; as ``markdown(text)`` where it holds what ends a code span or a table cell."""
    line = " ".join(printable(text).split())
    return markdown(line) if not line or set("`|\\") & set(line) else f"`{line}`"


def python_string(text: str) -> str:
    """Returns a Python literal in double quotes, of printable characters, that evaluates to ``text``."""
    return printable(json.dumps(text, ensure_ascii=False), limit=None)


def plain_label(text: object) -> str:
    r"""Returns a label for matplotlib: at most 60 characters of ``printable(text)``, no ``$...$`` as mathematics.

    A label that begins with an underscore would be left out of a legend; a space goes before it.
    """
    label = printable(text, limit=_MAX_LABEL).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def argument_docs(kind: type) -> dict[str, str]:
    """Returns what the ``Args`` section of a class's docstring says of each argument, each as one line."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for line in section.splitlines():
        if argument := _ARGUMENT.fullmatch(line):
            found[argument["name"]] = argument["text"]
        elif found:
            found[list(found)[-1]] += f" {line.strip()}"
    return found
