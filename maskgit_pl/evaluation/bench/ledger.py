"""The results ledger: CSV files that hold what was measured, how and on what, a row each.

A row is written as soon as it is measured, and one that is there is not measured again; the paper's tables and figures
are made from these files. Rows are never changed: where the same thing is measured again, the last one counts.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from maskgit_pl.files import write_atomically

__all__ = ["NUMBERS", "REAL", "Ledger", "Row", "number", "present"]

Row = dict[str, str]

REAL = "real images"  # the model of a row that real images were measured for
NUMBERS = {  # column -> heading, factor, digits
    "fid": ("FID", 1, 2),
    "sfid": ("sFID", 1, 2),
    "kid": ("KID x 1000", 1000, 2),
    "is": ("IS", 1, 2),
    "precision": ("precision", 1, 3),
    "recall": ("recall", 1, 3),
    "density": ("density", 1, 3),
    "coverage": ("coverage", 1, 3),
    "class_agreement": ("class agreement %", 100, 1),
}


class Ledger:
    """One kind of measurement. The file is read once; what this process adds is in it at once.

    Args:
        file: ``results/KIND.csv``; it appears with the first row.
        key: Columns that say what was measured, and on what. Two rows that agree in all of them are the same
            measurement.
        writes: Whether this process keeps the file; of several that measure together one does.

    Raises:
        ValueError: A file without the key's columns, or a row of another length than its header.
    """

    def __init__(self, file: Path, key: tuple[str, ...], *, writes: bool = True) -> None:
        self.file, self.key, self.writes = file, key, writes
        self.rows: list[Row] = self._read() if file.is_file() else []

    def find(self, **key: object) -> Row | None:
        """The last row of a measurement, or None.

        Args:
            key: A value for each of the key's columns; others are not looked at.
        """
        wanted = self._key(key)
        return next((row for row in reversed(self.rows) if all(row[name] == wanted[name] for name in wanted)), None)

    def add(self, row: Mapping[str, object]) -> Row:
        """Keeps a row, in the file, with the columns that it brings; returns it as ``find`` gives it.

        Args:
            row: The key's columns and others; numbers are kept to the last bit, None as an empty cell.

        Raises:
            ValueError: One of the key's columns is missing.
        """
        self._key(row)
        fresh = {name: _cell(value) for name, value in row.items()}
        self.rows.append(fresh)
        if self.writes:
            self._write()
        return fresh

    def _read(self) -> list[Row]:
        with self.file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            names = reader.fieldnames or []
            missing = [name for name in self.key if name not in names]
            if missing:
                raise ValueError(f"results {self.file}: columns {missing} are missing; move it away to begin anew")
            return list(self._whole(reader))

    def _whole(self, reader: csv.DictReader[str]) -> Iterator[Row]:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"results {self.file}: line {reader.line_num} has not as many cells as the header")
            yield row

    def _write(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        stream = io.StringIO()
        writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.file) as target:
            target.write(stream.getvalue().encode())

    def _key(self, values: Mapping[str, object]) -> Row:
        missing = [name for name in self.key if name not in values]
        if missing:
            raise ValueError(f"results {self.file}: a value for each of {list(self.key)} is needed, {missing} missing")
        return {name: _cell(values[name]) for name in self.key}


def _cell(value: object) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def number(row: Mapping[str, str], name: str) -> float | None:
    """A number of a row; None where the cell is empty or there is no such column."""
    cell = row.get(name, "")
    return float(cell) if cell else None


def present(rows: Sequence[Mapping[str, str]], name: str) -> bool:
    """Whether some row has a value in a column."""
    return any(row.get(name, "") for row in rows)
