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
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

from filelock import lock_descriptor

from maskgit_pl.checks import check_integer, check_keys, check_number, shorten
from maskgit_pl.files import parse_json, size_text

__all__ = ["FILE_NAME", "KEYS", "REAL", "Ledger", "Row", "format_csv", "has_column", "read_number"]

Row: TypeAlias = dict[str, Any]

FILE_NAME = "ledger.jsonl"
REAL = "real images"  # value of the column "model" in a row of real images
_MODEL = ("dataset", "data", "split", "tokenizer", "transformer", "config", "num_images", "seed")
_DECODING = ("num_steps", "decoding")
_NETWORK = ("network", "judge", "knows_classes", "real_images", "reference")
KEYS = {  # kind of measurement -> columns that determine its values
    "samples": (*_MODEL, *_DECODING, *_NETWORK),
    "editing": (*_MODEL, *_DECODING, *_NETWORK, "task", "model"),
    "likelihood": (*_MODEL, "draws"),
    "cas": (*_MODEL, *_DECODING, "classifier", "training_images", "training_steps", "classifier_seed", "training"),
    "timing": ("method", "num_tokens", "network", "device", "torch", "dtype", "kind"),
    "reconstruction": ("dataset", "data", "split", "tokenizer", "config", "num_images", *_NETWORK),
    "tokenizer": ("dataset", "data", "split", "tokenizer", "config", "num_images", "settings"),
    "pilot": ("recipe", "device", "steps"),
    "ablation": ("ablation", "plan", "variant", "seed"),
}
_REQUIRED = {  # kind of measurement -> columns that reports need
    "samples": ("num_images", "fid"),
    "editing": ("num_images", "fid", "task", "model", "network"),
    "likelihood": ("num_images",),
    "cas": ("top1", "top5", "classifier", "training_images", "training_steps"),
    "timing": (*KEYS["timing"], "num_steps", "seconds_per_image", "least", "runs"),
    "reconstruction": ("num_images", "rfid"),
    "tokenizer": ("num_images", "run", "numbers"),
    "pilot": ("recipe", "seconds_per_step"),
    "ablation": ("ablation", "plan", "place", "variant", "seed", "numbers", "protocol", "dataset"),
}
_COUNTS = ("parameters", "num_images", "real_images", "num_steps", "num_tokens", "seed", "draws", "training_images",
           "training_steps", "classifier_seed", "runs", "steps", "max_steps", "place")  # fmt: skip
_NUMBERS = ("fid", "sfid", "kid", "kid_deviation", "is", "is_deviation", "precision", "recall", "density", "coverage",
            "class_agreement", "diversity", "steps_taken", "seconds_per_image", "least", "top1", "top5", "rfid",
            "psnr_db", "ssim", "codebook_usage", "perplexity", "seconds_per_step", "planned_seconds",
            "training_seconds")  # fmt: skip
_ESTIMATES = ("masked_nll", "elbo_", "exact_")  # prefixes of columns that are numbers
_TYPES: dict[str, tuple[type, str]] = {  # other columns that are not text
    "decoding": (dict, "a mapping"), "training": (dict, "a mapping"), "knows_classes": (bool, "true or false"),
    "protocol": (dict, "a mapping"), "settings": (dict, "a mapping"),
}  # fmt: skip
_MEASURED = "[-1e100, 1e100]"  # range of measured numbers; sums and figures of larger ones overflow
_MAPS_OF_NUMBERS = ("numbers", "real")  # columns with values by the name of the metric
_MAX_LINE, _MAX_BYTES = 1_000_000, 100_000_000  # bytes; a ledger may come from a stranger
_log = logging.getLogger(__name__)


class Ledger:
    """The measurements of a file, which is read once, with those that this process adds.

    Args:
        file: Path of ``ledger.jsonl``; the first measurement creates it. An incomplete last line, of a process that was
            killed, is ignored, and removed before the next line is written.
        writes: True if this process writes the file; only one of several ranks does.
        reuse: True to find the lines that the file already holds; False to measure everything again.

    Raises:
        ValueError: if the file is not a ledger, or a line is not a measurement. The message names the line.
    """

    def __init__(self, file: Path, *, writes: bool = True, reuse: bool = True) -> None:
        self.file, self.writes = file, writes
        self._rows: list[Row] = list(self._read()) if file.exists() else []
        self._first = 0 if reuse else len(self._rows)

    def rows(self, measurement: str) -> list[Row]:
        """Returns all rows of a kind of measurement, in the order of the file."""
        return [row for row in self._rows if row["measurement"] == measurement]

    def find(self, measurement: str, key: Mapping[str, object], *, having: str | None = None) -> Row | None:
        """Returns the last row with a key, or None.

        A row that lacks a column of the key is never returned.

        Args:
            measurement: Kind of measurement, a key of ``KEYS``.
            key: Values of the columns in ``KEYS[measurement]``; other columns are ignored.
            having: Name of a column that must have a value; None for no such condition.
        """
        # The key takes the same round trip through JSON as the rows, so that e.g. tuples equal lists.
        wanted = _plain({name: key[name] for name in KEYS[measurement]})
        for row in reversed(self._rows[self._first :]):
            same = row["measurement"] == measurement and (having is None or row.get(having) is not None)
            if same and all(name in row and row[name] == wanted[name] for name in wanted):
                return row
        return None

    def add(self, measurement: str, row: Mapping[str, object]) -> Row:
        """Appends a measurement, which is on disk when the method returns.

        Args:
            measurement: Kind of measurement, a key of ``KEYS``.
            row: Values of the columns in ``KEYS[measurement]`` and of others.

        Returns:
            The row, as ``find`` returns it.

        Raises:
            ValueError: if a column of the key is missing, or a value has the wrong type.
        """
        added = _plain({"measurement": measurement, **row})
        check_keys(f"ledger {self.file}: row", added, known=added, required=KEYS[measurement])
        _check_row(f"ledger {self.file}: row", added)
        self._rows.append(added)
        if self.writes:
            self._append(json.dumps(added).encode() + b"\n")
        return added

    def _read(self) -> Iterator[Row]:
        state = self.file.stat()
        if not stat.S_ISREG(state.st_mode) or state.st_size > _MAX_BYTES:
            raise ValueError(f"ledger {self.file} must be a regular file of at most {size_text(_MAX_BYTES)}")
        with self.file.open("rb") as stream:
            for place, line in enumerate(iter(lambda: stream.readline(_MAX_LINE), b""), start=1):
                where = f"ledger {self.file}: line {place}"
                if not line.endswith(b"\n"):
                    # Either the line is longer than the limit, or a killed process left an incomplete last line.
                    if len(line) == _MAX_LINE:
                        raise ValueError(f"{where} must be shorter than {size_text(_MAX_LINE)}; move the file away")
                    _log.info("%s is incomplete; it will be measured again", where)
                    return
                try:
                    row = parse_json(line, where)
                    _check_row(where, row)
                except ValueError as error:
                    raise ValueError(f"{error}; remove the line, or move the file away") from error
                yield row

    def _append(self, line: bytes) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as stream:
            # The lock keeps lines of several commands apart; closing the file releases it. Some file systems have none.
            with suppress(OSError):
                lock_descriptor(stream.fileno())
            stream.truncate(_end_of_lines(stream))
            stream.write(line)
            # A measurement may have taken hours: it must survive a crash of the machine.
            stream.flush()
            os.fsync(stream.fileno())


def _end_of_lines(stream: IO[bytes]) -> int:
    """Returns the size of a file without an incomplete last line."""
    size = stream.seek(0, os.SEEK_END)
    start = stream.seek(max(0, size - _MAX_LINE))  # no line is longer
    return start + stream.read().rfind(b"\n") + 1


def _plain(values: Mapping[str, object]) -> Row:
    """Returns values as they are after a round trip through JSON: tuples become lists."""
    row: Row = json.loads(json.dumps(values))
    return row


def _check_row(where: str, row: Mapping[str, Any]) -> None:
    measurement = row.get("measurement")
    if not isinstance(measurement, str) or measurement not in KEYS:
        raise ValueError(f"{where}: measurement must be one of {', '.join(KEYS)}, got {shorten(measurement)}")
    for name in _REQUIRED[measurement]:
        if row.get(name) is None:
            raise ValueError(f"{where}: {name} must have a value")
    for name, value in row.items():
        if value is not None:
            _check_value(f"{where}: {name}", name, value)


def _check_value(where: str, name: str, value: object) -> None:
    # Reports print these values: a row of a stranger must not break them.
    if name in _COUNTS:
        check_integer(where, value, "[0, 9223372036854775807]")
    elif name in _NUMBERS or name.startswith(_ESTIMATES):
        check_number(where, value, _MEASURED)
    elif name in _MAPS_OF_NUMBERS:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {shorten(value)}")
        for metric, number in value.items():
            check_number(f"{where}: {shorten(metric)}", number, _MEASURED)
    else:
        kind, text = _TYPES.get(name, (str, "a string"))
        if not isinstance(value, kind):
            raise ValueError(f"{where} must be {text}, got {shorten(value)}")


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
