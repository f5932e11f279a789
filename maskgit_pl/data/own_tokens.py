"""``write_own_tokens``: makes a token store of arrays that another tokenizer made; ``maskgit data tokens`` calls it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.data.arrays import map_any_array
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.token_store import StoreDescription
from maskgit_pl.data.tokenizing import StoreParts
from maskgit_pl.files import sha256_of
from maskgit_pl.folders import hold_lock
from maskgit_pl.randomness import random_bits

_MOST_CLASSES = 100_000  # of a backbone
_PART_SIZE = 4096


def write_own_tokens(
    source: str | Path,
    out: str | Path,
    *,
    grid: Sequence[int],
    codebook_size: int,
    labels: str | Path | None = None,
    val_fraction: float = 0.1,
) -> StoreDescription:
    """Writes a token store; a random ``val_fraction`` of the samples, at least one, is its val split.

    Args:
        source: A ``.npy`` file, or a folder of them in the order of their names: (S, N) or (S, *grid) integers in
            [0, K). Its folders ``train`` and ``val``, if it has both, set the splits; labels are in this order.
        out: Folder of the store.
        grid: Sides of the token grid: (N,), (h, w) or (t, h, w).
        codebook_size: K, at least 1.
        labels: A ``.npy`` file (S,), or a text file with one number per line: integers in [0, 100000). None puts all
            samples into one class.
        val_fraction: Fraction of the val split, in (0, 0.5].

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is damaged, or tokens, grid, labels or a number are out of range.
    """
    check_integer("codebook_size", codebook_size, "[1, 16777216]")
    check_number("val_fraction", val_fraction, "(0, 0.5]")
    source, out, grid = Path(source), Path(out), tuple(grid)
    paths = sorted(source.glob("*.npy")) if source.is_dir() else [source]
    of_train, of_val = (sorted((source / split).glob("*.npy")) for split in ("train", "val"))
    if is_split := bool(of_train and of_val):
        paths = of_train + of_val
    if not paths:
        raise FileNotFoundError(f"{source}: no .npy files in this folder; write arrays of tokens to it with numpy.save")
    arrays = [_map_tokens(path, grid, codebook_size) for path in paths]
    count = sum(map(len, arrays))
    order = np.arange(count)
    if is_split:
        num_train = sum(map(len, arrays[: len(of_train)]))
    else:
        # Neighbours are often alike, so a rule such as every tenth could choose one kind only.
        random = random_bits("own-tokens/split", seed=0, index=torch.arange(count))[:, 0]
        order, num_train = random.argsort(stable=True).numpy()[::-1], count - max(1, int(count * val_fraction))
    chosen = {"train": np.sort(order[:num_train]), "val": np.sort(order[num_train:])}
    if not all(map(len, chosen.values())):
        raise ValueError(f"{source} must hold at least 2 samples, for train and val, got {count}")
    numbers = np.zeros(count, np.int64) if labels is None else _read_labels(Path(labels), count)
    hashes = "".join(sha256_of(path) for path in paths) + hashlib.sha256(numbers.tobytes()).hexdigest()
    description = StoreDescription(
        grid=grid,
        codebook_size=codebook_size,
        image_size=None,
        tokenizer=None,
        data=hashlib.sha256(f"{hashes} {len(of_train) if is_split else val_fraction}".encode()).hexdigest(),
        classes=tuple(map(str, range(int(numbers.max()) + 1))),
        samples={cast("Split", split): len(rows) for split, rows in chosen.items()},
    )
    starts = np.cumsum([0, *map(len, arrays)])
    with hold_lock(out, hint="give another --out"):
        parts = StoreParts(out, description, part_size=_PART_SIZE)
        for part in parts.parts():
            rows = chosen[part.split][part.start : part.stop]
            tokens = np.empty((len(rows), 1, math.prod(grid)), np.int64)
            for first, array in zip(starts, arrays, strict=False):
                is_of_array = (first <= rows) & (rows < first + len(array))
                tokens[is_of_array, 0] = array[rows[is_of_array] - first]
            parts.write(part, tokens, numbers[rows])
        parts.finish()
    return description


def _map_tokens(path: Path, grid: tuple[int, ...], codebook_size: int) -> npt.NDArray[Any]:
    """Maps an array of tokens (S, N) into memory, and checks it."""
    array, num_tokens = map_any_array(path), math.prod(grid)
    if array.dtype.kind not in "iu":
        raise ValueError(f"tokens {path} must be integers, got {array.dtype}; convert them with astype")
    if array.shape[1:] not in {(num_tokens,), grid}:
        sides = " x ".join(map(str, grid))
        raise ValueError(f"grid must fit the tokens of {path}, (S, {num_tokens}) for {sides}, got {array.shape}")
    least, largest = array.min(initial=0), array.max(initial=0)
    if least < 0 or largest >= codebook_size:
        raise ValueError(
            f"tokens {path} must be in [0, {codebook_size}), got {least} to {largest}; set --codebook-size to that of "
            "the tokenizer"
        )
    return array.reshape(-1, num_tokens)


def _read_labels(path: Path, count: int) -> npt.NDArray[np.int64]:
    """Reads the labels of all samples, (count,) int64."""
    try:
        labels = map_any_array(path) if path.suffix == ".npy" else np.loadtxt(path, np.int64, ndmin=1)
    except ValueError as error:
        raise ValueError(f"labels {path} must be integers, one per line: {error}") from error
    is_fit = labels.dtype.kind in "iu" and labels.shape == (count,)
    if not is_fit or labels.min() < 0 or labels.max() >= _MOST_CLASSES:
        raise ValueError(
            f"labels {path} must be {count} integers in [0, {_MOST_CLASSES}), one for each sample, got {labels.shape} "
            f"of {labels.dtype}{f' from {labels.min()} to {labels.max()}' if is_fit else ''}"
        )
    return labels.astype(np.int64)
