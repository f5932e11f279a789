"""Calls of Pillow on files that may be hostile: its errors become ours, and its warnings are silent in every thread."""

from __future__ import annotations

import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from maskgit_pl.data.image_bytes import UnreadableImageError
from maskgit_pl.text import printable

__all__ = ["PIL_ERRORS", "decode_error", "first_words", "pil_errors", "silent_warnings"]

PIL_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error)
"""The errors that Pillow raises on damaged or hostile files."""

_filters_lock = threading.Lock()  # the list of warning filters belongs to the process
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_filters_lock.acquire, after_in_parent=_filters_lock.release, after_in_child=_filters_lock.release
    )


@contextmanager
def silent_warnings() -> Iterator[None]:
    """Drops warnings. Pillow warns of odd metadata, which does no harm."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def pil_errors(name: str) -> Iterator[None]:
    """Turns errors of Pillow into ``UnreadableImageError``.

    Args:
        name: The image's name in error messages.
    """
    try:
        yield
    except UnreadableImageError:
        raise
    except PIL_ERRORS as error:
        raise decode_error(name, error) from error


def decode_error(name: str, error: Exception) -> UnreadableImageError:
    """Returns the error for an image whose pixels another package cannot decode.

    Args:
        name: The image's name.
        error: The package's error.
    """
    return UnreadableImageError(f"image {name} cannot be decoded: {first_words(error)}")


def first_words(error: Exception) -> str:
    """Returns the first line of another package's error, at most 200 characters."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:200])
