"""Zip archives of strangers: the directory of an archive is limited before ``zipfile`` parses all of it.

Used by the readers of archives of images, of ``.npz`` files and of weight files.
"""

from __future__ import annotations

import zipfile
from typing import IO, Any, cast

from maskgit_pl.files import size_text

__all__ = ["TooLargeDirectoryError", "open_zip"]

_MAX_BYTES = 2**30  # of a directory; 10 million entries with names of 60 letters
_SIGNATURE = b"PK\1\2"  # of an entry. Source: PKWARE, APPNOTE.TXT 6.3.10, section 4.3.12


class TooLargeDirectoryError(zipfile.BadZipFile):
    """The directory of a zip has too many entries or bytes. The message continues "must have"."""


def open_zip(stream: IO[bytes], *, max_entries: int) -> zipfile.ZipFile:
    """Opens a zip for reading.

    ``zipfile`` needs some 600 bytes of memory for each entry, which takes as few as 46 bytes of the file. It ignores
    the number of entries that the file states.

    Args:
        stream: The file, which must stay open.
        max_entries: Maximum number of entries.

    Raises:
        TooLargeDirectoryError: if there are more entries, or the directory is longer than 1 GiB.
        zipfile.BadZipFile: if the file is damaged or not a zip.
    """
    limited = _LimitedStream(stream, max_entries)
    archive = zipfile.ZipFile(cast("IO[bytes]", limited))
    limited.is_limited = False  # members may have any length
    return archive


class _LimitedStream:
    """A stream whose reads are limited in bytes and entries; ``zipfile`` reads the whole directory in one call."""

    def __init__(self, stream: IO[bytes], max_entries: int) -> None:
        self.is_limited, self._stream, self._max_entries = True, stream, max_entries

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, size: int = -1) -> bytes:
        """Reads at most ``size`` bytes; all if it is negative."""
        if self.is_limited and size > _MAX_BYTES:
            raise TooLargeDirectoryError(
                f"a directory of at most {size_text(_MAX_BYTES)}, got one of {size_text(size)}"
            )
        data = self._stream.read(size)
        # At least the number of entries, since each begins with a signature.
        count = data.count(_SIGNATURE) if self.is_limited else 0
        if count > self._max_entries:
            raise TooLargeDirectoryError(f"at most {self._max_entries:,} entries, got {count:,}")
        return data
