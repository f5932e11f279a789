"""The program that reads a parquet file for ``parquet``, in a process of its own and within a bound of memory.

Damaged bytes may abort pyarrow, and a page of a few bytes may expand to gigabytes. It imports nothing of the
package, so that it starts at once, and writes records to stdout: a kind and a length, then so many bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from struct import Struct
from typing import Any

HEADER = Struct("<cI")
BYTES, NOTHING, ERROR, TOO_LARGE, END = b"b", b"n", b"e", b"m", b"."
"""The kinds of records. The last record of a file that was read whole is ``END``."""

_ROWS_AT_ONCE, _LABELS_AT_ONCE = 16, 2**12  # images and labels in memory, for row groups of any size
_MAX_LABEL_BYTES = 2**24  # of so many labels together
_MAX_SENT = 2**28 + 1  # of an image, one byte more than an image may have


def _main() -> None:
    """Reads FILE within BYTES of memory: the labels of COLUMN, or the images of COLUMN from ROW on."""
    path, limit, *arguments = sys.argv[1:]
    try:
        import resource

        import pyarrow
        from pyarrow.parquet import ParquetFile

        pyarrow.set_cpu_count(1)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        bound = int(limit) if hard == resource.RLIM_INFINITY else min(int(limit), hard)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
        # Without a size of the buffer, the column of a row group is read as a whole.
        file = ParquetFile(path, buffer_size=2**20)
        for record in _labels(file, *arguments) if len(arguments) == 1 else _images(file, *arguments):
            _send(NOTHING if record is None else BYTES, record or b"")
        _send(END)
    except ImportError:
        _send(ERROR, b'pyarrow is missing: pip install "maskgit_pl[parquet]"')
    except MemoryError:  # also that of pyarrow
        _send(TOO_LARGE)
    except Exception as error:
        _send(ERROR, (str(error).splitlines() or [type(error).__name__])[0].encode(errors="replace"))
    sys.stdout.flush()
    os._exit(0)  # without what pyarrow does at the end


def _send(kind: bytes, data: bytes | memoryview = b"") -> None:
    sys.stdout.buffer.write(HEADER.pack(kind, len(data)))
    sys.stdout.buffer.write(data)


def _labels(file: Any, field: str) -> Iterator[bytes]:
    """Yields the columns of images as JSON, the metadata of ``datasets``, and then lists of labels as JSON."""
    from pyarrow import types

    schema = file.schema_arrow
    if field not in schema.names:
        raise ValueError(f"it must have a column {field!r}, got {_listed(schema.names)}; set it with --label-field")
    images = [column.name for column in schema if _holds_bytes(column.type)]
    if not images:
        raise ValueError(f"it must have a column of images, got {_listed(schema.names)}")
    kind = schema.field(field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(value) or types.is_string(value) or types.is_large_string(value)):
        raise ValueError(f"column {field!r} must hold class numbers or names, got {kind}")
    yield json.dumps(images).encode()
    yield (schema.metadata or {}).get(b"huggingface", b"")
    row = 0
    for batch in file.iter_batches(_LABELS_AT_ONCE, columns=[field], use_threads=False):
        column = batch.column(0)
        if column.null_count:
            raise ValueError(f"row {row + column.is_null().index(True).as_py()}: {field} must be a class, got nothing")
        row += len(column)
        record = json.dumps(column.to_pylist()).encode()
        if len(record) > _MAX_LABEL_BYTES:
            raise ValueError(f"column {field!r} must hold class names of at most 16 MiB in {_LABELS_AT_ONCE} rows")
        yield record


def _images(file: Any, field: str, first: str) -> Iterator[memoryview | None]:
    """Yields the bytes of the image of each row from the given one on; None if it has none."""
    from pyarrow import types

    group, skipped = 0, int(first)
    while skipped >= (count := file.metadata.row_group(group).num_rows):
        group, skipped = group + 1, skipped - count
    is_struct = types.is_struct(file.schema_arrow.field(field).type)
    column = f"{field}.bytes" if is_struct else field  # other fields may have any length
    groups = range(group, file.num_row_groups)
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[column], use_threads=False):
        for image in batch.column(0)[skipped:]:
            value = image["bytes"] if is_struct and image.is_valid else image
            yield memoryview(value.as_buffer())[:_MAX_SENT] if value.is_valid else None
        skipped = max(0, skipped - len(batch))


def _holds_bytes(kind: Any) -> bool:
    """Returns whether a column may hold image files: bytes, or a struct with a field of bytes."""
    from pyarrow import types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20] + ["..."] * (len(names) > 20))


if __name__ == "__main__":
    _main()
