"""Maps classes that a user gives by index or by name to labels. Used by ``MaskGIT`` and the commands, without torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TypeAlias

from maskgit_pl.checks import plain_list, plain_number, shorten
from maskgit_pl.registry import nearest

__all__ = ["Classes", "class_ids", "parse_class", "parse_classes"]

Classes: TypeAlias = int | str | Sequence[int | str | None]

_MAX_LISTED = 20  # with more classes, an error lists the nearest names only
_INTEGER = re.compile(r"-?[0-9]{1,18}")


def class_ids(classes: Classes, names: Sequence[str], *, null_label: int | None) -> list[int]:
    """Returns the labels of classes given by index or by name; None is "no class".

    Args:
        classes: A list of indices in [0, number of classes), names and None; or a single index or name.
        names: Names of all classes in order.
        null_label: Label of "no class"; None if the model was trained without it.

    Raises:
        ValueError: if the list is empty, a class is unknown, a name belongs to several classes, or None is given to
            a model that was trained without "no class".
        TypeError: if a class is neither an integer nor a string.
    """
    given = plain_list(classes)
    if given is None:  # a single class
        given = [plain_number(classes)]
        if not isinstance(given[0], str | int):
            raise TypeError(f"classes must be class indices or names, got {shorten(classes)}")
    if not given:
        raise ValueError("classes must have at least one class, got none")
    return [_class_id(wanted, names, null_label) for wanted in given]


def parse_class(word: str, names: Sequence[str]) -> int | str:
    """Returns the class of a command line argument. Class names take precedence over indices."""
    return int(word) if word not in names and _INTEGER.fullmatch(word) else word


def parse_classes(text: str, names: Sequence[str], *, max_shown: int) -> list[int | str]:
    """Returns the classes of a comma-separated list. ``all`` gives at most ``max_shown`` classes, evenly spread."""
    if text == "all" and text not in names:
        shown = min(len(names), max_shown)
        return [number * len(names) // shown for number in range(shown)]
    return [parse_class(word, names) for word in map(str.strip, text.split(",")) if word]


def _class_id(wanted: object, names: Sequence[str], null_label: int | None) -> int:
    if wanted is None:
        if null_label is None:
            raise ValueError(
                "class must not be None: the model was trained without a null class (class_dropout 0); name a class"
            )
        return null_label
    if isinstance(wanted, str):
        return _find_class(wanted, names)
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise TypeError(f"class must be an index or a name, got {shorten(wanted)} ({type(wanted).__name__})")
    if not 0 <= wanted < len(names):
        raise ValueError(f"class must be an index in [0, {len(names)}) or a name, got {shorten(wanted)}")
    return wanted


def _find_class(wanted: str, names: Sequence[str]) -> int:
    # An exact match wins; without one, the case of letters is ignored.
    found = [number for number, name in enumerate(names) if name == wanted]
    found = found or [number for number, name in enumerate(names) if name.casefold() == wanted.casefold()]
    if not found:
        # 1,000 names of ImageNet would fill the terminal: only close ones are listed.
        close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.3)
        raise ValueError(f"unknown class {wanted!r}: {nearest(wanted, names if len(names) <= _MAX_LISTED else close)}")
    if len(found) > 1:
        raise ValueError(f"class {wanted!r} is the name of several classes; give one of the indices {found}")
    return found[0]
