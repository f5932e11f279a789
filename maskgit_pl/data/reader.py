"""Random access to the samples of a split: one ``pread`` per image, without walking a tar.

Used by the data modules, ``tokenize`` and ``stats``. A reader may be forked or pickled into workers: it shares no file
position, and each process opens its own files.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.manifest import Manifest
from maskgit_pl.data.mapped_array import has_all_bytes
from maskgit_pl.data.tar import BLOCK
from maskgit_pl.errors import DataChangedError
from maskgit_pl.files import open_regular

__all__ = ["ShardReader"]

_MAX_OPEN = 64  # shards open at a time, far below the usual limit of 1,024 files per process
_MAX_LISTED = 20  # samples named in an error


class ShardReader:
    """A reader with random access to the samples of a split.

    Args:
        manifest: The split.

    Attributes:
        vector_reader: Reader of the vectors; None if the samples have none.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.vector_reader = None if manifest.vectors is None else manifest.vector_reader()
        self._index: npt.NDArray[np.void] | None = None
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, most recently used last

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def index(self) -> npt.NDArray[np.void]:
        """The rows of the index, (n,) INDEX_DTYPE, mapped into memory at first use in each process.

        Raises:
            ValueError: if a label is not in [0, num_classes). The message names the samples.
            DataChangedError: if the file was truncated after it was mapped.
        """
        if self._index is None:
            rows = self.manifest.index()
            # Checked here: on a GPU, a wrong label would be an index error without a name.
            self._check_labels(rows)
            self._index = rows
        if not has_all_bytes(self._index):
            raise self._data_changed_error(f"{self.manifest.split}.npy", "the file was truncated")
        return self._index

    def labels(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the labels of samples.

        Args:
            indices: (B,) int64 in [0, len(self)).

        Returns:
            (B,) int64 in [0, num_classes).
        """
        labels: npt.NDArray[np.int64] = self.index["label"][indices].astype(np.int64)
        return labels

    def read(self, index: int) -> bytes:
        """Reads the bytes of a sample's image file.

        Args:
            index: Number of the sample in its split, in [0, len(self)).

        Raises:
            DataChangedError: if the shard cannot be read, or has changed since its manifest was made.
        """
        shard, offset, size, _ = self.index[index].item()
        data = self._pread(shard, size, offset)
        if len(data) != size:
            fault = f"{size} bytes expected at byte {offset}, got {len(data)}"
            raise self._data_changed_error(self.manifest.shards[shard].name, fault)
        return data

    def shard(self, index: int) -> str:
        """Returns the file name of the tar that contains a sample."""
        return self.manifest.shards[int(self.index["shard"][index])].name

    def name(self, index: int) -> str:
        """Returns the name of a sample for error messages: ``SHARD:MEMBER``, with the member's name from the tar."""
        return self._name(*self.index[index].item()[:2])

    def _name(self, shard: int, offset: int) -> str:
        # The member's header is the block before its payload; fields of ustar: name, magic, prefix.
        header = self._pread(shard, BLOCK, offset - BLOCK) if offset >= BLOCK else b""
        member, magic, prefix = header[:100], header[257:262], header[345:500]
        if magic != b"ustar":
            return f"{self.manifest.shards[shard].name}:byte {offset}"
        parts = [part.split(b"\0")[0].decode(errors="replace") for part in (prefix, member)]
        path = "/".join(part for part in parts if part)
        return f"{self.manifest.shards[shard].name}:" + "".join(c if c.isprintable() else "?" for c in path)

    def _data_changed_error(self, name: str, fault: str) -> DataChangedError:
        folder = self.manifest.folder
        return DataChangedError(
            f"data {folder}: {name} changed while it was in use: {fault}; restore it, or regenerate the manifest "
            f"with `maskgit data index {folder}`; `maskgit data verify {folder}` lists all changed files"
        )

    def _check_labels(self, rows: npt.NDArray[np.void]) -> None:
        labels, classes = rows["label"], len(self.manifest.classes)
        if not len(labels) or 0 <= labels.min() <= labels.max() < classes:
            return
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        names = [f"{self._name(*row.item()[:2])}: {row['label']}" for row in rows[wrong[:_MAX_LISTED]]]
        listed = "\n  ".join(
            [*names, f"... and {len(wrong) - _MAX_LISTED} more"] if len(wrong) > _MAX_LISTED else names
        )
        raise ValueError(
            f"data {self.manifest.folder}, split {self.manifest.split}: labels must be in [0, {classes}), "
            f"got others in {len(wrong)} samples:\n  {listed}\n"
            f"correct them and regenerate the index with `maskgit data index {self.manifest.folder}`"
        )

    def close(self) -> None:
        """Closes every file; the next read opens its file again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file(number), size, offset)
        except OSError as error:
            raise self._data_changed_error(self.manifest.shards[number].name, str(error.strerror)) from error

    def _file(self, number: int) -> int:
        if number not in self._files:
            shard = self.manifest.shards[number]
            descriptor = open_regular(self.manifest.folder / shard.name)
            if (length := os.fstat(descriptor).st_size) != shard.bytes:
                os.close(descriptor)
                raise self._data_changed_error(shard.name, f"{shard.bytes} bytes expected, got {length}")
            self._files[number] = descriptor
            if len(self._files) > _MAX_OPEN:
                # The first is the least recently used.
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors and maps are not valid in another process.
        return {**self.__dict__, "_index": None, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()
