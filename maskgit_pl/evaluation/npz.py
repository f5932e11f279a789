"""A safe reader of ``.npz`` files in the layout of ADM's evaluator: images, labels and statistics.

``arr_0`` (n, H, W, 3) uint8 holds images and ``arr_1`` (n,) integers their labels. ``mu`` and ``sigma`` are the
statistics of Inception's pooled features, ``mu_s`` and ``sigma_s`` those of its spatial features. Such files come from
strangers: only plain numbers are read, never pickled objects. ``reference`` and ``generation`` use it.

Source: openai/guided-diffusion, evaluations/README.md and evaluator.py.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.errors import printable
from maskgit_pl.files import open_zip, size_text

__all__ = ["ArrayFile", "SampleFile", "open_samples"]

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_LOCAL_HEADER = 30  # bytes of a zip member's local header, before its name
_MAX_HEADER = 2**16  # bytes of an array's header; numpy parses at most 10,000 of them
_MAX_MEMBERS = 100  # arrays per file
# A compressed array may expand to 100 times the size of the file (images reach 10 times), or to 64 MiB.
_MAX_RATIO = 100
_ALWAYS_EXPANDED = 2**26
_NAMES = {"uint8": "uint8", "f": "float", "iu": "integer"}  # accepted kinds of numbers -> name in errors


class ArrayFile:
    """The arrays of an ``.npz`` file of a stranger; objects are never unpickled.

    Args:
        path: Path of the file.
        thing: Kind of the file for error messages, e.g. ``"reference"``.

    Raises:
        ValueError: if the file is missing, damaged, not an ``.npz`` file, or holds more than 100 arrays.
    """

    def __init__(self, path: Path | str, *, thing: str) -> None:
        self.path, self.thing = Path(path), thing
        if not self.path.is_file():
            raise ValueError(f"{thing} {path} must be an existing .npz file")
        with (
            _refusing(f"{thing} {path} cannot be read as an .npz file"),
            open(self.path, "rb") as stream,
            open_zip(stream, max_entries=_MAX_MEMBERS) as archive,
        ):
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def make_error(self, name: str, why: str) -> ValueError:
        """Returns an error that names file and array."""
        return ValueError(f"{self.thing} {printable(str(self.path))}: array {name!r}: {why}")

    def read(self, name: str, shape: tuple[int | None, ...], *, kinds: str) -> npt.NDArray[Any]:
        """Reads an array; an uncompressed one is memory-mapped.

        Args:
            name: Name of the array, without ``.npy``.
            shape: Required shape; None stands for any size >= 1.
            kinds: Accepted numpy kinds, ``"f"`` or ``"iu"`` of any precision, or the dtype ``"uint8"``.

        Raises:
            ValueError: if the array is missing or damaged, or has another shape or dtype.
        """
        if name not in self._members:
            held = ", ".join(printable(each) for each in sorted(self._members)) or "nothing"
            raise self.make_error(name, f"it is missing; the file holds {held}")
        info = self._members[name]
        self._check_expansion(name, info)
        unreadable = f"{self.thing} {printable(str(self.path))}: array {name!r}: it cannot be read"
        with _refusing(unreadable), zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
            stream = io.BytesIO(member.read(_MAX_HEADER))  # the length that a header claims may be huge
            found, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
            header = stream.tell()
        fits = (size >= 1 if wanted is None else size == wanted for size, wanted in zip(found, shape, strict=False))
        if len(found) != len(shape) or not all(fits):
            wanted = ", ".join("n" if size is None else str(size) for size in shape)
            raise self.make_error(name, f"the shape must be ({wanted}), got {found}")
        # Objects, which are pickled, records and text are of other kinds.
        if dtype != kinds if kinds == "uint8" else dtype.kind not in kinds:
            raise self.make_error(name, f"the dtype must be {_NAMES[kinds]}, got {dtype}")
        if header + math.prod(found) * dtype.itemsize != info.file_size:
            raise self.make_error(name, f"its size does not match its shape {found}; the file is damaged")
        with _refusing(unreadable):
            if info.compress_type == zipfile.ZIP_STORED:
                # The member is a plain .npy file within the zip file, so that its values can be mapped.
                return np.memmap(self.path, dtype, "r", self._offset(info) + header, found, "F" if is_fortran else "C")
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
                return np.lib.format.read_array(member, allow_pickle=False)

    def _check_expansion(self, name: str, info: zipfile.ZipInfo) -> None:
        """Checks that a member is stored or deflated, as numpy writes it, and that it is no decompression bomb."""
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.make_error(name, f"it must be stored or deflated, got compression type {info.compress_type}")
        # The size in the directory may be false, but zipfile never reads more than it.
        most = max(_ALWAYS_EXPANDED, _MAX_RATIO * self.path.stat().st_size)
        if info.compress_type == zipfile.ZIP_DEFLATED and info.file_size > most:
            raise self.make_error(
                name,
                f"it must expand to at most {size_text(most)}, got {size_text(info.file_size)}; save it uncompressed, "
                "with np.savez",
            )

    def _offset(self, info: zipfile.ZipInfo) -> int:
        """Returns the number of bytes of the file before an uncompressed member."""
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            local = file.read(_LOCAL_HEADER)
        # The name and the extra field follow the local header; their lengths may differ from the central directory's.
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        return info.header_offset + _LOCAL_HEADER + int(name_length) + int(extra_length)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns any error of zipfile, zlib or numpy, which a damaged file may raise, into a ``ValueError`` of one line."""
    try:
        yield
    except Exception as error:
        # Python's parser, which numpy reads headers with, gives no text for some.
        raise ValueError(f"{what}: {printable(error) or type(error).__name__}") from error


@dataclass(frozen=True)
class SampleFile:
    """The images of a file, read in parts.

    Args:
        path: Path of the file.
        images: (n, H, W, 3) uint8, memory-mapped if the file is not compressed.
        labels: (n,) int64; None if the file has no labels.
    """

    path: Path
    images: npt.NDArray[np.uint8]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: range) -> Tensor:
        """Returns the (b, 3, H, W) uint8 images of a range of rows."""
        return rearrange(torch.from_numpy(np.array(self.images[rows.start : rows.stop])), "b h w c -> b c h w")


def open_samples(file: ArrayFile | Path | str) -> SampleFile:
    """Opens the images of a file, and their labels if there are any.

    Raises:
        ValueError: if there are no images, or an array has another shape or dtype than the layout.
    """
    arrays = file if isinstance(file, ArrayFile) else ArrayFile(file, thing="samples")
    images = arrays.read("arr_0", (None, None, None, 3), kinds="uint8")
    if "arr_1" not in arrays:
        return SampleFile(arrays.path, images, None)
    labels = torch.from_numpy(arrays.read("arr_1", (len(images),), kinds="iu").astype(np.int64))
    if int(labels.min()) < 0:
        raise arrays.make_error("arr_1", f"labels must be >= 0, got {int(labels.min())}")
    return SampleFile(arrays.path, images, labels)
