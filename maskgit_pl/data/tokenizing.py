"""Makes the token store of a data folder, with a tokenizer that the caller provides. Used by ``maskgit tokenize``.

Several processes write parts without locks, and the last one joins the parts:

1. Each part is one file in a hidden folder inside the store, which is named by a hash of the description and the size
   of the parts. A part gets its name when it is complete and on disk, so after a kill only unfinished ones are made.
2. When all parts are on disk, they are joined into the arrays. ``store.json`` is written last and completes the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskgit_pl.checks import ImageSize
from maskgit_pl.data.augmentations import CENTER, build_augmentations
from maskgit_pl.data.batches import Batch
from maskgit_pl.data.loader import ImageBatches, make_loader
from maskgit_pl.data.manifest import DESCRIPTION_FILE, ShardReader, Split, load_manifests, read_manifest_summary
from maskgit_pl.data.order import InOrder
from maskgit_pl.data.token_store import (
    FORMAT,
    StoreDescription,
    TokenizingConfig,
    Tokens,
    array_paths,
    is_complete,
    plain_description,
)
from maskgit_pl.files import parse_any_json, remove_partials, sha256_of, sync, write_atomically, write_text
from maskgit_pl.processes import Bars, no_bars

log = logging.getLogger(__name__)


def describe_store(
    path: str | Path, *, grid: tuple[int, int], codebook_size: int, tokenizer: str, image_size: ImageSize, **views: Any
) -> StoreDescription:
    """Describes a token store of the data folder ``path``, for ``tokenize``.

    For the arguments, see ``StoreDescription``; ``views`` are crops, flip, precision and augmentations.
    """
    summary = read_manifest_summary(path)
    return StoreDescription(
        grid, codebook_size, image_size, tokenizer, summary.fingerprint, summary.classes, dict(summary.samples), **views
    )


def tokenize(
    path: str | Path,
    store: str | Path,
    description: StoreDescription,
    *,
    encode: Callable[[Tensor], Tensor],
    in_channels: int,
    config: TokenizingConfig | None = None,
    ranks: tuple[int, int] = (0, 1),
    bars: Bars = no_bars,
) -> bool:
    """Makes the token store of a data folder, or resumes an interrupted one.

    1. Each rank takes its share of the parts of the store, without those that are already on disk.
    2. It encodes each part batch by batch and writes it as a whole. A batch is the same on every rank, so the
       store does not depend on ranks, workers or interruptions.
    3. The rank that finds all parts on disk joins them into the store.

    Args:
        path: The data folder.
        store: The folder of the store.
        description: The store, as ``describe_store`` describes it for this data folder.
        encode: Maps images (B, in_channels, H, W) uint8 on the CPU to tokens (B, N) int64 on any device.
        in_channels: Channels of the images for ``encode``, 1 or 3.
        config: Batches, workers and the budget of unreadable images.
        ranks: Rank of this process among those that share the work, and their number; they need not run at
            the same time.
        bars: Shows the progress of each split.

    Returns:
        True if the store is finished, False if other ranks have not finished their shares.

    Raises:
        ValueError: if shards differ from the manifest.
        DataBudgetError: if too many images are unreadable.
    """
    if is_complete(store, description):
        log.info("%s exists already, made by this tokenizer from these data", store)
        return True
    config, (rank, world_size) = config or TokenizingConfig(), ranks
    manifests = load_manifests(path, tuple(description.samples))
    readers = {split: ShardReader(manifest) for split, manifest in manifests.items()}
    parts = StoreParts(store, description, part_size=config.part_size)
    name = "" if world_size == 1 else f"rank {rank} of {world_size}: "
    encoded_rows, start = 0, time.monotonic()
    # 1. Every world_size-th part, so that all ranks have equally many; without those on disk.
    share = parts.parts()[rank::world_size]
    for split, reader in readers.items():
        mirrors = description.mirrors_of(split)
        of_split = [part for part in share if part.split == split]
        left = [part for part in of_split if not parts.is_done(part)]
        total, rows = (mirrors * sum(part.stop - part.start for part in some) for some in (of_split, left))
        advance = bars(f"{name}tokens of {split}", total, done=total - rows, unit="images")
        # 2. Encode and write the parts.
        for part, batches in _read_parts(reader, left, description, in_channels=in_channels, config=config):
            columns = []
            for batch in batches:
                replaced = torch.stack([batch.index, batch.replacement], dim=1)[batch.replacement >= 0]
                views = (batch.content, batch.content.flip(-1))[:mirrors]
                tokens = torch.stack([encode(view).cpu() for view in views], dim=1)  # (B, mirrors, N)
                columns.append((tokens, batch.labels, replaced))
                advance(mirrors * len(batch.labels))
            parts.write(part, *(torch.cat(column).numpy() for column in zip(*columns, strict=True)))
        encoded_rows += rows
    # 3. Join the parts.
    is_made = parts.finish()
    seconds = max(time.monotonic() - start, 1e-9)
    log.info("%s: %s%d images in %.1f s, %.0f images/s", store, name, encoded_rows, seconds, encoded_rows / seconds)
    if not is_made:
        log.info("%s: the share of rank %d of %d is done; the last rank finishes", store, rank, world_size)
    return is_made


class Part(NamedTuple):
    """A part of a store: one crop of the samples [start, stop) of a split. A killed process loses at most one part."""

    split: Split
    crop: int
    start: int
    stop: int


class StoreParts:
    """An unfinished store and its parts, of ``part_size`` samples each; its folder is made if it is missing."""

    def __init__(self, folder: str | Path, description: StoreDescription, *, part_size: int) -> None:
        self.folder = Path(folder)
        self.description = description
        self.part_size = part_size
        # The name of the folder identifies what its parts belong to.
        content = [{"format": FORMAT, **plain_description(description)}, part_size]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._parts = self.folder / f".parts-{key[:16]}"
        self._parts.mkdir(parents=True, exist_ok=True)

    def parts(self) -> list[Part]:
        """Returns all parts of all splits."""
        return [
            Part(split, crop, start, min(start + self.part_size, count))
            for split, count in self.description.samples.items()
            for crop in range(self.description.crops_of(split))
            for start in range(0, count, self.part_size)
        ]

    def is_done(self, part: Part) -> bool:
        """Returns whether a part is on disk."""
        return self._path(part).is_file()

    def write(
        self,
        part: Part,
        tokens: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        replaced: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Writes a part.

        Args:
            part: One of ``parts()``.
            tokens: (stop - start, mirrors, N) integers in [0, codebook_size).
            labels: (stop - start,) int64 in [0, num_classes).
            replaced: (k, 2) int64, unreadable samples and those that are encoded in their place; None without any.
        """
        assert 0 <= tokens.min() <= tokens.max() < self.description.codebook_size  # the smaller type would wrap it
        replaced = np.zeros((0, 2), np.int64) if replaced is None else replaced
        with write_atomically(self._path(part)) as file:
            for array in (tokens.astype(self.description.dtype), labels, replaced):
                np.save(file, array, allow_pickle=False)

    def finish(self) -> bool:
        """Joins the parts into the store, if all are on disk.

        1. If a part is missing, return whether another process has finished the store.
        2. Join the parts of each split into its arrays.
        3. Write ``store.json`` with the hashes of the arrays.
        4. Remove the parts, also those of other sizes and descriptions, and unfinished files.

        Two processes that join at the same time write the same bytes. The slower one may find the parts, or its own
        unfinished file, already removed; then the store must be complete.

        Returns:
            True if the store is finished.
        """
        try:
            if all(self.is_done(part) for part in self.parts()):
                replaced = {split: pairs for split in self.description.samples if (pairs := self._join(split))}  # 2.
                paths = [path for split in self.description.samples for path in array_paths(self.folder, split)]
                hashes = {path.stem: sha256_of(path) for path in paths}
                content = {"format": FORMAT, **plain_description(self.description), "sha256": hashes}
                content |= {"replaced": replaced} if replaced else {}
                sync(self.folder)  # the arrays are on disk under their names
                write_text(self.folder / DESCRIPTION_FILE, json.dumps(content, indent=1) + "\n")  # 3.
                sync(self.folder)
            elif not is_complete(self.folder, self.description):  # 1.
                return False
        except FileNotFoundError:
            if not is_complete(self.folder, self.description):
                raise
        for parts in self.folder.glob(".parts-*"):  # 4.
            shutil.rmtree(parts, ignore_errors=True)
        remove_partials(self.folder)
        return True

    def _join(self, split: Split) -> list[list[int]]:
        """Writes the arrays of a split, with the tokens of one part in memory at a time; returns what was replaced."""
        count, crops = self.description.samples[split], self.description.crops_of(split)
        tokens_path, labels_path = array_paths(self.folder, split)
        labels, replaced = np.empty(count, np.int64), []
        with write_atomically(tokens_path) as file:
            shape = count * self.description.views(split), self.description.num_tokens
            header = {"descr": self.description.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for first in (part for part in self.parts() if part.split == split and part.crop == 0):
                read = [self._read(first._replace(crop=crop)) for crop in range(crops)]
                # (samples, crops, mirrors, N) in row-major order: view v of a sample is crop v // mirrors
                file.write(np.stack([tokens for tokens, _, _ in read], axis=1).tobytes())
                _, labels[first.start : first.stop], pairs = read[0]  # the same for all crops
                replaced += pairs.tolist()
        with write_atomically(labels_path) as file:
            np.save(file, labels, allow_pickle=False)
        return replaced

    def _read(self, part: Part) -> tuple[Tokens, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns tokens, labels, and pairs (k, 2) of replaced samples and their replacements."""
        with open(self._path(part), "rb") as file:
            tokens, labels, replaced = (np.load(file, allow_pickle=False) for _ in range(3))
        return tokens, labels, replaced

    def _path(self, part: Part) -> Path:
        return self._parts / f"{part.split}-{part.crop}-{part.start:010d}.npy"


def _read_parts(
    reader: ShardReader,
    parts: Sequence[Part],
    description: StoreDescription,
    *,
    in_channels: int,
    config: TokenizingConfig,
) -> Iterator[tuple[Part, Iterator[Batch]]]:
    """Yields each part with its batches, crop by crop. Consume the batches of a part before the next part."""
    listed = description.augmentations
    augmentations = build_augmentations(parse_any_json(listed, "augmentations") if listed else ["random_crop"])
    size = config.batch_size
    assert description.image_size is not None  # of ``describe_store``
    # One loader per crop and not per part: its workers keep decoding at the border between parts.
    for crop in sorted({part.crop for part in parts}):
        # No batch spans two parts, so batches do not depend on the ranks.
        ranges = {
            part: [range(first, min(first + size, part.stop)) for first in range(part.start, part.stop, size)]
            for part in parts
            if part.crop == crop
        }
        images = ImageBatches(
            reader,
            InOrder(len(reader), epoch=crop),  # which determines a random crop
            image_size=description.image_size,
            in_channels=in_channels,
            augmentations=augmentations if crop else CENTER,
        )
        workers, budget = config.num_workers or 0, config.unreadable_budget
        order = [positions for of_part in ranges.values() for positions in of_part]
        batches = iter(make_loader(images, order, num_workers=workers, unreadable_budget=budget))
        for part, of_part in ranges.items():
            yield part, islice(batches, len(of_part))
