"""The results ledger: CSV files that hold what was measured, how and on what, a row each.

A row is written as soon as it is measured, and one that is there is not measured again; the paper's tables and figures
are made from these files. Rows are never changed: where the same thing is measured again, the last one counts.
"""

from __future__ import annotations

import csv
import io
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from maskgit_pl.checks import shorten
from maskgit_pl.files import size_text, write_atomically

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
_COUNTS = ("parameters", "num_images", "real_images", "num_steps", "num_tokens", "draws", "training_images",
           "training_steps", "runs")  # fmt: skip
_VALUES = ("kid_deviation", "is_deviation", "diversity", "seconds_per_image", "least", "top1", "top5")
_ESTIMATES = ("masked_nll", "elbo_", "exact_")  # what such columns begin with
_MAX_BYTES, _DIGITS_OF_A_COUNT = 100_000_000, 19


class Ledger:
    """One kind of measurement. The file is read once; what this process adds is in it at once.

    Args:
        file: ``results/KIND.csv``; it appears with the first row.
        key: Columns that say what was measured, and on what. Two rows that agree in all of them are the same
            measurement.
        digests: Columns of the key that are never empty, and that older files lack. A row without one of them stays in
            the file, but does not say enough to be found.
        results: Columns of numbers that every row has.
        writes: Whether this process keeps the file; of several that measure together one does.

    Raises:
        ValueError: if the file is not a ledger of this kind, or a line of it is not a row. The message names the line.
    """

    def __init__(
        self,
        file: Path,
        key: tuple[str, ...],
        *,
        digests: tuple[str, ...] = (),
        results: tuple[str, ...] = (),
        writes: bool = True,
    ) -> None:
        self.file, self.digests, self.results, self.writes = file, digests, results, writes
        self.key = (*key, *digests)
        self.rows: list[Row] = self._read(required=(*key, *results)) if file.exists() else []

    def find(self, **key: object) -> Row | None:
        """Returns the last row of a measurement, or None.

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
            ValueError: if one of the key's columns is missing.
        """
        self._key(row)
        fresh = {name: _cell(value) for name, value in row.items()}
        self.rows.append(fresh)
        if self.writes:
            self._write()
        return fresh

    def _read(self, required: Sequence[str]) -> list[Row]:
        state = self.file.stat()
        if not stat.S_ISREG(state.st_mode) or state.st_size > _MAX_BYTES:
            raise ValueError(f"results {self.file} must be a regular file of at most {size_text(_MAX_BYTES)}")
        with self.file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            try:
                names = reader.fieldnames or []
                missing = [name for name in required if name not in names]
                if missing:
                    raise ValueError(f"results {self.file}: columns {missing} are missing; move it away to begin anew")
                return list(self._whole(reader))
            except (csv.Error, UnicodeDecodeError) as error:
                raise self._refusal(reader, f"must be a row of UTF-8 text, got {error}") from error

    def _whole(self, reader: csv.DictReader[str]) -> Iterator[Row]:
        for row in reader:
            if None in row or None in row.values():
                raise self._refusal(reader, "must have as many cells as the header")
            for name, cell in row.items():
                if name in self.results and not cell:
                    raise self._refusal(reader, f"must have a number in column {name}")
                if cell and not _fits(name, cell):
                    raise self._refusal(reader, f"column {name} must be a finite number, got {shorten(cell)}")
            yield row | {name: "" for name in self.digests if name not in row}

    def _refusal(self, reader: csv.DictReader[str], rule: str) -> ValueError:
        return ValueError(f"results {self.file}: line {reader.reader.line_num} {rule}; mend it, or move the file away")

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
        wanted = {name: _cell(values[name]) for name in self.key}
        assert all(wanted[name] for name in self.digests), "an empty digest would find rows that lack one"
        return wanted


def _cell(value: object) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _fits(name: str, cell: str) -> bool:
    """Returns whether a cell of a column of counts or numbers is one; other columns hold any text."""
    if name in _COUNTS:
        return cell.isascii() and cell.isdigit() and len(cell) < _DIGITS_OF_A_COUNT
    if name not in NUMBERS and name not in _VALUES and not name.startswith(_ESTIMATES):
        return True
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def number(row: Mapping[str, str], name: str) -> float | None:
    """Returns a number of a row; None where the cell is empty or there is no such column."""
    cell = row.get(name, "")
    return float(cell) if cell else None


def present(rows: Sequence[Mapping[str, str]], name: str) -> bool:
    """Returns whether some row has a value in a column."""
    return any(row.get(name, "") for row in rows)
