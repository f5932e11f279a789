import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from maskgit_pl.data.index import find_shards, index_shards


class Tars:
    """A writer of small tars, valid and invalid ones."""

    @staticmethod
    def png(value: int = 0, size: int = 8) -> bytes:
        buffer = io.BytesIO()
        Image.new("L", (size, size), value).save(buffer, "PNG")
        return buffer.getvalue()

    @staticmethod
    def write(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", **options) as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    def samples(self, count: int, *, start: int = 0, label: bool = True) -> list[tuple[str, bytes]]:
        """Returns the members of complete samples: KEY.png and KEY.cls, two blocks each."""
        return [
            (f"{number:04d}.{kind}", data)
            for number in range(start, start + count)
            for kind, data in (("png", self.png(number)), ("cls", b"%d" % (number % 3)))
            if label or kind == "png"
        ]


@contextmanager
def less_memory_than(limit: int) -> Iterator[None]:
    """Fails if Python allocates so many bytes at once in a ``with`` block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    data = header + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx(tmp_path):
    """A folder of IDX files: 12 + 5 images of 6 x 7; image i of train is filled with i."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, count, suffix in (("train", 12, ""), ("t10k", 5, ".gz")):
        images = np.arange(count, dtype=np.uint8)[:, None, None] + np.zeros((1, 6, 7), np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 3)
    return folder


@pytest.fixture(scope="session")
def tars() -> Tars:
    return Tars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder written by webdataset: train in two shards of 6 and 4 samples, val in one of 3."""
    for split, count in (("train", 10), ("val", 3)):
        with webdataset.ShardWriter(f"{tmp_path}/{split}-%06d.tar", maxcount=6, verbose=0) as writer:
            for number in range(count):
                sample = {"__key__": f"{number:04d}", "png": Tars.png(number), "cls": number % 5, "json": {"a": 1}}
                writer.write(sample)
    index_shards(tmp_path, {s: find_shards(tmp_path, f"{s}-*.tar") for s in ("train", "val")})
    return tmp_path
