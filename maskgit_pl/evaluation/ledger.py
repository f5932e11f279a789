"""The ledger of measurements, so that nothing is measured twice.

It is a JSON Lines file with the values, settings and inputs of each measurement. A line is appended as soon as
it is measured and never changed: if the same measurement occurs twice, the last line counts.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from filelock import lock_descriptor

from maskgit_pl.distributed import rank_and_world
from maskgit_pl.files import sync_open

__all__ = ["FILE_NAME", "REAL", "Ledger", "Row", "digest_of", "shorten_digest"]

Row: TypeAlias = dict[str, Any]
"""A measurement: its values, settings and inputs by column."""

FILE_NAME = "ledger.jsonl"
REAL = "real images"  # value of the column "model" in a row of real images


def digest_of(values: Any) -> str:
    """Returns the SHA-256 in hex of plain values; the order of mapping keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def shorten_digest(digest: str) -> str:
    """Returns the first 16 hex digits (64 bits), which file names and ledger rows hold."""
    return digest[:16]


class Ledger:
    """The measurements of a file, which is read once, with those that this process adds. Only the first rank writes.

    Args:
        file: Path of ``ledger.jsonl``; the first measurement creates it.
        reuse: False to leave the lines that the file already holds unread, and measure everything again.

    Raises:
        ValueError: if a line is not a measurement. The message names it.
    """

    def __init__(self, file: Path, *, reuse: bool = True) -> None:
        self.file = file
        self._rows: dict[str, list[Row]] = defaultdict(list)
        lines = file.read_bytes().splitlines() if reuse and file.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                self._rows[row["measurement"]].append(row)
            except (ValueError, LookupError, TypeError) as error:  # such as the half of a line, when the disk was full
                raise ValueError(
                    f"ledger {file}: line {number} is not a measurement; remove the line, or move the file away"
                ) from error

    def rows(self, measurement: str) -> list[Row]:
        """Returns all rows of a kind of measurement, in the order of the file."""
        return list(self._rows[measurement])

    def find(self, measurement: str, key: Mapping[str, object], *, having: Collection[str] = ()) -> Row | None:
        """Returns the last row of a kind of measurement with all columns of a key, or None.

        ``having`` are names of columns that the row must have, too; a column without a value counts.
        """
        columns: Row = json.loads(json.dumps(key))  # as a row is read: tuples become lists
        rows = reversed(self._rows[measurement])
        return next((row for row in rows if columns.items() <= row.items() and row.keys() >= {*having}), None)

    def add(self, measurement: str, row: Mapping[str, object]) -> Row:
        """Appends a measurement, which is on disk when the method returns, and returns its row as ``find`` does."""
        line = json.dumps({"measurement": measurement, **row})
        self._rows[measurement].append(json.loads(line))
        if rank_and_world()[0] == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as stream:
                # The lock keeps lines of several commands apart; closing the file releases it. Some file
                # systems have none.
                with suppress(OSError):
                    lock_descriptor(stream.fileno())
                stream.write(f"{line}\n")
                # A measurement may have taken hours: it must survive a crash of the machine.
                stream.flush()
                sync_open(stream.fileno())
        return self._rows[measurement][-1]
