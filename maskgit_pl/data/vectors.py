"""Vectors of images, such as frozen text or image embeddings, and the memory-mapped arrays that hold them.

A vector is a ``.npy`` file of C little-endian float16 or float32 values, all finite. All vectors of a data
set have the same C and dtype. The index of a data folder copies them into one array ``SPLIT-vectors.npy`` (n,
C), row i for sample i, which is memory-mapped.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.files import open_regular

VECTOR_EXTENSION = "npy"
_MAX_DIM = 2**16  # the largest text encoders have 4,096
_MAX_HEADER_BYTES = 2**12  # NumPy writes 128
MAX_VECTOR_BYTES = 4 * _MAX_DIM + _MAX_HEADER_BYTES


class VectorKind(NamedTuple):
    """The size and the type of all vectors of a data set."""

    dim: int  # number of values C, in [1, 65536]
    dtype: str  # float16 or float32

    def __str__(self) -> str:
        return f"{self.dim} {self.dtype} values"

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the values of a vector."""
        return self.dim * np.dtype(self.dtype).itemsize


def vectors_path(folder: Path, split: str) -> Path:
    """Returns the path of the array of a split's vectors, in a data folder or a token store."""
    return folder / f"{split}-vectors.npy"


def parse_vector(data: bytes, *, name: str) -> tuple[VectorKind, int]:
    """Checks the bytes of a ``.npy`` file of one vector. Nothing is unpickled.

    Args:
        data: All bytes of the file.
        name: The vector's name in error messages.

    Returns:
        The kind of the vector, and the position of its first value in ``data``.

    Raises:
        ValueError: if it is not a complete ``.npy`` file of one finite vector of float16 or float32.
    """
    file = io.BytesIO(data)
    try:
        array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # the header is a Python literal, whose parser raises many kinds of errors
        raise ValueError(f"vector {name} must be a .npy file, got {' '.join(str(error).split())[:200]}") from error
    if array.ndim != 1 or not 1 <= len(array) <= _MAX_DIM or array.dtype.str not in ("<f2", "<f4") or file.read(1):
        raise ValueError(
            f"vector {name} must hold 1 to {_MAX_DIM} little-endian float16 or float32 values, got the shape "
            f"{array.shape} of {array.dtype.str} in {len(data)} bytes; use array.astype(np.float32)"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"vector {name} must have finite values")
    return VectorKind(len(array), array.dtype.name), len(data) - array.nbytes


def copy_vectors(file: IO[bytes], tars: Mapping[Path, npt.NDArray[np.int64]], kind: VectorKind) -> None:
    """Copies the vectors of tars into one array, in the format of ``np.save``.

    Args:
        file: Open file.
        tars: For each tar, positions of the values of its vectors, (n,) int64, in the order of the samples.
        kind: Kind of the vectors.
    """
    shape = sum(map(len, tars.values())), kind.dim
    header = {"descr": np.dtype(kind.dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for path, offsets in tars.items():
        with open(open_regular(path), "rb", buffering=0) as tar:
            for offset in offsets.tolist():
                file.write(os.pread(tar.fileno(), kind.num_bytes, offset))


def map_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, hint: str) -> npt.NDArray[Any]:
    """Maps a ``.npy`` file of a known shape and type into memory; see ``open_array``.

    Raises:
        ValueError: if it has another shape or type; ``hint`` is the way to make it again.
    """
    array = open_array(path)
    if (array.shape, array.dtype) != (shape, dtype):
        raise ValueError(f"{path} must be {shape} of {dtype}, got {array.shape} of {array.dtype}; {hint}")
    return array


def check_unchanged(path: Path, sha256: str, *, expected: str, hint: str) -> None:
    """Raises a ``ValueError`` if the hash of a file differs from the expected one; ``hint`` is the way to make it."""
    if sha256 != expected:
        raise ValueError(
            f"{path} changed since it was made: sha256 {expected[:12]} expected, got {sha256[:12]}; {hint}"
        )


def open_array(path: Path) -> npt.NDArray[Any]:
    """Maps a ``.npy`` file of any shape and type into memory, read-only.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a complete ``.npy`` file of plain values.
    """
    try:
        os.close(open_regular(path))  # rejects a FIFO or a device, which would block
        with np.errstate(over="raise"):  # NumPy only warns if the product of a shape overflows
            array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise
    except Exception as error:  # the header is a Python literal, whose parser raises many kinds of errors
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return array
