"""Commands as they are typed, for the line of a page that says what makes it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["command_line", "flag_words"]


def command_line(words: Sequence[object], flags: Mapping[str, object]) -> str:
    """Returns a command with its flags."""
    return " ".join([*map(str, words), *flag_words(flags)])


def flag_words(flags: Mapping[str, object]) -> list[str]:
    """Returns flags with their values as they are typed; those that are None are left out.

    Args:
        flags: By name: numbers, words, and sequences or mappings of them.
    """
    return [
        f"--{name.replace('_', '-')} {shlex.quote(_word(value))}" for name, value in flags.items() if value is not None
    ]


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_word, value))
    return str(value.as_posix() if isinstance(value, Path) else value)
