"""The token store: the tokens of a data folder, in memory-mapped arrays that are read batch by batch.

A store is a folder::

    train-tokens.npy    (n V, N) uint16, or uint32 if the codebook has more than 65,536 codes; row i V + v is view v
                        of sample i
    train-labels.npy    (n,) int64
    val-...             the same, with one view
    store.json          grid, codebook size, views, fingerprints of the tokenizer and of the data, and the SHA-256 of
                        each array's file; written last

The arrays are compared with their hashes when a store is opened. Used by the data modules and ``maskgit tokenize``;
``tokenizing`` and ``own_tokens`` write stores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import ImageSize, as_image_size, build_dataclass, check_integer, check_integers, check_number
from maskgit_pl.data.arrays import check_unchanged, map_array
from maskgit_pl.data.manifest import DESCRIPTION_FILE, DataSummary, Split, is_store, read_manifest_summary
from maskgit_pl.files import read_json, sha256_of
from maskgit_pl.text import shorten

Tokens = npt.NDArray[np.unsignedinteger[Any]]  # of StoreDescription.dtype

FORMAT = 3
REMAKE_HINT = "regenerate it with `maskgit tokenize`, or with `maskgit data tokens` if another tokenizer made it"
_MAX_DESCRIPTION_BYTES = 2**25  # most of it class names


@dataclass(frozen=True)
class StoreDescription:
    """The description of a store: its content and its origin."""

    grid: tuple[int, ...]  # height and width of the token grid; also (N,) or (t, h, w) for a tokenizer of others
    codebook_size: int  # K; tokens lie in [0, K)
    # Of the images that were encoded: a side, or (height, width), in pixels; None for tokens of another tokenizer.
    image_size: ImageSize | None
    tokenizer: str | None  # fingerprint of its weights; None for a tokenizer of others
    data: str  # fingerprint of the data folder
    classes: tuple[str, ...]
    samples: Mapping[Split, int]  # number of samples of each split
    crops: int = 1  # of each training image: the central one, then random or augmented ones
    flip: bool = False  # True if each training crop is also stored mirrored
    precision: str = "float32"  # of the tokenizer's computation; or bfloat16
    augmentations: str = ""  # of the other crops, see ``augmentations_text``; empty for random crops
    # Unreadable samples of each split, each with the sample whose tokens and label it has.
    replaced: Mapping[Split, tuple[tuple[int, int], ...]] = field(default_factory=dict, compare=False)
    # Hash of each array's file by its name, {"train-tokens": hex, ...}; empty until the store is finished.
    sha256: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_integer("crops", self.crops, "[1, 4294967296]")
        if self.image_size is not None:
            object.__setattr__(self, "image_size", as_image_size(self.image_size))

    @property
    def num_tokens(self) -> int:
        """The number of tokens of an image, N."""
        return math.prod(self.grid)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the tokens: uint16 if it can represent every code, else uint32."""
        return np.dtype(np.uint16 if self.codebook_size <= 2**16 else np.uint32)

    def crops_of(self, split: Split) -> int:
        """Returns the number of crops of each image of a split; val has only the central crop."""
        return self.crops if split == "train" else 1

    def mirrors_of(self, split: Split) -> int:
        """Returns the number of rows of each crop of a split: 2 if it is also stored mirrored, else 1."""
        return 2 if self.flip and split == "train" else 1

    def views(self, split: Split) -> int:
        """Returns the number of rows of each sample, V. View v is crop v // mirrors, mirrored if v % mirrors is 1."""
        return self.crops_of(split) * self.mirrors_of(split)


def read_description(folder: str | Path) -> StoreDescription:
    """Reads the description of a finished store; raises a ``FileNotFoundError`` if there is none."""
    path = Path(folder) / DESCRIPTION_FILE
    if not path.exists():
        raise FileNotFoundError(f"token store {folder} does not exist or is not finished; {REMAKE_HINT}")
    content = read_json(path, max_bytes=_MAX_DESCRIPTION_BYTES)
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"token store {path} must have format {FORMAT}; {REMAKE_HINT}")
    return build_dataclass(StoreDescription, content, str(path))


def read_data_summary(folder: str | Path) -> DataSummary:
    """Reads class names, counts and fingerprint of a data folder, or of a token store in its place."""
    if not is_store(folder):
        return read_manifest_summary(folder)
    store = read_description(folder)
    return DataSummary({}, store.classes, store.samples, None, store.data, tokens=(store.grid, store.codebook_size))


def plain_description(description: StoreDescription) -> dict[str, Any]:
    """Returns what is known of a store before it is made, in plain values, with the keys of ``store.json``."""
    return {name: value for name, value in asdict(description).items() if name not in ("sha256", "replaced")}


def augmentations_text(specs: Sequence[str | Mapping[str, Any]]) -> str:
    """Returns the augmentations of a recipe as they stand in a description: JSON with sorted keys."""
    return json.dumps(list(specs), sort_keys=True)


def check_origin(description: StoreDescription, folder: str | Path | None, **origin: object) -> None:
    """Checks the origin of a store in a folder.

    Args:
        description: The store's description.
        folder: The folder, for the message.
        origin: Fields of ``StoreDescription`` by their names, with the expected values; None accepts any value.
    """
    foreign = [
        f"its {name.replace('_', ' ')} must be {_format_value(expected)}, got {_format_value(actual)}"
        for name, expected in origin.items()
        if expected is not None and expected != (actual := getattr(description, name))
    ]
    if foreign:
        raise ValueError(f"token store {folder}: {'; '.join(foreign)}; {REMAKE_HINT}")


def array_paths(folder: Path, split: Split) -> tuple[Path, Path]:
    """Returns the paths of a split's tokens and labels."""
    return folder / f"{split}-tokens.npy", folder / f"{split}-labels.npy"


def open_store(folder: str | Path, **origin: object) -> dict[Split, TokenReader]:
    """Opens every split of a finished store, after a check of its origin and of all bytes.

    The whole store is read once, in 0.5 to 1 s per GB, since a changed token or label that is still in range
    would not be noticed later.

    Args:
        folder: The store.
        origin: See ``check_origin``.
    """
    description = read_description(folder)
    check_origin(description, folder, **origin)
    readers = {split: TokenReader(Path(folder), split, description) for split in description.samples}
    for reader in readers.values():
        _ = reader.arrays  # checks shapes and types
        for path in array_paths(reader.folder, reader.split):
            check_unchanged(path, sha256_of(path), expected=description.sha256[path.stem], hint=REMAKE_HINT)
    return readers


def is_complete(folder: str | Path, description: StoreDescription) -> bool:
    """Returns whether a folder is a finished store of exactly this description, with undamaged arrays."""
    try:
        return open_store(folder)["train"].description == description
    except (FileNotFoundError, ValueError):
        return False


@dataclass(frozen=True)
class TokenizingConfig:
    """The settings of the work of ``tokenize``. The tokens do not depend on them.

    Args:
        batch_size: Images per batch of the tokenizer.
        part_size: Images per part that is written at a time; a kill loses at most one part.
        num_workers: Processes that decode images (default: 0 on a CPU, up to 8 with a GPU).
        unreadable_budget: Allowed fraction of unreadable images, in [0, 1].
    """

    batch_size: int = 256
    part_size: int = 1024
    num_workers: int | None = None
    unreadable_budget: float = 1e-4

    def __post_init__(self) -> None:
        check_integers(self, "tokenize ", batch_size="[1, inf)", part_size="[1, inf)", num_workers="[0, 1024]")
        check_number("data.unreadable_budget", self.unreadable_budget, "[0, 1]")


@dataclass(frozen=True)
class TokenizeOptions(TokenizingConfig):
    """The options of ``maskgit tokenize``.

    If ``crops``, ``flip`` and ``precision`` are all None, and the recipe sets neither ``data.views`` nor
    ``data.augmentations``, an existing store of the run keeps its own.

    Args:
        crops: Crops per training image, beginning with the central crop (default: data.views of the recipe, or 1).
        flip: Add the mirrored training images (default: no).
        precision: Precision of the tokenizer (default: float32).
        device: cpu, cuda:1, ...; auto takes a GPU if there is one.
    """

    crops: int | None = None
    flip: bool | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    device: str = "auto"


class TokenReader:
    """A reader of one split of a store, with ``views`` rows of each sample, V."""

    def __init__(self, folder: Path, split: Split, description: StoreDescription) -> None:
        self.folder = folder
        self.split: Split = split
        self.description = description
        self.views = description.views(split)
        pairs = sorted(description.replaced.get(split, ()))
        # (k, 2): samples in rising order, and those that replace them
        self._replaced = np.array(pairs, np.int64).reshape(-1, 2)

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
        """
        tokens, labels = self.arrays
        # take() gathers whole rows 1.3 times as fast as indexing; (B, N).
        return tokens.take(indices * self.views + views, axis=0).astype(np.int64), labels[indices]

    def replacements(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the samples whose tokens some samples have, (B,) int64; -1 for a sample that has its own."""
        replacements = np.full(len(indices), -1)
        if len(self._replaced):
            row = self._replaced[:, 0].searchsorted(indices).clip(max=len(self._replaced) - 1)
            is_replaced = self._replaced[row, 0] == indices
            replacements[is_replaced] = self._replaced[row[is_replaced], 1]
        return replacements

    @cached_property
    def arrays(self) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """The tokens (n V, N) and labels (n,), mapped into memory at first use in each process; see ``map_array``."""
        paths, shape = array_paths(self.folder, self.split), (len(self) * self.views, self.description.num_tokens)
        return (
            map_array(paths[0], shape, self.description.dtype, hint=REMAKE_HINT),
            map_array(paths[1], (len(self),), np.dtype(np.int64), hint=REMAKE_HINT),
        )

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the arrays itself.
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}


def _format_value(value: object) -> str:
    """Formats a value for a message; twelve digits identify a fingerprint."""
    return value[:12] if isinstance(value, str) else shorten(value)
