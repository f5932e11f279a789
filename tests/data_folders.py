"""Writes data folders that `maskgit data` would refuse to make, and watches what is written to the disk."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.manifest import INDEX_DTYPE, ImageRange, Manifest, Shard, Split, save_manifest
from maskgit_pl.data.samples import Sample
from maskgit_pl.data.writer import write_shard


def save_data(
    folder: Path, splits: Mapping[Split, Sequence[tuple[bytes, int]]], *, classes: int = 3, shard_size: int = 10
) -> Path:
    """Writes a data folder with any image files and labels, like one that was damaged after it was indexed."""
    folder.mkdir(parents=True, exist_ok=True)
    names = tuple(f"class {number}" for number in range(classes))
    for split, samples in splits.items():
        rows = np.zeros(len(samples), INDEX_DTYPE)
        shards = []
        for first in range(0, len(samples), shard_size):
            path = folder / f"{split}-{len(shards):06d}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for number, (data, label) in enumerate(samples[first : first + shard_size], start=first):
                    for extension, content in (("jpg", data), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{number:08d}.{extension}")
                        member.size = len(content)
                        if extension == "jpg":
                            rows[number] = len(shards), tar.offset + tarfile.BLOCKSIZE, len(data), label
                        tar.addfile(member, io.BytesIO(content))
            count = min(shard_size, len(samples) - first)
            shards.append(Shard(path.name, path.stat().st_size, count, sha256(path.read_bytes()).hexdigest()))
        sizes = ImageRange(height=(8, 8), width=(8, 8), channels=(3,))
        digest = sha256(rows.tobytes()).hexdigest()
        save_manifest(Manifest(folder, split, tuple(shards), names, sizes, digest), rows)
    return folder


def write_split(samples: Iterable[Sample], folder: Path, split: Split, *, shard_size: int) -> None:
    """Writes samples to shards named ``SPLIT-%06d.tar``."""
    samples = list(samples)
    for shard, first in enumerate(range(0, len(samples), shard_size)):
        with open(folder / f"{split}-{shard:06d}.tar", "wb") as stream:
            write_shard(samples[first : first + shard_size], stream, first_key=first)


def save_samples(folder: Path, splits: Mapping[Split, Iterable[Sample]]) -> Path:
    """Writes samples to shards of 9 and indexes them."""
    for split, samples in splits.items():
        write_split(samples, folder, split, shard_size=9)
    index_shards(folder, {split: find_shards(folder, f"{split}-*.tar") for split in splits})
    return folder


def wide_image(number: int) -> torch.Tensor:
    """Returns (1, 4, 9) uint8, wider than high, so that crops differ."""
    return (number * 7 + torch.arange(36).reshape(1, 4, 9)).to(torch.uint8)


def save_wide_images(folder: Path, counts: Mapping[Split, int]) -> Path:
    """Writes a data folder of wide images; sample n has label n % 3."""
    png = lambda n: Sample(encode_png(wide_image(n)), "png", n % 3, f"{n}")  # noqa: E731  # one expression, named for the reader
    return save_samples(folder, {split: map(png, range(count)) for split, count in counts.items()})


def open_data(folder: Path, **options: object) -> ShardData:
    """Opens the data module of a folder, by default of grey images of 4 x 4 pixels in steps of 8 samples."""
    sizes = {"image_size": 4, "in_channels": 1, "global_batch": 8, "max_batch_per_device": 8, "validation_batch": 4}
    module = ShardData(ShardDataConfig(str(folder), **{**sizes, **options}))
    module.setup()
    return module


class OnRank:
    """The part of a Trainer that the data modules use."""

    def __init__(self, rank: int, world_size: int, step: int, *, accumulation: int = 1) -> None:
        self.global_rank, self.world_size, self.global_step = rank, world_size, step
        self.accumulate_grad_batches, self.lightning_module = accumulation, None


def top_row(images: torch.Tensor) -> torch.Tensor:
    """Encodes images as a tokenizer of four codes would: by their first row."""
    return images[:, 0, 0].long()


def spy_on_disk(monkeypatch: pytest.MonkeyPatch, on_call: Callable[[str, Path], None]) -> None:
    """Calls ``on_call(name, path)`` before each sync of a file or folder and before each rename."""
    fsync, rename = os.fsync, os.replace

    def spy_on_fsync(descriptor: int) -> None:
        on_call("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def spy_on_rename(source: Path, target: Path) -> None:
        on_call("rename", Path(target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_on_fsync)
    monkeypatch.setattr(os, "replace", spy_on_rename)
