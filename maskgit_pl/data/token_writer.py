"""Writer of token stores: several processes write parts without locks, and the last one joins the parts.

1. Each part is one file in a hidden folder inside the store. The folder is named by a hash of the description, so parts
   of another description or another part size are never used.
2. A part gets its name when it is complete and on disk. Processes that divide the parts among themselves need no
   locks, and after a kill only unfinished parts are made again.
3. When all parts are on disk, they are joined into the arrays. ``store.json`` is written last and completes the store.

Used by ``data.tokenizing``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_integer
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.store_description import (
    DESCRIPTION_FILE,
    FORMAT,
    StoreDescription,
    array_paths,
    plain_description,
    read_description,
)
from maskgit_pl.data.token_store import Tokens, is_complete, outside_range
from maskgit_pl.data.vectors import vectors_path, write_vectors
from maskgit_pl.files import sha256_of, sync, write_atomically

__all__ = ["Part", "StoreParts"]


class Part(NamedTuple):
    """A part of a store: one crop of the samples [start, stop) of a split. A killed process loses at most one part."""

    split: Split
    crop: int
    start: int
    stop: int


class _Rows(NamedTuple):
    tokens: Tokens
    labels: npt.NDArray[np.int64]
    vectors: npt.NDArray[Any] | None


class StoreParts:
    """An unfinished store and its parts.

    The finished store does not depend on which process wrote which part, or on interruptions.

    Args:
        folder: The store; it is made if it is missing. A finished store of another description becomes invalid: its
            ``store.json`` is removed.
        description: Description of the store; parts of another description are removed.
        part_size: Number of samples in a part, at least 1; parts of another size are removed.

    Raises:
        ValueError: if ``part_size`` is not an integer of at least 1.
    """

    def __init__(self, folder: str | Path, description: StoreDescription, *, part_size: int) -> None:
        check_integer("part_size", part_size, "[1, inf)")
        self.folder = Path(folder)
        self.description = description
        self.part_size = part_size
        # The name of the folder identifies what its parts belong to.
        content = [_to_json(description), part_size]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._parts = self.folder / f".parts-{key[:16]}"
        self._parts.mkdir(parents=True, exist_ok=True)
        for other in self.folder.glob(".parts-*"):
            if other != self._parts:
                shutil.rmtree(other, ignore_errors=True)
        if not self._is_described():  # not in finish(): another process may have just written it
            (self.folder / DESCRIPTION_FILE).unlink(missing_ok=True)

    def parts(self) -> list[Part]:
        """Returns all parts of all splits."""
        return [
            Part(split, crop, start, min(start + self.part_size, count))
            for split, count in self.description.samples.items()
            for crop in range(self.description.crops_of(split))
            for start in range(0, count, self.part_size)
        ]

    def is_done(self, part: Part) -> bool:
        """Returns whether a part is on disk."""
        return self._path(part).is_file()

    def write(
        self,
        part: Part,
        tokens: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        vectors: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Writes a part.

        Args:
            part: One of ``parts()``.
            tokens: (stop - start, mirrors, N) integers in [0, codebook_size).
            labels: (stop - start,) int64 in [0, num_classes).
            vectors: (stop - start, C) float32, if the description has vectors.

        Raises:
            ValueError: if a shape is wrong, or a token or a label is out of range.
        """
        shape = self._shape(part)
        if tokens.shape != shape or labels.shape != shape[:1]:
            raise ValueError(
                f"tokens of {part} must be {shape} and labels {shape[:1]}, got {tokens.shape} and {labels.shape}"
            )
        self._check_ranges(tokens, labels)
        self._check_vectors(part, vectors)
        with self._replace_file(self._path(part)) as file:
            np.save(file, tokens.astype(self.description.dtype), allow_pickle=False)
            np.save(file, labels.astype(np.int64), allow_pickle=False)
            if vectors is not None:  # float16 vectors come back to the same bits
                np.save(file, vectors.astype(self.description.vector_dtype), allow_pickle=False)

    def finish(self) -> bool:
        """Joins the parts into the store, if all are on disk.

        1. If a part is missing, return whether another process has finished the store.
        2. Join the parts of each split into its arrays.
        3. Write ``store.json`` with the hashes of the arrays.
        4. Remove the parts, if the store is complete.

        Two processes that join at the same time write the same bytes. The slower one may find the parts already
        removed; then the store must be complete.

        Returns:
            True if the store is finished.

        Raises:
            ValueError: if a part is damaged; it is removed, so that the next run makes it again.
        """
        try:
            if not all(self.is_done(part) for part in self.parts()):  # 1.
                return is_complete(self.folder, self.description)
            for split in self.description.samples:  # 2.
                self._join(split)
            hashes = {path.stem: sha256_of(path) for path in self.description.files(self.folder)}
            described = _to_json(self.description) | {"sha256": hashes}
            with self._replace_file(self.folder / DESCRIPTION_FILE) as file:  # 3.
                file.write((json.dumps(described, indent=1) + "\n").encode())
        except FileNotFoundError:
            if not is_complete(self.folder, self.description):
                raise
        finally:
            if is_complete(self.folder, self.description):  # 4.
                shutil.rmtree(self._parts, ignore_errors=True)
        return True

    def _is_described(self) -> bool:
        try:
            return read_description(self.folder) == self.description
        except (FileNotFoundError, ValueError):
            return False

    def _join(self, split: Split) -> None:
        """Writes the arrays of a split, with the samples of one part in memory at a time."""
        count, views = self.description.samples[split], self.description.views(split)
        starts = [part.start for part in self.parts() if part.split == split and part.crop == 0]
        tokens_path, labels_path = array_paths(self.folder, split)
        with self._replace_file(tokens_path) as file:
            _write_header(file, (count * views, self.description.num_tokens), self.description.dtype)
            # (samples, crops, mirrors, N) in row-major order: view v of a sample is crop v // mirrors
            for start in starts:
                file.write(self._rows(split, start)[0].tobytes())
        with self._replace_file(labels_path) as file:
            _write_header(file, (count,), np.dtype(np.int64))
            for start in starts:
                file.write(self._rows(split, start)[1].tobytes())
        if self.description.vectors is not None:
            blocks = (vectors for start in starts if (vectors := self._rows(split, start)[2]) is not None)
            with self._replace_file(vectors_path(self.folder, split)) as file:
                write_vectors(file, self.description.vectors, count, blocks)

    def _rows(self, split: Split, start: int) -> _Rows:
        """Returns tokens (samples, crops, mirrors, N), labels and vectors of a part's samples, for all crops."""
        stop = min(start + self.part_size, self.description.samples[split])
        parts = [Part(split, crop, start, stop) for crop in range(self.description.crops_of(split))]
        read = [self._read(part) for part in parts]
        return _Rows(np.stack([rows.tokens for rows in read], axis=1), *read[0][1:])

    def _read(self, part: Part) -> _Rows:
        path = self._path(part)
        vectors = None
        try:
            with open(path, "rb") as file:
                tokens, labels = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
                if self.description.vectors is not None:
                    vectors = np.load(file, allow_pickle=False)
            if tokens.shape != self._shape(part) or tokens.dtype != self.description.dtype:
                raise ValueError(f"{self._shape(part)} expected, got {tokens.shape} of {tokens.dtype}")
            if labels.shape != tokens.shape[:1] or labels.dtype != np.int64:
                raise ValueError(f"{tokens.shape[:1]} labels expected, got {labels.shape} of {labels.dtype}")
            self._check_ranges(tokens, labels)
            self._check_vectors(part, vectors)
        # A damaged part is removed, so that the same command makes it again.
        except (EOFError, ValueError) as error:
            path.unlink(missing_ok=True)
            raise ValueError(
                f"token store {self.folder}: its part {path.name} is damaged ({error}) and was removed; "
                "run the same command again to make it"
            ) from error
        return _Rows(tokens, labels, vectors)

    def _check_vectors(self, part: Part, vectors: npt.NDArray[Any] | None) -> None:
        dim = self.description.vector_dim
        expected = (part.stop - part.start, dim) if dim else None
        found = None if vectors is None else vectors.shape
        if found != expected:
            raise ValueError(f"vectors of {part} must be {expected}, got {found}")

    def _check_ranges(self, tokens: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        ranges = (("tokens", tokens, self.description.codebook_size), ("labels", labels, len(self.description.classes)))
        for name, values, limit in ranges:
            if outside_range(values, limit).any():
                raise ValueError(f"{name} must be in [0, {limit}), got {values.min()} to {values.max()}")

    def _shape(self, part: Part) -> tuple[int, int, int]:
        return part.stop - part.start, self.description.mirrors_of(part.split), self.description.num_tokens

    def _path(self, part: Part) -> Path:
        return self._parts / f"{part.split}-{part.crop}-{part.start:010d}.npy"

    @contextmanager
    def _replace_file(self, path: Path) -> Iterator[IO[bytes]]:
        """Opens a file that replaces ``path`` when it is complete and on disk.

        Unfinished files lie in the folder of the parts, so they are removed with it.
        """
        with write_atomically(path, partial_in=self._parts) as file:
            yield file
        sync(path.parent)  # the rename is on disk before any step that relies on it


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)


def _to_json(description: StoreDescription) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **plain_description(description)}))
    return content
