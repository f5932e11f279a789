"""The file of an unfinished index run, with one line per scanned shard: a repeated run scans only the rest.

Used by ``index``. The first line holds the options; the scans of other options are not used.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from maskgit_pl.data.labels import Labels
from maskgit_pl.data.manifest import INDEX_DTYPE, ImageRange
from maskgit_pl.data.scan import Fault, ShardScan
from maskgit_pl.data.vectors import VectorKind
from maskgit_pl.files import parse_json

__all__ = ["PROGRESS", "read_progress", "start_progress", "write_scan"]

PROGRESS = ".index.partial"


def start_progress(file: IO[bytes], labels: Labels, *, vectors: bool) -> None:
    """Writes the line of the options to a new file."""
    _write_line(file, _options_to_json(labels, vectors=vectors))


def write_scan(file: IO[bytes], name: str, scan: ShardScan) -> None:
    """Writes the line of a scanned shard."""
    arrays = {field: base64.b64encode(getattr(scan, field).tobytes()).decode() for field in ("rows", "vectors")}
    _write_line(file, {"name": name, **asdict(scan), **arrays})


def read_progress(path: Path, folder: Path, labels: Labels, *, vectors: bool) -> dict[str, ShardScan]:
    """Returns the scans of an interrupted run, if it had the same options, of shards that have not changed since."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        lines = _whole_lines(file)
        # Other labels or class names would give other rows.
        if next(lines, None) != _options_to_json(labels, vectors=vectors):
            return {}
        known = ((line, _reuse_scan(folder, line)) for line in lines)
        return {line["name"]: scan for line, scan in known if scan is not None}


def _options_to_json(labels: Labels, *, vectors: bool) -> dict[str, Any]:
    classes = None if labels.classes is None else list(labels.classes)
    return {"format": 2, "labels": labels.source, "classes": classes, "vectors": vectors}


def _write_line(file: IO[bytes], content: Mapping[str, Any]) -> None:
    file.write((json.dumps(content) + "\n").encode())
    file.flush()


def _whole_lines(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in file:
        try:
            yield parse_json(line, "line")
        except ValueError:
            continue


def _reuse_scan(folder: Path, line: dict[str, Any]) -> ShardScan | None:
    try:
        return _scan_from_json(folder, line)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the shard is gone or the line is damaged
        return None


def _scan_from_json(folder: Path, line: dict[str, Any]) -> ShardScan | None:
    status = os.stat(folder / line["name"])
    if (status.st_size, status.st_mtime_ns) != (line["bytes"], line["mtime_ns"]):
        return None
    images = line["images"]
    return ShardScan(
        bytes=line["bytes"],
        mtime_ns=line["mtime_ns"],
        sha256=line["sha256"],
        rows=np.frombuffer(base64.b64decode(line["rows"]), INDEX_DTYPE),
        images=None
        if images is None
        else ImageRange(*(tuple(images[name]) for name in ("height", "width", "channels"))),
        num_keys=line["num_keys"],
        faults={fault: Fault(**found) for fault, found in line["faults"].items()},
        ignored=line["ignored"],
        vectors=np.frombuffer(base64.b64decode(line["vectors"]), np.int64),
        vector_kind=None if line["vector_kind"] is None else VectorKind(*line["vector_kind"]),
        without_vector=line["without_vector"],
    )
