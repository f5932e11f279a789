"""Brace expansion of lists of shards, such as ``train-{00000..01023}.tar``, with a limit on the number of names.

Used by ``index`` and by the configuration of streams. The names are counted before they are expanded, since
``braceexpand`` keeps each range in memory, and a few characters can stand for any number of names.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from maskgit_pl.checks import shorten

__all__ = ["MAX_NAMES", "count_names", "expand_braces"]

MAX_NAMES = 1_000_000
_MAX_PATTERN = 4096  # characters
_MAX_CHARACTERS = 2**28  # of all names together; no name is longer than its pattern
_INTEGERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET = string.ascii_uppercase + string.ascii_lowercase  # in the order of braceexpand


def expand_braces(pattern: str) -> list[str]:
    """Expands the braces of a pattern.

    Args:
        pattern: Braces of a shell: ``{000..012}``, ``{0..10..2}``, ``{a..c}``, ``{train,val}``; they may be nested.

    Returns:
        The names, in the order of a shell; the pattern itself if it has no braces.

    Raises:
        ValueError: if the braces do not close, the pattern is too long, or it has more than 1,000,000 names.
    """
    from braceexpand import braceexpand

    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"a pattern must have at most {_MAX_PATTERN} characters, got {len(pattern)}")
    try:
        count = count_names(pattern)
    except RecursionError as error:
        raise ValueError(f"a pattern must not have deeply nested braces, got {shorten(pattern)}") from error
    if count > MAX_NAMES or count * len(pattern) > _MAX_CHARACTERS:
        raise ValueError(f"a pattern must name at most {MAX_NAMES} shards, got {shorten(count)} in {shorten(pattern)}")
    return list(braceexpand(pattern))


def count_names(pattern: str) -> int:
    """Returns the number of names in the expansion of a pattern, without expanding it.

    The number is the product, over its outermost pairs of braces, of the choices in each pair.

    Raises:
        ValueError: if the braces do not close.
    """
    count, start = 1, 0
    for place, mark, depth in _marks(pattern):
        if mark == "{" and depth == 1:
            start = place + 1
        elif mark == "}" and depth == 0:
            count *= _count_choices(pattern[start:place])
    return count


def _count_choices(inner: str) -> int:
    """Returns the number of choices in a pair of braces: of a range, of a list, or 1 (then the braces are literal)."""
    if match := _INTEGERS.fullmatch(inner):
        return _steps(int(match[1]), int(match[2]), match[3])
    if match := _LETTERS.fullmatch(inner):
        return _steps(_ALPHABET.index(match[1]), _ALPHABET.index(match[2]), match[3])
    # A list: its parts may contain braces again.
    commas = [place for place, mark, depth in _marks(inner) if mark == "," and depth == 0]
    ends = zip([-1, *commas], [*commas, len(inner)], strict=True)
    return sum(count_names(inner[before + 1 : end]) for before, end in ends)


def _steps(first: int, last: int, step: str | None) -> int:
    return abs(last - first) // (int(step or 1) or 1) + 1


def _marks(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Yields the braces and commas that are not escaped: position, character, and the nesting depth after it."""
    depth, place = 0, 0
    while place < len(pattern):
        mark = pattern[place]
        if mark == "\\":
            place += 1
        elif mark in "{},":
            depth += (mark == "{") - (mark == "}")
            yield place, mark, depth
        place += 1
    if depth:
        raise ValueError(f"braces must close, got {shorten(pattern)}")
