"""The token store: the tokens of a data folder, in memory-mapped arrays that are read batch by batch.

A store is a folder::

    train-tokens.npy    (n V, N) uint16, or uint32 if the codebook has more than 65,536 codes; row i V + v is view v
                        of sample i
    train-labels.npy    (n,) int64
    train-vectors.npy   (n, C) float16 or float32, if the samples have vectors; row i is that of sample i
    val-...             the same, with one view
    store.json          grid, codebook size, views, fingerprints of the tokenizer and of the data, and the SHA-256 of
                        each array's file; written last

A store is rejected if another tokenizer made it, if it was made from other data, or if its arrays have changed. Stores
of format 1 have no SHA-256; only their shapes and ranges are checked. This file reads the arrays, ``store_description``
reads ``store.json``, and ``token_writer`` writes both. Used by the data modules, ``maskgit tokenize`` and ``verify``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.manifest import Split
from maskgit_pl.data.mapped_array import has_all_bytes, map_array
from maskgit_pl.data.store_description import (
    REMAKE_HINT,
    StoreDescription,
    array_paths,
    check_origin,
    read_description,
)
from maskgit_pl.data.vectors import VectorReader, vectors_path
from maskgit_pl.errors import DataChangedError
from maskgit_pl.files import sha256_of

__all__ = ["BadFile", "TokenReader", "Tokens", "is_complete", "open_store", "outside_range"]

_BLOCK_VALUES = 2**22  # values of an array that are checked at a time
Tokens = npt.NDArray[np.unsignedinteger[Any]]  # of StoreDescription.dtype


class TokenReader:
    """A reader of one split of a store.

    Args:
        folder: The store.
        split: ``"train"`` or ``"val"``.
        description: The store's description.

    Attributes:
        views: Rows of each sample, V.
        vector_reader: Reader of the vectors; None if the samples have none.
    """

    def __init__(self, folder: Path, split: Split, description: StoreDescription) -> None:
        self.folder = folder
        self.split: Split = split
        self.description = description
        self.views = description.views(split)
        self.vector_reader: VectorReader | None = None
        if description.vectors is not None:
            path, count = vectors_path(folder, split), description.samples[split]
            self.vector_reader = VectorReader(path, count, description.vectors, hint=REMAKE_HINT)
        self._arrays: tuple[Tokens, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.description.samples[self.split]

    def read(
        self, indices: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | int = 0
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Reads tokens and labels of samples.

        Args:
            indices: (B,) int64 in [0, len(self)).
            views: View of each sample, in [0, self.views): one number or (B,) int64. View 0 is the image itself.

        Returns:
            Tokens (B, N) int64 in [0, codebook_size), labels (B,) int64 in [0, num_classes).

        Raises:
            DataChangedError: if an array was truncated or changed after it was opened.
        """
        # Checked for each batch, since reading a truncated map would kill the process.
        tokens, labels = self.arrays()
        if not (has_all_bytes(tokens) and has_all_bytes(labels)):
            raise self._data_changed_error("a file was truncated")
        # take() gathers whole rows 1.3 times as fast as indexing; (B, N).
        codes, classes = tokens.take(indices * self.views + views, axis=0), labels[indices]
        if codes.max(initial=0) >= self.description.codebook_size:
            raise self._data_changed_error(
                f"tokens must be in [0, {self.description.codebook_size}), got {codes.max()}"
            )
        if classes.view(np.uint64).max(initial=0) >= len(self.description.classes):  # in one pass, since -1 is 2^64 - 1
            outside = int(classes[outside_range(classes, len(self.description.classes))][0])
            raise self._data_changed_error(f"labels must be in [0, {len(self.description.classes)}), got {outside}")
        return codes.astype(np.int64), classes

    def arrays(self) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Returns tokens (n V, N) and labels (n,), mapped into memory at first use in each process.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file cannot be read, or has another shape or type than the description states.
        """
        if self._arrays is None:
            tokens, labels = (self._map(path) for path in array_paths(self.folder, self.split))
            found = (tokens.shape, tokens.dtype, labels.shape, labels.dtype)
            rows = (len(self) * self.views, self.description.num_tokens)
            expected = (rows, self.description.dtype, (len(self),), np.dtype(np.int64))
            if found != expected:
                raise ValueError(
                    f"token store {self.folder}, {self.split}: {expected} expected, got {found}; {REMAKE_HINT}"
                )
            self._arrays = tokens, labels
        return self._arrays

    def bad_arrays(self) -> Iterator[BadFile]:
        """Yields the arrays with values out of range or another hash; reads all arrays completely.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file cannot be read, or has another shape or type than the description states.
        """
        limits = (self.description.codebook_size, len(self.description.classes))
        for path, array, limit in zip(array_paths(self.folder, self.split), self.arrays(), limits, strict=True):
            # A value out of range says more than a wrong hash.
            outside = _first_outside(array, limit)
            if outside is not None:
                row, value = outside
                yield BadFile(path.name, f"values in [0, {limit})", f"{value} in row {row}", "out of range")
                continue
            yield from self._wrong_hash(path)
        if self.vector_reader is not None:
            self.vector_reader.array()
            yield from self._wrong_hash(self.vector_reader.path)

    def _wrong_hash(self, path: Path) -> Iterator[BadFile]:
        expected = self.description.sha256[path.stem]
        try:
            actual = sha256_of(path)
        except OSError as error:
            raise ValueError(f"token store {path}: cannot be read ({error.strerror}); {REMAKE_HINT}") from error
        if expected != actual:
            yield BadFile(path.name, f"sha256 {expected[:12]}", f"sha256 {actual:.12}", "changed since it was made")

    def _map(self, path: Path) -> npt.NDArray[Any]:
        try:
            return map_array(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"token store {path} does not exist; {REMAKE_HINT}") from error
        except ValueError as error:
            raise ValueError(f"token store {error}; {REMAKE_HINT}") from error

    def _data_changed_error(self, what: str) -> DataChangedError:
        return DataChangedError(
            f"token store {self.folder}, {self.split}: changed while it was in use: {what}; `maskgit data verify "
            f"{self.folder}` names the file; {REMAKE_HINT}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # each process maps the arrays itself


class BadFile(NamedTuple):
    """A file of a token store or of a data folder that differs from its description."""

    name: str
    expected: str
    actual: str
    reason: str


def open_store(folder: str | Path, **origin: object) -> dict[Split, TokenReader]:
    """Opens every split of a finished store, after a check of its origin and of all bytes.

    The whole store is read once, in 0.5 to 1 s per GB, since a changed token or label that is still in range would not
    be noticed later. Readers check the ranges of each batch again.

    Args:
        folder: The store.
        origin: Expected origin of the store; see ``check_origin``.

    Raises:
        FileNotFoundError: if there is no finished store, or an array is missing.
        ValueError: if the store has another origin, or an array is damaged: another shape or type, a value out of
            range, or another hash.
    """
    description = read_description(folder)
    check_origin(description, folder, **origin)
    readers = {split: TokenReader(Path(folder), split, description) for split in description.samples}
    for reader in readers.values():
        for bad in reader.bad_arrays():
            raise ValueError(
                f"token store {Path(folder) / bad.name}: {bad.reason}: {bad.expected} expected, got {bad.actual}; "
                f"{REMAKE_HINT}"
            )
    return readers


def is_complete(folder: str | Path, description: StoreDescription) -> bool:
    """Returns whether a folder is a finished store of exactly this description, with undamaged arrays."""
    try:
        open_store(folder, data=None)
        return read_description(folder) == description
    except (FileNotFoundError, ValueError):
        return False


def _first_outside(array: npt.NDArray[Any], limit: int) -> tuple[int, int] | None:
    """Returns the first row with a value outside [0, limit), and that value; None if there is none.

    Args:
        array: (n,) or (n, N) integers.
        limit: Upper limit of the values, exclusive.
    """
    # In blocks: an array may be larger than the memory.
    step = max(1, _BLOCK_VALUES // max(1, array[:1].size))
    for start in range(0, len(array), step):
        block = array[start : start + step]
        if block.max() >= limit or block.min() < 0:
            outside = outside_range(block, limit).reshape(len(block), -1)
            row = int(outside.any(axis=1).argmax())
            return start + row, int(block.reshape(len(block), -1)[row][outside[row]][0])
    return None


def outside_range(values: npt.NDArray[Any], limit: int) -> npt.NDArray[np.bool_]:
    """Returns a mask of the integers outside [0, limit).

    Args:
        values: Integers of any shape.
        limit: Upper limit, exclusive.

    Returns:
        bool of the same shape, True outside the range.
    """
    return (values < 0) | (values >= limit)
