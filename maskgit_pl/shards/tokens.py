"""The token store: what a tokenizer made of a data folder, as memory-mapped arrays that are read a batch at a time.

A store is a folder::

    train-tokens.npy    (n, N) uint16, or uint32 where the codebook has more than 65,536 codes; row i is sample i
    train-labels.npy    (n,) int64
    val-...             the same
    store.json          grid, codes, and the hashes of the tokenizer and of the data; written last

A store made by another tokenizer, or from other data, is refused. Used by ``maskgit tokenize`` and ``data.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.shards.manifest import Split, write_atomically

__all__ = [
    "StoreDescription",
    "TokenReader",
    "TokenWriter",
    "complete_store",
    "is_complete",
    "open_store",
    "read_description",
]

FORMAT = 1
ROWS_BETWEEN_FLUSHES = 10_000  # what a kill may cost
_DESCRIPTION = "store.json"
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class StoreDescription:
    """What a store holds and what it was made from.

    Args:
        grid: Height and width of the token grid.
        num_codes: Codebook size K; tokens lie in [0, K).
        image_size: Side of the images that were tokenised.
        tokenizer: Fingerprint of the tokenizer's weights.
        data: Fingerprint of the data folder.
        classes: Class names.
        samples: Samples of each split.
    """

    grid: tuple[int, int]
    num_codes: int
    image_size: int
    tokenizer: str
    data: str
    classes: tuple[str, ...]
    samples: Mapping[Split, int]

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, N."""
        return self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint16 and uint32 that holds every code."""
        return np.dtype(np.uint16 if self.num_codes <= 2**16 else np.uint32)


class TokenReader:
    """One split of a store.

    Args:
        folder: The store.
        split: Which split.
        description: The store's description.
    """

    def __init__(self, folder: Path, split: Split, description: StoreDescription) -> None:
        self.folder = folder
        self.split: Split = split
        self.description = description
        self._arrays: tuple[Tokens, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.description.samples[self.split]

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens and labels of samples.

        Args:
            indices: (B,) int64 in [0, len(self)).

        Returns:
            Tokens (B, N) int64 in [0, num_codes), labels (B,) int64.
        """
        tokens, labels = self._map()
        return tokens[indices].astype(np.int64), labels[indices]

    def _map(self) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Map the arrays at first use in each process.

        Raises:
            ValueError: They do not fit the description.
        """
        if self._arrays is None:
            tokens, labels = (
                np.load(path, mmap_mode="r", allow_pickle=False) for path in _paths(self.folder, self.split)
            )
            found = (tokens.shape, tokens.dtype, labels.shape)
            expected = ((len(self), self.description.num_tokens), self.description.dtype, (len(self),))
            if found != expected:
                raise ValueError(
                    f"token store {self.folder}, {self.split}: {expected} expected, got {found}; {_WAY_OUT}"
                )
            self._arrays = tokens, labels
        return self._arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}


_WAY_OUT = "make it again with `make tokenize` (or `maskgit tokenize`)"


def read_description(folder: str | Path) -> StoreDescription:
    """The description of a finished store.

    Raises:
        FileNotFoundError: There is none, or it is not finished.
        ValueError: It cannot be read.
    """
    path = Path(folder) / _DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"token store {folder}: none there, or not finished; {_WAY_OUT}")
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError(f"format {FORMAT} is needed")
        height, width = content["grid"]
        return StoreDescription(**{**content, "grid": (height, width), "classes": tuple(content["classes"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"token store {path}: cannot be read ({error!r}); {_WAY_OUT}") from error


def open_store(
    folder: str | Path, *, data: str | None, tokenizer: str | None = None, image_size: int | None = None
) -> dict[Split, TokenReader]:
    """Open every split of a finished store, if it belongs to this data and tokenizer.

    Args:
        folder: The store.
        data: Fingerprint of the data folder it must have been made from; None takes any.
        tokenizer: Fingerprint of the tokenizer it must have been made with; None takes any.
        image_size: Side of the images it must have been made from; None takes any.

    Raises:
        FileNotFoundError: No finished store.
        ValueError: The store is of other data, of another tokenizer or of another image size.
    """
    description = read_description(folder)
    for name, wanted, found in (
        ("data", data, description.data),
        ("tokenizer", tokenizer, description.tokenizer),
        ("image size", image_size, description.image_size),
    ):
        if wanted is not None and wanted != found:
            raise ValueError(
                f"token store {folder}: its {name} must be {str(wanted)[:12]}, got {str(found)[:12]}; {_WAY_OUT}"
            )
    return {split: TokenReader(Path(folder), split, description) for split in description.samples}


def is_complete(folder: str | Path, description: StoreDescription) -> bool:
    """Whether a finished store of exactly this description lies in the folder."""
    try:
        return read_description(folder) == description
    except (FileNotFoundError, ValueError):
        return False


class TokenWriter:
    """Fills one split of a store from the front, and goes on where an interrupted writer stopped.

    Rows are written in place into files with the suffix ``.partial``; a progress file, written after the rows are on
    disk, says how many are done and of what. ``finish`` gives the files their names; ``complete_store`` makes the whole
    store valid.

    Args:
        folder: The store, made if missing. A finished store there is taken back: its ``store.json`` goes first.
        split: Which split.
        description: What the store will hold; partial files of another description are started again.
        labels: (n,) int64, the labels of the split.
    """

    def __init__(
        self, folder: str | Path, split: Split, description: StoreDescription, labels: npt.NDArray[np.int64]
    ) -> None:
        self.folder = Path(folder)
        self.split: Split = split
        self.description = description
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _DESCRIPTION).unlink(missing_ok=True)
        self._labels = labels
        self._progress = self.folder / f"{split}-progress.json"
        self.rows_done = self._rows_noted = self._resumable_rows()
        self._tokens = self._open()

    def write(self, tokens: npt.NDArray[np.int64]) -> None:
        """Append rows.

        Args:
            tokens: (B, N) integers in [0, num_codes), the rows that follow ``rows_done``.

        Raises:
            ValueError: Another N, a code out of range, or more rows than the split has.
        """
        wanted, codes = self.description.num_tokens, self.description.num_codes
        if tokens.ndim != 2 or tokens.shape[1] != wanted or self.rows_done + len(tokens) > len(self._labels):
            left = len(self._labels) - self.rows_done
            raise ValueError(f"tokens: at most {left} rows of {wanted} are needed, got {tokens.shape}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < codes:
            raise ValueError(f"tokens: codes in [0, {codes}) are needed, got {tokens.min()} to {tokens.max()}")
        self._tokens[self.rows_done : self.rows_done + len(tokens)] = tokens
        self.rows_done += len(tokens)
        if self.rows_done - self._rows_noted >= ROWS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Put the rows written so far on disk and note their number."""
        self._tokens.flush()
        self._rows_noted = self.rows_done
        with write_atomically(self._progress) as file:
            file.write(json.dumps({"rows": self.rows_done, "store": _as_json(self.description)}).encode())

    def finish(self) -> None:
        """Give the split's files their final names.

        Raises:
            ValueError: Rows are missing.
        """
        if self.rows_done != len(self._labels):
            raise ValueError(f"token store {self.folder}, {self.split}: {self.rows_done} of {len(self._labels)} rows")
        self.flush()
        tokens_path, labels_path = _paths(self.folder, self.split)
        with write_atomically(labels_path) as file:
            np.save(file, self._labels, allow_pickle=False)
        if self._partial.exists():
            os.replace(self._partial, tokens_path)

    @property
    def _partial(self) -> Path:
        path = _paths(self.folder, self.split)[0]
        return path.with_name(f"{path.name}.partial")

    def _resumable_rows(self) -> int:
        """Rows that an earlier writer of the same description has put on disk."""
        tokens_path = _paths(self.folder, self.split)[0]
        try:
            noted = json.loads(self._progress.read_text())
        except (FileNotFoundError, ValueError):
            noted = {}
        if noted.get("store") == _as_json(self.description) and (self._partial.exists() or tokens_path.exists()):
            return int(noted["rows"])
        for stale in (self._progress, self._partial, tokens_path):
            stale.unlink(missing_ok=True)
        return 0

    def _open(self) -> np.memmap[Any, np.dtype[Any]]:
        """The token file: the one in work, the finished one, or a new one."""
        for path in (self._partial, _paths(self.folder, self.split)[0]):
            if path.exists():
                return np.lib.format.open_memmap(path, mode="r+")
        shape = (len(self._labels), self.description.num_tokens)
        return np.lib.format.open_memmap(self._partial, mode="w+", dtype=self.description.dtype, shape=shape)


def complete_store(folder: str | Path, description: StoreDescription) -> None:
    """Write ``store.json``, which makes the store valid, once every split is finished."""
    folder = Path(folder)
    with write_atomically(folder / _DESCRIPTION) as file:
        file.write((json.dumps(_as_json(description), indent=1) + "\n").encode())
    for split in description.samples:
        (folder / f"{split}-progress.json").unlink(missing_ok=True)


def _paths(folder: Path, split: Split) -> tuple[Path, Path]:
    return folder / f"{split}-tokens.npy", folder / f"{split}-labels.npy"


def _as_json(description: StoreDescription) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(description)}))
    return content
