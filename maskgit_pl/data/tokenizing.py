"""Makes the token store of a data folder, with a tokenizer that the caller provides. Used by ``maskgit tokenize``.

Several processes write parts without locks, and the last one joins the parts:

1. Each part is one file in a hidden folder inside the store. The folder is named by a hash of the description, so parts
   of another description or another part size are never used.
2. A part gets its name when it is complete and on disk. Processes that divide the parts among themselves need no
   locks, and after a kill only unfinished parts are made again.
3. When all parts are on disk, they are joined into the arrays. ``store.json`` is written last and completes the store.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from maskgit_pl.checks import ImageSize, check_integer, height_width, pixels_text
from maskgit_pl.data.augmentations import CENTER, Augmentations, build_augmentations
from maskgit_pl.data.batches import Batch, ImageBatches, make_loader
from maskgit_pl.data.manifest import ImageRange, Split, check_vectors, load_manifest, read_manifest_summary
from maskgit_pl.data.order import Rows
from maskgit_pl.data.reader import ShardReader
from maskgit_pl.data.samples import check_budget
from maskgit_pl.data.token_store import (
    DESCRIPTION_FILE,
    FORMAT,
    StoreDescription,
    Tokens,
    array_paths,
    is_complete,
    outside_range,
    plain_description,
    read_description,
)
from maskgit_pl.data.vectors import vectors_path, write_vectors
from maskgit_pl.files import parse_any_json, sha256_of, sync, write_atomically

__all__ = ["Outcome", "Part", "StoreParts", "TokenizingConfig", "describe_store", "tokenize"]

Outcome = Literal["found", "made", "incomplete"]


@dataclass(frozen=True)
class TokenizingConfig:
    """The settings of the execution of ``tokenize``. The tokens do not depend on them.

    Args:
        batch_size: Number of images encoded at a time.
        part_size: Number of images written to disk at a time; a killed process loses at most one part.
        num_workers: Number of processes that decode images; 0 decodes in this process.
        rank: Number of this process among those that share the work, in [0, world_size).
        world_size: Number of processes that share the work; they need not run at the same time.
        unreadable_budget: Fraction of unreadable images that may be replaced, in [0, 1]; see ``UnreadableImages``.

    Raises:
        ValueError: if a number is out of range.
    """

    batch_size: int = 256
    part_size: int = 1024
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1
    unreadable_budget: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "part_size", "world_size"):
            check_integer(f"tokenize {name}", getattr(self, name), "[1, inf)")
        check_integer("tokenize num_workers", self.num_workers, "[0, 1024]")
        check_integer("tokenize rank", self.rank, f"[0, {self.world_size - 1}]")
        check_budget(self.unreadable_budget)


def describe_store(
    path: str | Path,
    *,
    grid: tuple[int, int],
    codebook_size: int,
    tokenizer: str,
    image_size: ImageSize,
    **views: Any,
) -> StoreDescription:
    """Describes a token store of a data folder, for ``tokenize``.

    Args:
        path: The data folder.
        grid: Height and width of the token grid.
        codebook_size: Codebook size.
        tokenizer: Fingerprint of the tokenizer's weights.
        image_size: Size of the images that the tokenizer encodes: a side, or (height, width).
        views: The views of an image and the precision: the fields ``crops``, ``flip``, ``precision`` and
            ``augmentations`` of ``StoreDescription``.

    Raises:
        ValueError: if a number is out of range, or ``crops`` is above 1 although all images have the shape of the
            crops.
    """
    summary = read_manifest_summary(path)
    if views.get("crops", 1) > 1 and not views.get("augmentations"):
        _check_crops(summary.images, image_size)
    samples = cast("dict[Split, int]", dict(summary.samples))
    kind = summary.vectors
    return StoreDescription(
        grid,
        codebook_size,
        image_size,
        tokenizer,
        summary.fingerprint,
        summary.classes,
        samples,
        vector_dim=0 if kind is None else kind.dim,
        vector_dtype="" if kind is None else kind.dtype,
        **views,
    )


def tokenize(
    path: str | Path,
    store: str | Path,
    description: StoreDescription,
    *,
    encode: Callable[[Tensor], Tensor],
    in_channels: int,
    config: TokenizingConfig = TokenizingConfig(),  # frozen
    on_rows: Callable[[Split, int, int], object] = lambda split, rows, total: None,
) -> Outcome:
    """Makes the token store of a data folder, or resumes an interrupted one.

    1. Each rank takes its share of the parts of the store, without those that are already on disk.
    2. It encodes each part batch by batch and writes it as a whole. A batch is the same on every rank, so the store
       does not depend on ranks, workers or interruptions.
    3. The rank that finds all parts on disk joins them into the store.

    Args:
        path: The data folder.
        store: The folder of the store.
        description: The store, as ``describe_store`` describes it for this data folder.
        encode: Maps images (B, in_channels, H, W) uint8 on the CPU to tokens (B, N) int64 on any device.
        in_channels: Channels of the images for ``encode``, 1 or 3.
        config: Batches, processes and the budget of unreadable images.
        on_rows: Called with the split, the number of rows that were just finished (first those of an earlier run), and
            this rank's number of rows of that split.

    Returns:
        ``"found"`` if the store exists already; ``"made"`` if it is finished now; ``"incomplete"`` if this rank has
        finished its share and other ranks have not.

    Raises:
        ValueError: if shards or vectors differ from the manifest.
        DataBudgetError: if too many images are unreadable.
    """
    if is_complete(store, description):
        return "found"
    readers = {split: _open_split(path, split) for split in description.samples}
    parts = StoreParts(store, description, part_size=config.part_size)
    # Every world_size-th part, so that all ranks have equally many.
    share = parts.parts()[config.rank :: config.world_size]
    for split, reader in readers.items():
        reading = _PartReader(reader, description, in_channels, config)
        mirrors = description.mirrors_of(split)
        # 1. The parts that are not on disk yet.
        own = [part for part in share if part.split == split]
        left = [part for part in own if not parts.is_done(part)]
        total = _count_rows(own, mirrors)
        on_rows(split, total - _count_rows(left, mirrors), total)
        # 2. Encode and write the parts.
        for part, batches in reading.by_part(left):
            encoded = []
            for batch in batches:
                columns = [_encode(batch.content, encode, mirrors), batch.labels]
                encoded.append(columns if batch.vectors is None else [*columns, batch.vectors])
                on_rows(split, mirrors * len(batch.labels), total)
            parts.write(part, *(torch.cat(column).numpy() for column in zip(*encoded, strict=True)))
    # 3. Join the parts.
    return "made" if parts.finish() else "incomplete"


class Part(NamedTuple):
    """A part of a store: one crop of the samples [start, stop) of a split. A killed process loses at most one part."""

    split: Split
    crop: int
    start: int
    stop: int


class StoreParts:
    """An unfinished store and its parts.

    The finished store does not depend on which process wrote which part, or on interruptions.

    Args:
        folder: The store; it is made if it is missing. A finished store of another description becomes invalid: its
            ``store.json`` is removed.
        description: Description of the store; parts of another description are removed.
        part_size: Number of samples in a part, at least 1; parts of another size are removed.

    Raises:
        ValueError: if ``part_size`` is not an integer of at least 1.
    """

    def __init__(self, folder: str | Path, description: StoreDescription, *, part_size: int) -> None:
        check_integer("part_size", part_size, "[1, inf)")
        self.folder = Path(folder)
        self.description = description
        self.part_size = part_size
        # The name of the folder identifies what its parts belong to.
        content = [_to_json(description), part_size]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._parts = self.folder / f".parts-{key[:16]}"
        self._parts.mkdir(parents=True, exist_ok=True)
        for other in self.folder.glob(".parts-*"):
            if other != self._parts:
                shutil.rmtree(other, ignore_errors=True)
        if not self._is_described():  # not in finish(): another process may have just written it
            (self.folder / DESCRIPTION_FILE).unlink(missing_ok=True)

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
        vectors: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Writes a part.

        Args:
            part: One of ``parts()``.
            tokens: (stop - start, mirrors, N) integers in [0, codebook_size).
            labels: (stop - start,) int64 in [0, num_classes).
            vectors: (stop - start, C) float32, if the description has vectors.

        Raises:
            ValueError: if a shape is wrong, or a token or a label is out of range.
        """
        shape = self._shape(part)
        if tokens.shape != shape or labels.shape != shape[:1]:
            raise ValueError(
                f"tokens of {part} must be {shape} and labels {shape[:1]}, got {tokens.shape} and {labels.shape}"
            )
        self._check_ranges(tokens, labels)
        self._check_vectors(part, vectors)
        with self._replace_file(self._path(part)) as file:
            np.save(file, tokens.astype(self.description.dtype), allow_pickle=False)
            np.save(file, labels.astype(np.int64), allow_pickle=False)
            if vectors is not None:  # float16 vectors come back to the same bits
                np.save(file, vectors.astype(self.description.vector_dtype), allow_pickle=False)

    def finish(self) -> bool:
        """Joins the parts into the store, if all are on disk.

        1. If a part is missing, return whether another process has finished the store.
        2. Join the parts of each split into its arrays.
        3. Write ``store.json`` with the hashes of the arrays.
        4. Remove the parts, if the store is complete.

        Two processes that join at the same time write the same bytes. The slower one may find the parts already
        removed; then the store must be complete.

        Returns:
            True if the store is finished.

        Raises:
            ValueError: if a part is damaged; it is removed, so that the next run makes it again.
        """
        try:
            if not all(self.is_done(part) for part in self.parts()):  # 1.
                return is_complete(self.folder, self.description)
            for split in self.description.samples:  # 2.
                self._join(split)
            hashes = {path.stem: sha256_of(path) for path in self.description.files(self.folder)}
            described = _to_json(self.description) | {"sha256": hashes}
            with self._replace_file(self.folder / DESCRIPTION_FILE) as file:  # 3.
                file.write((json.dumps(described, indent=1) + "\n").encode())
        except FileNotFoundError:
            if not is_complete(self.folder, self.description):
                raise
        finally:
            if is_complete(self.folder, self.description):  # 4.
                shutil.rmtree(self._parts, ignore_errors=True)
        return True

    def _is_described(self) -> bool:
        try:
            return read_description(self.folder) == self.description
        except (FileNotFoundError, ValueError):
            return False

    def _join(self, split: Split) -> None:
        """Writes the arrays of a split, with the samples of one part in memory at a time."""
        count, views = self.description.samples[split], self.description.views(split)
        starts = [part.start for part in self.parts() if part.split == split and part.crop == 0]
        tokens_path, labels_path = array_paths(self.folder, split)
        with self._replace_file(tokens_path) as file:
            _write_header(file, (count * views, self.description.num_tokens), self.description.dtype)
            # (samples, crops, mirrors, N) in row-major order: view v of a sample is crop v // mirrors
            for start in starts:
                file.write(self._rows(split, start)[0].tobytes())
        with self._replace_file(labels_path) as file:
            _write_header(file, (count,), np.dtype(np.int64))
            for start in starts:
                file.write(self._rows(split, start)[1].tobytes())
        if self.description.vectors is not None:
            blocks = (vectors for start in starts if (vectors := self._rows(split, start)[2]) is not None)
            with self._replace_file(vectors_path(self.folder, split)) as file:
                write_vectors(file, self.description.vectors, count, blocks)

    def _rows(self, split: Split, start: int) -> _Rows:
        """Returns tokens (samples, crops, mirrors, N), labels and vectors of a part's samples, for all crops."""
        stop = min(start + self.part_size, self.description.samples[split])
        parts = [Part(split, crop, start, stop) for crop in range(self.description.crops_of(split))]
        read = [self._read(part) for part in parts]
        return _Rows(np.stack([rows.tokens for rows in read], axis=1), *read[0][1:])

    def _read(self, part: Part) -> _Rows:
        path = self._path(part)
        vectors = None
        try:
            with open(path, "rb") as file:
                tokens, labels = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
                if self.description.vectors is not None:
                    vectors = np.load(file, allow_pickle=False)
            if tokens.shape != self._shape(part) or tokens.dtype != self.description.dtype:
                raise ValueError(f"{self._shape(part)} expected, got {tokens.shape} of {tokens.dtype}")
            if labels.shape != tokens.shape[:1] or labels.dtype != np.int64:
                raise ValueError(f"{tokens.shape[:1]} labels expected, got {labels.shape} of {labels.dtype}")
            self._check_ranges(tokens, labels)
            self._check_vectors(part, vectors)
        # A damaged part is removed, so that the same command makes it again.
        except (EOFError, ValueError) as error:
            path.unlink(missing_ok=True)
            raise ValueError(
                f"token store {self.folder}: its part {path.name} is damaged ({error}) and was removed; "
                "run the same command again to make it"
            ) from error
        return _Rows(tokens, labels, vectors)

    def _check_vectors(self, part: Part, vectors: npt.NDArray[Any] | None) -> None:
        dim = self.description.vector_dim
        expected = (part.stop - part.start, dim) if dim else None
        found = None if vectors is None else vectors.shape
        if found != expected:
            raise ValueError(f"vectors of {part} must be {expected}, got {found}")

    def _check_ranges(self, tokens: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        ranges = (("tokens", tokens, self.description.codebook_size), ("labels", labels, len(self.description.classes)))
        for name, values, limit in ranges:
            if outside_range(values, limit).any():
                raise ValueError(f"{name} must be in [0, {limit}), got {values.min()} to {values.max()}")

    def _shape(self, part: Part) -> tuple[int, int, int]:
        return part.stop - part.start, self.description.mirrors_of(part.split), self.description.num_tokens

    def _path(self, part: Part) -> Path:
        return self._parts / f"{part.split}-{part.crop}-{part.start:010d}.npy"

    @contextmanager
    def _replace_file(self, path: Path) -> Iterator[IO[bytes]]:
        """Opens a file that replaces ``path`` when it is complete and on disk.

        Unfinished files lie in the folder of the parts, so they are removed with it.
        """
        with write_atomically(path, partial_in=self._parts) as file:
            yield file
        sync(path.parent)  # the rename is on disk before any step that relies on it


class _Rows(NamedTuple):
    tokens: Tokens
    labels: npt.NDArray[np.int64]
    vectors: npt.NDArray[Any] | None


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)


def _to_json(description: StoreDescription) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **plain_description(description)}))
    return content


def _open_split(path: str | Path, split: Split) -> ShardReader:
    """Opens the shards of a split, after a check of its vectors, since the store gets hashes of what is read.

    Raises:
        ValueError: if shards or vectors differ from the manifest.
    """
    manifest = load_manifest(path, split)
    if manifest.vectors is not None:
        check_vectors(manifest)
    return ShardReader(manifest)


@dataclass(frozen=True)
class _PartReader:
    """A reader of the images of a split, in the batches in which they are encoded."""

    reader: ShardReader
    description: StoreDescription
    in_channels: int
    config: TokenizingConfig

    def by_part(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Iterator[Batch]]]:
        """Yields each part with its batches, crop by crop. Consume the batches of a part before the next part."""
        # One loader per crop and not per part: its workers keep decoding at the border between parts.
        for crop in sorted({part.crop for part in parts}):
            order = _PartOrder([part for part in parts if part.crop == crop], self.config.batch_size)
            batches = self._batches(order, crop)
            for part in order.parts:
                yield part, islice(batches, len(order.batches(part)))

    def _batches(self, order: _PartOrder, crop: int) -> Iterator[Batch]:
        images = ImageBatches(
            self.reader,
            _CropOrder(crop),
            image_size=self.description.image_size,
            in_channels=self.in_channels,
            augmentations=_augmentations_of(self.description) if crop else CENTER,
            vectors=self.reader.vector_reader,
        )
        return iter(
            make_loader(
                images,
                order,
                num_workers=self.config.num_workers,
                pin_memory=torch.cuda.is_available(),
                unreadable_budget=self.config.unreadable_budget,
            )
        )


class _CropOrder:
    """An order whose positions are the samples. The number of the crop is the epoch, which determines a random crop."""

    def __init__(self, crop: int) -> None:
        self.crop = crop

    def __call__(self, positions: range) -> Rows:
        """Returns the samples at some positions."""
        index = torch.arange(positions.start, positions.stop)
        return Rows(index, torch.full_like(index, self.crop), index, torch.ones_like(index, dtype=torch.bool))


class _PartOrder(Sampler[range]):
    """A sampler of the batches of some parts. No batch spans two parts, so batches do not depend on the ranks."""

    def __init__(self, parts: Sequence[Part], batch_size: int) -> None:
        self.parts = parts
        self.batch_size = batch_size

    def __len__(self) -> int:
        return sum(len(self.batches(part)) for part in self.parts)

    def __iter__(self) -> Iterator[range]:
        return (positions for part in self.parts for positions in self.batches(part))

    def batches(self, part: Part) -> list[range]:
        """Returns the positions of each batch of a part."""
        starts = range(part.start, part.stop, self.batch_size)
        return [range(start, min(start + self.batch_size, part.stop)) for start in starts]


def _encode(images: Tensor, encode: Callable[[Tensor], Tensor], mirrors: int) -> Tensor:
    """Encodes images (B, C, H, W) uint8, and mirrored ones if ``mirrors`` is 2, to (B, mirrors, N) int64 on the CPU."""
    views = [images, images.flip(-1)][:mirrors]
    return torch.stack([encode(view).cpu() for view in views], dim=1)


def _augmentations_of(description: StoreDescription) -> Augmentations:
    """Returns the augmentations of all crops after the central one."""
    listed = description.augmentations
    return build_augmentations(parse_any_json(listed, "augmentations") if listed else ["random_crop"])


def _check_crops(images: ImageRange, image_size: ImageSize) -> None:
    """Checks that the images do not all have the shape of the crops, for which all crops would be equal."""
    (height, width), (rows, columns) = (images.height[0], images.width[0]), height_width(image_size)
    is_one_size = (images.height[1], images.width[1]) == (height, width)
    if is_one_size and height * columns == width * rows:
        raise ValueError(
            f"tokenize crops must be 1 if all images have the shape of the crops, got more for "
            f"{pixels_text((height, width))} pixels; shards made without --image-size keep images of other shapes"
        )


def _count_rows(parts: Sequence[Part], mirrors: int) -> int:
    return mirrors * sum(part.stop - part.start for part in parts)
