"""Reads the scalars and pictures of TensorBoard event files. A file may still be written to, damaged, or hostile.

A record of an event file is its length (8 bytes, little endian), 4 bytes of checksum, the content, and 4 bytes of
checksum. The content is parsed as a protocol buffer, which executes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from maskgit_pl.files import size_text
from maskgit_pl.text import printable

__all__ = ["Logs", "read_logs"]

_MAX_FILES = 1000
_MAX_BYTES = 2**30  # of a file; training writes about 100 bytes a value
_MAX_RECORD = 2**25  # of a record; a picture of samples has less than 1 MB
_MAX_TAGS = 500
_MAX_POINTS = 200_000  # of a scalar
_MAX_PICTURES = 400  # of a name


@dataclass
class Logs:
    """The logged values of a stage.

    Args:
        scalars: Values by name and step.
        pictures: Encoded images by name and step.
        notes: Sentences about what could not be read.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def last(self, prefix: str) -> dict[str, float]:
        """Returns the last value of each scalar ``prefix/NAME`` by NAME."""
        found = {name: values for name, values in self.scalars.items() if name.startswith(f"{prefix}/") and values}
        return {name.partition("/")[2]: values[max(values)] for name, values in found.items()}

    @property
    def last_step(self) -> int:
        """The last step with a value; 0 without values."""
        return max((max(values) for values in self.scalars.values() if values), default=0)


def read_logs(folder: Path) -> Logs:
    """Reads all event files of a stage folder, the oldest first; later values of a step replace earlier ones.

    Args:
        folder: Folder of the stage; it need not exist.
    """
    logs = Logs()
    files = sorted(folder.glob("events.out.tfevents.*"))
    if len(files) > _MAX_FILES:
        logs.notes.append(f"only the last {_MAX_FILES} of {len(files)} event files are shown")
    for file in files[-_MAX_FILES:]:
        try:
            for record in _records(file):
                _add_record(logs, record)
        except (OSError, ValueError) as error:
            logs.notes.append(f"{printable(file.name)} is read only in part: {printable(error)}")
    return logs


def _records(file: Path) -> Iterator[bytes]:
    """Yields the complete records of an event file.

    Raises:
        ValueError: if the file or a record is too large. The end of a file that is still written to is no error.
    """
    if not file.is_file():
        raise ValueError("it must be a regular file")
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"it must have at most {size_text(_MAX_BYTES)}, got {size_text(size)}")
    with file.open("rb") as stream:
        while len(head := stream.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            if length > _MAX_RECORD:
                raise ValueError(f"a record must have at most {size_text(_MAX_RECORD)}, got {size_text(length)}")
            record = stream.read(length)
            if len(record) < length or len(stream.read(4)) < 4:
                return
            yield record


def _add_record(logs: Logs, record: bytes) -> None:
    """Adds the values of a record.

    Raises:
        ValueError: if the record is not an event.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no stubs
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]  # it has no stubs

    event = Event()
    try:
        event.ParseFromString(record)
    except DecodeError as error:
        raise ValueError("a record is damaged") from error
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            points = _series(logs.scalars, value.tag)
            if points is not None and len(points) < _MAX_POINTS:
                points[event.step] = value.simple_value
        elif kind == "image":
            pictures = _series(logs.pictures, value.tag)
            if pictures is not None and len(pictures) < _MAX_PICTURES:
                pictures[event.step] = value.image.encoded_image_string


def _series(series: dict[str, dict[int, float]] | dict[str, dict[int, bytes]], name: str) -> dict[int, object] | None:
    """Returns the values of a name, or None if there are too many names."""
    if name not in series and len(series) >= _MAX_TAGS:
        return None
    return series.setdefault(name, {})  # type: ignore[return-value]  # both kinds of values are set alike
