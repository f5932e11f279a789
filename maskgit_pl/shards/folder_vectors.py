"""The vectors of an image folder: the files ``NAME.npy`` beside its images. Used by ``sources``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskgit_pl.shards.samples import Sample, UnreadableSample
from maskgit_pl.shards.vectors import VECTOR_EXTENSION, VectorKind, parse_vector, read_vector_file
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
    def of(cls, paths: Sequence[Path | None]) -> FolderVectors | None:
        """Returns the vectors of some images; None if none of them has a vector.

        Args:
            paths: Path of each image's vector; None for an image without one.

        Raises:
            ValueError: if there are vectors, and all of them are invalid. The message has the fault of the first.
        """
        errors: list[ValueError] = []
        for path in filter(None, paths):
            name = printable(path)
            try:
                return cls(parse_vector(read_vector_file(path, name=name), name=name)[0], name)
            except ValueError as error:
                errors.append(error)
        if errors:
            raise ValueError(f"{errors[0]}; correct the .npy files, or leave all of them out with --no-vectors")
        return None

    def add_to(self, sample: Sample, image: Path, vector: Path | None) -> Sample | UnreadableSample:
        """Adds a vector to its sample.

        Args:
            sample: The sample.
            image: Path of its image.
            vector: Path of its vector; None if it has none.

        Returns:
            The sample with the vector, or an ``UnreadableSample`` if the vector is missing or invalid.
        """
        if vector is None:
            wanted = printable(image.with_suffix(f".{VECTOR_EXTENSION}").name)
            return UnreadableSample(f"image {sample.name} must have the vector {wanted} beside it, got none")
        name = printable(vector)
        try:
            data = read_vector_file(vector, name=name)
            kind, _ = parse_vector(data, name=name)
        except ValueError as error:
            return UnreadableSample(str(error))
        if kind != self.kind:
            return UnreadableSample(f"vector {name} must have {self.kind}, as {self.first}, got {kind}")
        return sample._replace(vector=data)

    def digest(self, paths: Sequence[Path | None]) -> str:
        """Returns a hash of the content of all vectors, since another encoder gives files of the same lengths."""
        digest = hashlib.sha256()
        for path in paths:
            try:
                data = b"" if path is None else read_vector_file(path, name=str(path))
            except ValueError:  # its sample is reported as unreadable
                data = b""
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()
