"""Files in the layout of ADM's evaluator: images, labels and statistics of others' models, read as numbers alone.

``arr_0`` (n, H, W, 3) uint8 are images, ``arr_1`` (n,) integers their labels, ``mu``, ``sigma``, ``mu_s``, ``sigma_s``
statistics of Inception's pooled and spatial features.

Source: openai/guided-diffusion, evaluations/README.md and evaluator.py.
"""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.files import size_text
from maskgit_pl.text import printable

__all__ = ["ArrayFile", "SampleFile", "open_samples"]

# What reading a damaged file may raise.
_BROKEN = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    RuntimeError,  # encrypted; a RecursionError is one too
    MemoryError,  # of Python's parser, which reads headers
    tokenize.TokenError,  # of numpy's, which reads them if that fails
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name
_MAX_HEADER = 2**16  # bytes of an array's header; numpy parses at most 10,000 of them
_MAX_MEMBERS = 100  # arrays of a file
_MAX_RATIO = 100  # a compressed array expands to so many times the file; images reach 10 ...
_ALWAYS_EXPANDED = 2**26  # ... or to so many bytes


class _ArrayError(ValueError):
    """Says already which file and array."""


@dataclass(frozen=True)
class _Member:
    """Where an array lies in its file."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    header: int  # bytes before the numbers


class ArrayFile:
    """The arrays of an ``.npz`` file; their headers are checked when it is opened, and objects are never made.

    Args:
        path: The file.
        thing: What it is, for errors, e.g. ``"reference"``.

    Raises:
        ValueError: It is missing, no such file, or holds something else than plain numbers.
    """

    def __init__(self, path: Path | str, *, thing: str) -> None:
        self.path, self.thing = Path(path), thing
        if not self.path.is_file():
            raise ValueError(f"{thing} {path}: an existing .npz file is needed")
        try:
            with zipfile.ZipFile(self.path) as archive:
                if len(archive.infolist()) > _MAX_MEMBERS:
                    raise _ArrayError(
                        f"{thing} {path} must have at most {_MAX_MEMBERS} arrays, got {len(archive.infolist())}"
                    )
                self._members = {
                    info.filename.removesuffix(".npy"): self._member(archive, info) for info in archive.infolist()
                }
        except _ArrayError:
            raise
        except _BROKEN as error:
            raise ValueError(f"{thing} {path}: no .npz file, or a damaged one: {printable(error)}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array.

        Raises:
            ValueError: if there is none of that name.
        """
        if name not in self._members:
            held = ", ".join(printable(each) for each in sorted(self._members)) or "nothing"
            raise self.make_error(name, f"it is missing; the file holds {held}")
        return self._members[name].shape

    def read(self, name: str, shape: tuple[int | None, ...], *, kinds: str) -> npt.NDArray[Any]:
        """Reads an array; mapped, not read, where the file is not compressed.

        Args:
            name: Of the array, without ``.npy``.
            shape: That it must have; None is any size of at least 1.
            kinds: Kinds of numbers that are accepted: numpy's letters, ``"f"``, ``"iu"``, or ``"uint8"`` itself.

        Raises:
            ValueError: It is missing, has another shape or other numbers, or is damaged.
        """
        found, member = self.shape(name), self._members.get(name)
        assert member is not None
        fits = len(found) == len(shape) and all(
            size >= 1 if wanted is None else size == wanted for size, wanted in zip(found, shape, strict=True)
        )
        if not fits:
            wanted = "(" + ", ".join("n" if size is None else str(size) for size in shape) + ")"
            raise self.make_error(name, f"the shape {wanted} is needed, got {found}")
        if member.dtype != kinds if kinds == "uint8" else member.dtype.kind not in kinds:
            raise self.make_error(name, f"other numbers are needed, got {member.dtype}")
        try:
            is_stored = member.info.compress_type == zipfile.ZIP_STORED
            return self._map(member) if is_stored else self._decompress(member)
        except _BROKEN as error:
            raise self.make_error(name, f"it cannot be read: {error}") from error

    def make_error(self, name: str, why: str) -> ValueError:
        """Returns the error that names file and array."""
        return _ArrayError(f"{self.thing} {printable(str(self.path))}: array {name!r}: {why}")

    def check(self) -> None:
        """Compares every array with its checksum.

        Raises:
            ValueError: if one is damaged.
        """
        with zipfile.ZipFile(self.path) as archive:
            try:
                damaged = archive.testzip()
            except _BROKEN as error:
                raise ValueError(f"{self.thing} {self.path}: damaged: {error}") from error
        if damaged is not None:
            raise self.make_error(damaged.removesuffix(".npy"), "it is damaged")

    def _member(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
        name = info.filename.removesuffix(".npy")
        self._check_expansion(name, info)
        with archive.open(info) as member:
            stream = io.BytesIO(member.read(_MAX_HEADER))
            version = np.lib.format.read_magic(stream)
            if version not in _HEADERS:
                raise self.make_error(name, f"plain numbers are needed, got format {version}")
            shape, fortran, dtype = _HEADERS[version](stream)
            header = stream.tell()
        if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
            raise self.make_error(name, "plain numbers are needed, got objects, which may run code when they are read")
        if header + math.prod(shape) * dtype.itemsize != info.file_size:
            raise self.make_error(name, f"its size and its shape {shape} disagree; the file is damaged")
        return _Member(info, shape, fortran, dtype, header)

    def _check_expansion(self, name: str, info: zipfile.ZipInfo) -> None:
        """Refuses a member that is compressed in another way than numpy's, or that expands too much."""
        if info.compress_type == zipfile.ZIP_STORED:
            return
        if info.compress_type != zipfile.ZIP_DEFLATED:
            raise self.make_error(name, f"it must be stored or deflated, got compression type {info.compress_type}")
        most = max(_ALWAYS_EXPANDED, _MAX_RATIO * self.path.stat().st_size)
        if info.file_size > most:
            raise self.make_error(
                name,
                f"it must expand to at most {size_text(most)}, got {size_text(info.file_size)}; save it with np.savez, "
                "which does not compress",
            )

    def _map(self, member: _Member) -> npt.NDArray[Any]:
        with open(self.path, "rb") as file:
            file.seek(member.info.header_offset)
            local = file.read(_LOCAL_HEADER)
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        offset = member.info.header_offset + _LOCAL_HEADER + name_length + extra_length + member.header
        if offset + math.prod(member.shape) * member.dtype.itemsize > self.path.stat().st_size:
            raise EOFError("the file ends before it")
        order: Literal["C", "F"] = "F" if member.fortran else "C"
        return np.memmap(self.path, member.dtype, "r", offset, member.shape, order)

    def _decompress(self, member: _Member) -> npt.NDArray[Any]:
        order: Literal["C", "F"] = "F" if member.fortran else "C"
        size = math.prod(member.shape) * member.dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open(member.info) as stream:
            stream.read(member.header)
            content = bytearray(size)  # numpy's arrays may be written to
            place = 0
            while place < size:
                part = stream.read(min(2**20, size - place))
                if not part:
                    raise EOFError("the file ends before it")
                content[place : place + len(part)] = part
                place += len(part)
            stream.read(1)  # the end, where the checksum is compared
        return np.frombuffer(content, member.dtype).reshape(member.shape, order=order)


@dataclass(frozen=True)
class SampleFile:
    """Images of a file, read a few at a time.

    Args:
        path: The file.
        images: (n, H, W, 3) uint8, perhaps mapped.
        labels: (n,) int64; None where the file has none.
    """

    path: Path
    images: npt.NDArray[np.uint8]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: range, *, channels: Literal[1, 3] = 3) -> Tensor:
        """Reads images.

        Args:
            rows: Their numbers, one after the other.
            channels: 1 for the grey images that they are.

        Returns:
            (b, channels, H, W) uint8.

        Raises:
            ValueError: Grey is asked for, and one is not grey.
        """
        images = rearrange(torch.from_numpy(np.array(self.images[rows.start : rows.stop])), "b h w c -> b c h w")
        if channels == 3:
            return images
        if not (images == images[:, :1]).all():
            raise ValueError(f"samples {self.path}: grey images are needed, got colour in {rows.start} to {rows.stop}")
        return images[:, :1]


def open_samples(file: ArrayFile | Path | str) -> SampleFile:
    """Opens the images of a file, and their labels if it has any.

    Raises:
        ValueError: if there are none, or the arrays are others than the layout says.
    """
    arrays = file if isinstance(file, ArrayFile) else ArrayFile(file, thing="samples")
    images = arrays.read("arr_0", (None, None, None, 3), kinds="uint8")
    if "arr_1" not in arrays:
        return SampleFile(arrays.path, images, None)
    labels = torch.from_numpy(arrays.read("arr_1", (len(images),), kinds="iu").astype(np.int64))
    if int(labels.min()) < 0:
        raise arrays.make_error("arr_1", f"labels of at least 0 are needed, got {int(labels.min())}")
    return SampleFile(arrays.path, images, labels)
