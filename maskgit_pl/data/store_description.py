"""The description of a token store, ``store.json``: its content, its origin and the hashes of its arrays.

See ``tokens`` for the files of a store. Used by ``tokens``, which reads stores, and by ``token_writer``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from maskgit_pl.checks import build_dataclass, check_choice, check_integer, check_keys, check_sha256, shorten
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.vectors import MAX_VECTOR_DIM, VECTOR_DTYPES, VectorKind, vectors_path
from maskgit_pl.files import read_json
from maskgit_pl.image_format import ImageSize, check_image_size

__all__ = [
    "DESCRIPTION_FILE",
    "FORMAT",
    "REMAKE_HINT",
    "StoreDescription",
    "array_paths",
    "augmentations_text",
    "check_origin",
    "is_store",
    "plain_description",
    "read_description",
]

DESCRIPTION_FILE = "store.json"
FORMAT = 2
_CODEBOOK_SIZE = "num_codes"  # key of codebook_size in the file
_MAX_DESCRIPTION_BYTES = 2**25  # most of it class names
REMAKE_HINT = "regenerate it with `maskgit tokenize`"


@dataclass(frozen=True)
class StoreDescription:
    """The description of a store: its content and its origin.

    Args:
        grid: Height and width of the token grid.
        codebook_size: Codebook size K; tokens lie in [0, K).
        image_size: Size of the images that were encoded: a side, or (height, width), in pixels.
        tokenizer: Fingerprint of the tokenizer's weights.
        data: Fingerprint of the data folder.
        classes: Class names.
        samples: Number of samples of each split.
        crops: Crops of each training image: the central one, then random or augmented ones.
        flip: True if each training crop is also stored mirrored.
        precision: Precision of the tokenizer's computation, ``"float32"`` or ``"bfloat16"``.
        vector_dim: Size C of the vectors of the samples; 0 without vectors.
        vector_dtype: Type of the vectors, ``"float16"`` or ``"float32"``; empty without vectors.
        augmentations: Augmentations of the other crops, see ``augmentations_text``; empty for random crops.
        sha256: Hash of each array's file by its name, ``{"train-tokens": hex, ...}``; empty until the store is
            finished. Comparison of descriptions ignores it.

    Raises:
        ValueError: if a number is out of range.
    """

    grid: tuple[int, int]
    codebook_size: int
    image_size: ImageSize
    tokenizer: str
    data: str
    classes: tuple[str, ...]
    samples: Mapping[Split, int]
    crops: int = 1
    flip: bool = False
    precision: str = "float32"
    vector_dim: int = 0
    vector_dtype: str = ""
    augmentations: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for side in self.grid:
            check_integer("grid", side, "[1, 4096]")
        check_integer("codebook_size", self.codebook_size, "[1, 4294967296]")
        object.__setattr__(self, "image_size", check_image_size("image_size", self.image_size, "[1, 65536]"))
        check_integer("crops", self.crops, "[1, 65536]")
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        check_keys("samples", self.samples, known=get_args(Split))
        for split, count in self.samples.items():
            check_integer(f"samples.{split}", count, "[1, 4294967296]")
        if not self.samples or not self.classes:
            raise ValueError("samples and classes must not be empty")
        check_integer("vector_dim", self.vector_dim, f"[0, {MAX_VECTOR_DIM}]")
        check_choice("vector_dtype", self.vector_dtype, VECTOR_DTYPES if self.vector_dim else ("",))
        if self.sha256:
            names = [path.stem for path in self.files(Path())]
            check_keys("sha256", self.sha256, known=names, required=names)
            for name in names:
                check_sha256(f"sha256.{name}", self.sha256[name])

    @property
    def num_tokens(self) -> int:
        """The number of tokens of an image, N."""
        return self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the tokens: uint16 if it can represent every code, else uint32."""
        return np.dtype(np.uint16 if self.codebook_size <= 2**16 else np.uint32)

    @property
    def vectors(self) -> VectorKind | None:
        """The size and type of the vectors; None without vectors."""
        return VectorKind(self.vector_dim, self.vector_dtype) if self.vector_dim else None

    def files(self, folder: Path) -> list[Path]:
        """Returns the paths of all arrays of a store in a folder."""
        paths = [path for split in self.samples for path in array_paths(folder, split)]
        return paths + [vectors_path(folder, split) for split in self.samples if self.vector_dim]

    def crops_of(self, split: Split) -> int:
        """Returns the number of crops of each image of a split; val has only the central crop."""
        return self.crops if split == "train" else 1

    def mirrors_of(self, split: Split) -> int:
        """Returns the number of rows of each crop of a split: 2 if it is also stored mirrored, else 1."""
        return 2 if self.flip and split == "train" else 1

    def views(self, split: Split) -> int:
        """Returns the number of rows of each sample, V. View v is crop v // mirrors, mirrored if v % mirrors is 1."""
        return self.crops_of(split) * self.mirrors_of(split)


def is_store(folder: str | Path) -> bool:
    """Returns whether a folder is a finished token store."""
    return (Path(folder) / DESCRIPTION_FILE).exists()


def read_description(folder: str | Path) -> StoreDescription:
    """Reads the description of a finished store.

    Raises:
        FileNotFoundError: if there is no store, or it is not finished.
        ValueError: if the description cannot be read, or a value is missing, has another type or is out of range.
    """
    path = Path(folder) / DESCRIPTION_FILE
    if not path.exists():
        raise FileNotFoundError(f"token store {folder} does not exist or is not finished; {REMAKE_HINT}")
    try:
        content = read_json(path, max_bytes=_MAX_DESCRIPTION_BYTES)
        version = content.pop("format", None)
        if version != FORMAT:
            raise ValueError(f"{path}: format must be {FORMAT}, got {shorten(version)}")
        check_keys(str(path), content, known=content, required=(_CODEBOOK_SIZE,))
        codebook_size = content.pop(_CODEBOOK_SIZE)
        made = build_dataclass(StoreDescription, {**content, "codebook_size": codebook_size}, str(path))
        if not made.sha256:
            raise ValueError(f"{path}: sha256 must not be empty")
    except ValueError as error:
        raise ValueError(f"token store {error}; {REMAKE_HINT}") from error
    return replace(made, grid=(made.grid[0], made.grid[1]), classes=tuple(made.classes))


def plain_description(description: StoreDescription) -> dict[str, Any]:
    """Returns a description in plain values, with the keys of ``store.json`` and without its hashes."""
    # Folders of stores are named by hashes of these keys. Those without a value are left out.
    unused = {"sha256"} if description.vector_dim else {"sha256", "vector_dim", "vector_dtype"}
    unused |= set() if description.augmentations else {"augmentations"}
    fields = {name: value for name, value in asdict(description).items() if name not in unused}
    return {_CODEBOOK_SIZE if name == "codebook_size" else name: value for name, value in fields.items()}


def augmentations_text(specs: Sequence[str | Mapping[str, Any]]) -> str:
    """Returns the augmentations of a recipe as they stand in a description: JSON with sorted keys."""
    return json.dumps(list(specs), sort_keys=True)


def check_origin(description: StoreDescription, folder: str | Path | None, **origin: object) -> None:
    """Checks the origin of a store.

    Args:
        description: The store's description.
        folder: The store's folder, for the message.
        origin: Fields of ``StoreDescription`` by their names, with the expected values; None accepts any value.

    Raises:
        ValueError: if the store has another value. The message lists all such fields.
    """
    foreign = [
        f"its {name.replace('_', ' ')} must be {_format_value(wanted)}, got {_format_value(getattr(description, name))}"
        for name, wanted in origin.items()
        if wanted is not None and wanted != getattr(description, name)
    ]
    if foreign:
        raise ValueError(f"token store {folder}: {'; '.join(foreign)}; {REMAKE_HINT}")


def array_paths(folder: Path, split: Split) -> tuple[Path, Path]:
    """Returns the paths of a split's tokens and labels."""
    return folder / f"{split}-tokens.npy", folder / f"{split}-labels.npy"


def _format_value(value: object) -> str:
    """Formats a value for a message; twelve digits identify a fingerprint."""
    return value[:12] if isinstance(value, str) else shorten(value)
