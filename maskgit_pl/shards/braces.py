"""Lists of shards in braces, ``train-{00000..01023}.tar``, counted before they are expanded.

``braceexpand`` holds each range in memory: a few characters can ask for any number of names.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from maskgit_pl.checks import shorten

__all__ = ["MAX_NAMES", "count_names", "expand_braces"]

MAX_NAMES = 1_000_000
_MAX_PATTERN = 4096  # characters
_MAX_CHARACTERS = 2**28  # of all names together; a name is no longer than its pattern
_INTEGERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET = string.ascii_uppercase + string.ascii_lowercase  # in the order of braceexpand


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a pattern stands for.

    Args:
        pattern: As in a shell: ``{000..012}``, ``{0..10..2}``, ``{a..c}``, ``{train,val}``, nested and side by side.

    Raises:
        ValueError: if the braces do not close, or there are more than 1,000,000 names or too long ones.
    """
    from braceexpand import braceexpand

    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"a pattern must have at most {_MAX_PATTERN} characters, got {len(pattern)}")
    try:
        count = count_names(pattern)
    except RecursionError as error:
        raise ValueError(f"a pattern must not nest its braces so deep, got {shorten(pattern)}") from error
    if count > MAX_NAMES or count * len(pattern) > _MAX_CHARACTERS:
        raise ValueError(f"a pattern must name at most {MAX_NAMES} shards, got {shorten(count)} in {shorten(pattern)}")
    return list(braceexpand(pattern))


def count_names(pattern: str) -> int:
    """Returns how many names ``braceexpand`` would make of a pattern, without making them.

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
    """Counts what stands between a pair of braces: a range, a list, or neither, and then the braces stay."""
    if match := _INTEGERS.fullmatch(inner):
        return _steps(int(match[1]), int(match[2]), match[3])
    if match := _LETTERS.fullmatch(inner):
        return _steps(_ALPHABET.index(match[1]), _ALPHABET.index(match[2]), match[3])
    commas = [place for place, mark, depth in _marks(inner) if mark == "," and depth == 0]
    ends = zip([-1, *commas], [*commas, len(inner)], strict=True)
    return sum(count_names(inner[before + 1 : end]) for before, end in ends)


def _steps(first: int, last: int, step: str | None) -> int:
    return abs(last - first) // (int(step or 1) or 1) + 1


def _marks(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Yields braces and commas that no backslash precedes: place, mark, and the number of braces open after it."""
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
