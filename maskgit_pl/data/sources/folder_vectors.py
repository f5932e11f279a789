"""The vectors of an image folder: the files ``NAME.npy`` beside its images. Used by ``image_folder``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maskgit_pl.data.samples import Sample, UnreadableSample
from maskgit_pl.data.sources.entries import Entries, EntryError
from maskgit_pl.data.vectors import MAX_VECTOR_BYTES, VectorKind, parse_vector
from maskgit_pl.text import printable

__all__ = ["FolderVectors"]


@dataclass(frozen=True)
class FolderVectors:
    """The size and type of the vectors of a folder, which the first valid one decides.

    Args:
        kind: Size and type.
        first: Name of the vector that decided.
    """

    kind: VectorKind
    first: str

    @classmethod
    def of(cls, entries: Entries, names: Sequence[str | None]) -> FolderVectors | None:
        """Returns the vectors of some images; None if none of them has a vector.

        Args:
            entries: Files of the source.
            names: Name of each image's vector; None for an image without one.

        Raises:
            ValueError: if there are vectors, and all of them are invalid. The message has the fault of the first.
        """
        errors: list[ValueError] = []
        present = [name for name in names if name is not None]
        for name, read in zip(present, entries.readers(present, limit=MAX_VECTOR_BYTES), strict=True):
            shown = printable(entries.path / name)
            try:
                return cls(parse_vector(_read(read, shown), name=shown)[0], shown)
            except ValueError as error:
                errors.append(error)
        if errors:
            raise ValueError(f"{errors[0]}; correct the .npy files, or leave all of them out with --no-vectors")
        return None

    def add_to(self, sample: Sample, vector: str, read: Callable[[], bytes] | None) -> Sample | UnreadableSample:
        """Adds a vector to its sample.

        Args:
            sample: The sample.
            vector: The vector's name in error messages.
            read: Returns the bytes of the vector; None if the sample has none.

        Returns:
            The sample with the vector, or an ``UnreadableSample`` if the vector is missing or invalid.
        """
        if read is None:
            wanted = vector.rpartition("/")[2]
            return UnreadableSample(f"image {sample.name} must have the vector {wanted} beside it, got none")
        try:
            data = _read(read, vector)
            kind, _ = parse_vector(data, name=vector)
        except ValueError as error:
            return UnreadableSample(str(error))
        if kind != self.kind:
            return UnreadableSample(f"vector {vector} must have {self.kind}, as {self.first}, got {kind}")
        return sample._replace(vector=data)

    def digest(self, entries: Entries, names: Sequence[str | None]) -> str:
        """Returns a hash of the content of all vectors, since another encoder gives files of the same lengths.

        Args:
            entries: Files of the source.
            names: Name of each image's vector; None for an image without one.
        """
        digest = hashlib.sha256()
        readers = entries.readers((name for name in names if name is not None), limit=MAX_VECTOR_BYTES)
        for name in names:
            try:
                data = b"" if name is None else _read(next(readers), name)
            except ValueError:  # its sample is reported as unreadable
                data = b""
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()


def _read(read: Callable[[], bytes], name: str) -> bytes:
    try:
        return read()
    except OSError as error:
        raise ValueError(f"vector {name} cannot be read: {error.strerror or error}") from error
    except EntryError as error:
        raise ValueError(f"vector {name} {error}") from error
