"""Samples of a split by number: one ``pread`` for an image's bytes, no tar is walked.

Safe with forked and spawned workers: no file position is shared, and files open in the process that reads.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.shards.manifest import Manifest

__all__ = ["ShardReader"]

_MAX_OPEN = 64


class ShardReader:
    """Random access to a split.

    Args:
        manifest: The split.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._index: npt.NDArray[np.void] | None = None
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, the latest used last

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def index(self) -> npt.NDArray[np.void]:
        """The manifest's rows, mapped at first use in each process."""
        if self._index is None:
            self._index = self.manifest.index()
        return self._index

    def labels(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Labels of samples, (B,) int64 in [0, num_classes)."""
        labels: npt.NDArray[np.int64] = self.index["label"][indices].astype(np.int64)
        return labels

    def read(self, index: int) -> bytes:
        """The bytes of a sample's image file.

        Raises:
            OSError: The shard cannot be read, or has become shorter than its manifest says.
        """
        shard, offset, size, _ = self.index[index].item()
        data = os.pread(self._file(shard), size, offset)
        if len(data) != size:
            raise OSError(
                f"image {self.name(index)}: {size} bytes expected, got {len(data)}; has the shard been changed?"
            )
        return data

    def name(self, index: int) -> str:
        """What to call a sample in an error: ``SHARD:sample N at byte M``."""
        shard, offset, _, _ = self.index[index].item()
        return f"{self.manifest.shards[shard].name}:sample {index} at byte {offset}"

    def close(self) -> None:
        """Close every file; they open again when they are needed."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, number: int) -> int:
        if number not in self._files:
            path = self.manifest.folder / self.manifest.shards[number].name
            self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > _MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "_index": None, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()
