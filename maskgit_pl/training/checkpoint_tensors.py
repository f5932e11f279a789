"""The tensors of a checkpoint: each rank writes and reads its own rows. Used by ``checkpoint_files``.

The header of a file records the first row of each piece, so that any number of ranks reads a checkpoint that any other
number of ranks has written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from maskgit_pl.checks import check_integer, shorten
from maskgit_pl.files import parse_json
from maskgit_pl.networks.weights import open_tensors

__all__ = ["FIRST_ROWS", "SavedTensor", "TensorPieces", "local_rows", "own_pieces"]

_MAX_ROWS = 2**40
FIRST_ROWS = "first_rows"  # key in the header of a tensor file: tensor name -> first row of the piece


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint, whole or in pieces. Any of its rows can be read.

    Attributes:
        key: Key in the checkpoint, such as ``/state_dict/layer.weight``.
        pieces: Open files of the checkpoint.
    """

    key: str
    pieces: TensorPieces

    @property
    def is_scalar(self) -> bool:
        """A bool: the tensor has no dimensions.

        Raises:
            ValueError: if the files do not hold the tensor.
        """
        first = next(self.pieces.find(self.key), None)
        if first is None:
            raise ValueError(self._not_whole)
        return not first.shape

    def read_all(self) -> Tensor:
        """Reads the whole tensor to the CPU."""
        if self.is_scalar:
            return next(self.pieces.find(self.key)).read(None)
        found = list(self._find())
        end = max(piece.end for piece in found)
        # Checked before memory for all rows is allocated: the first rows come from a file.
        if end > sum(piece.shape[0] for piece in found):
            raise ValueError(self._not_whole)
        return self.read_rows(0, end)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Reads rows [start, stop) of the first dimension to the CPU.

        Raises:
            ValueError: if the files do not hold all of these rows, or hold some of them twice.
        """
        found: list[_Piece] = []
        for piece in self._find():
            if piece.start <= start and stop <= piece.end:  # all rows are in this piece: no copy
                return piece.read(slice(start - piece.start, stop - piece.start))
            found.append(piece)
        made: Tensor | None = None
        end = start  # the rows before it are read
        for piece in sorted(found, key=lambda piece: piece.start):
            first, last = max(start, piece.start), min(stop, piece.end)
            if first >= last:
                continue
            # With a gap or an overlap, some rows would be uninitialised memory.
            if first != end or piece.shape[1:] != found[0].shape[1:]:
                raise ValueError(self._not_whole)
            rows = piece.read(slice(first - piece.start, last - piece.start))
            made = rows.new_empty(stop - start, *piece.shape[1:]) if made is None else made
            made[first - start : last - start] = rows
            end = last
        if made is None or end < stop:
            raise ValueError(self._not_whole)
        return made

    def _find(self) -> Iterator[_Piece]:
        for piece in self.pieces.find(self.key):
            if not piece.shape:
                raise ValueError(self._not_whole)
            yield piece

    @property
    def _not_whole(self) -> str:
        return f"checkpoint {self.pieces.folder}: {shorten(self.key)} is incomplete; resume from an older one"


class _Piece(NamedTuple):
    """Rows of a tensor in an open file."""

    file: Any  # an open safetensors file
    key: str
    start: int
    shape: list[int]

    @property
    def end(self) -> int:
        return self.start + self.shape[0]

    def read(self, rows: slice | None) -> Tensor:
        made: Tensor = self.file.get_tensor(self.key) if rows is None else self.file.get_slice(self.key)[rows]
        return made


class TensorPieces:
    """The tensor files of a checkpoint, which are opened on first use, beginning with the file of this rank."""

    def __init__(self, folder: Path, names: Sequence[str], rank: int) -> None:
        self.folder = folder
        # With an unchanged number of ranks, each rank finds its rows in its own file.
        self._names = [*names[rank : rank + 1], *names[:rank], *names[rank + 1 :]]
        self._open: dict[str, tuple[Any, set[str], dict[str, int]]] = {}
        self._files = ExitStack()

    def __enter__(self) -> TensorPieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def find(self, key: str) -> Iterator[_Piece]:
        """Yields the pieces of a tensor."""
        for name in self._names:
            if name not in self._open:
                file = self._files.enter_context(open_tensors(self.folder / name))
                self._open[name] = file, set(file.keys()), _first_rows(file.metadata(), self.folder / name)
            file, keys, starts = self._open[name]
            if key in keys:
                yield _Piece(file, key, starts.get(key, 0), file.get_slice(key).get_shape())


def local_rows(tensor: DTensor) -> tuple[int, int]:
    """Returns the range [start, stop) of this rank's rows of a tensor that is sharded along its first dimension."""
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # torch has no types for it
    assert chunk.sizes[1:] == tensor.shape[1:]
    return chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]


def own_pieces(tensors: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, int]]:
    """Returns the tensors that this rank writes, each with its first row: its shards, and on rank 0 all others."""
    pieces: dict[str, tuple[Tensor, int]] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            pieces[key] = tensor.to_local(), local_rows(tensor)[0]
        elif rank == 0:
            pieces[key] = tensor, 0
    return pieces


def _first_rows(metadata: Mapping[str, str] | None, file: Path) -> dict[str, int]:
    """Returns the first row of each piece from the header of a tensor file; a missing piece begins at row 0."""
    where = f"checkpoint {file}: {FIRST_ROWS}"
    starts = parse_json((metadata or {}).get(FIRST_ROWS, "{}"), where)
    return {
        name: check_integer(f"{where} of {shorten(name)}", row, f"[0, {_MAX_ROWS}]") for name, row in starts.items()
    }
