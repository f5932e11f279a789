"""The ledger of measurements: a JSON Lines file with the values, settings and inputs of each measurement.

``evaluate``, ``compare``, ``tune``, ``table``, ``figure`` and ``ablation`` read and write it. Each line is one
measurement in plain values; ``pandas.read_json(file, lines=True)`` reads the file. A line is appended as soon as it is
measured, and a measurement that the file holds is not repeated. Lines are never changed: if the same measurement occurs
twice, the last line counts.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from filelock import lock_descriptor

__all__ = ["FILE_NAME", "REAL", "Ledger", "Row", "format_csv", "has_column", "read_number"]

Row: TypeAlias = dict[str, Any]

FILE_NAME = "ledger.jsonl"
REAL = "real images"  # value of the column "model" in a row of real images
_log = logging.getLogger(__name__)


class Ledger:
    """The measurements of a file, which is read once, with those that this process adds.

    Args:
        file: Path of ``ledger.jsonl``; the first measurement creates it. An incomplete last line, of a process that was
            killed, is ignored, and removed before the next line is written.
        writes: True if this process writes the file; only one of several ranks does.
        reuse: True to find the lines that the file already holds; False to measure everything again.

    Raises:
        ValueError: if a line is not a measurement. The message names it.
    """

    def __init__(self, file: Path, *, writes: bool = True, reuse: bool = True) -> None:
        self.file, self.writes = file, writes
        self._rows: dict[str, list[Row]] = _read(file) if file.exists() else defaultdict(list)
        self._skipped = {} if reuse else {kind: len(rows) for kind, rows in self._rows.items()}
        # Rows by kind of measurement and columns of the key, then by the values of the key.
        self._index: dict[tuple[str, tuple[str, ...]], dict[Hashable, list[Row]]] = {}

    def rows(self, measurement: str) -> list[Row]:
        """Returns all rows of a kind of measurement, in the order of the file."""
        return list(self._rows[measurement])

    def find(self, measurement: str, key: Mapping[str, object], *, having: Collection[str] = ()) -> Row | None:
        """Returns the last row with a key, or None.

        A row that lacks a column of the key is never returned.

        Args:
            measurement: Kind of measurement, such as ``"samples"``.
            key: Values of the columns that determine the measurement.
            having: Names of columns that the row must have; a column without a value counts.
        """
        columns = tuple(sorted(key))
        index = self._index.get((measurement, columns))
        if index is None:
            index = self._index[measurement, columns] = {}
            for row in self._rows[measurement][self._skipped.get(measurement, 0) :]:
                _insert(index, columns, row)
        rows = index.get(_values(columns, key), [])
        return next((row for row in reversed(rows) if all(name in row for name in having)), None)

    def add(self, measurement: str, row: Mapping[str, object]) -> Row:
        """Appends a measurement, which is on disk when the method returns.

        Args:
            measurement: Kind of measurement.
            row: Values of the key's columns and of others.

        Returns:
            The row, as ``find`` returns it.
        """
        line = json.dumps({"measurement": measurement, **row})
        added: Row = json.loads(line)
        self._rows[measurement].append(added)
        for (kind, columns), index in self._index.items():
            if kind == measurement:
                _insert(index, columns, added)
        if self.writes:
            self._append(line.encode() + b"\n")
        return added

    def _append(self, line: bytes) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as stream:
            # The lock keeps lines of several commands apart; closing the file releases it. Some file systems have none.
            with suppress(OSError):
                lock_descriptor(stream.fileno())
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)  # without an incomplete last line
            stream.write(line)
            # A measurement may have taken hours: it must survive a crash of the machine.
            stream.flush()
            os.fsync(stream.fileno())


def _read(file: Path) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = defaultdict(list)
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):  # a killed process left it
                _log.info("ledger %s: line %d is incomplete; it will be measured again", file, number)
                break
            try:
                row = json.loads(line)
                rows[row["measurement"]].append(row)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"ledger {file}: line {number} is not a measurement; remove the line, or move the file away"
                ) from error
    return rows


def _insert(index: dict[Hashable, list[Row]], columns: Sequence[str], row: Row) -> None:
    if all(name in row for name in columns):
        index.setdefault(_values(columns, row), []).append(row)


def _values(columns: Sequence[str], row: Mapping[str, object]) -> Hashable:
    return tuple(_freeze(row[name]) for name in columns)


def _freeze(value: Any) -> Hashable:
    """Returns a plain value as a hashable one; tuples equal lists, and 1 equals 1.0."""
    if isinstance(value, dict):
        return frozenset((name, _freeze(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    return value  # type: ignore[no-any-return]  # a string, a number or None


def read_number(row: Mapping[str, Any], name: str) -> float | None:
    """Returns a number of a row, or None if the row has no value in that column."""
    value = row.get(name)
    return None if value is None else float(value)


def has_column(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Returns True if any row has a value in a column."""
    return any(row.get(name) is not None for row in rows)


def format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV with every column that any row has: values unrounded, mappings as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return stream.getvalue()


def _cell(value: object) -> object:
    return json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value
