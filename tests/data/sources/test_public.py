"""The public data sets: what is accepted as their files, what they contain, and what a failed download says."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.cli import main
from maskgit_pl.data.images import decode_image
from maskgit_pl.data.sources import public
from maskgit_pl.data.sources.public import IdxFiles, public_datasets
from maskgit_pl.data.sources.shards import open_source
from tests.data.conftest import less_memory_than


@pytest.fixture
def fashion():
    return public_datasets()["fashion-mnist"]


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Lets every command and address fail, as without a network."""

    def unreachable(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(public.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(public.subprocess, "run", unreachable)
    monkeypatch.chdir(tmp_path)


def test_fashion_mnist_refuses_files_that_are_not_the_known_ones(fashion, idx):
    with pytest.raises(ValueError, match=r"must have the four files of Fashion-MNIST, got other images or labels"):
        fashion.open(idx)
    (idx / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>")
    with pytest.raises(
        ValueError, match=r"t10k-images-idx3-ubyte\.gz must hold 1 byte to 1.07 GB in 3 dim.* b'<html>'"
    ):
        fashion.open(idx)


@pytest.mark.usefixtures("no_network")
def test_a_failed_download_names_the_ways_out_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(public.shutil, "which", lambda program: f"/usr/bin/{program}")
    for name, source in (("fashion-mnist", "FOLDER"), ("blue-marble", "FILE"), ("emoji", "FOLDER")):
        assert main(["data", "fetch", name]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("maskgit data"))
        assert "no route to host" in line
        assert f"pass --source {source}" in line
    assert not Path("data/shards").exists()


def test_the_known_files_become_shards_once(tmp_path, monkeypatch, capsys):
    # Small files with the hashes of their own, since the real ones are not in the repository.
    raw = tmp_path / "data" / "raw" / "fashion-mnist"
    raw.mkdir(parents=True)
    images, labels = np.arange(40 * 784, dtype=np.uint32).astype(np.uint8).reshape(40, 28, 28), np.arange(40) % 10
    for name in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(public, "_HASHES", IdxFiles(raw).hashes)
    monkeypatch.chdir(tmp_path)
    words = ["data", "fetch", "fashion-mnist"]
    assert main(words) == 0
    assert "data/shards/fashion-mnist: made" in capsys.readouterr().out
    assert main(words) == 0
    assert "complete already" in capsys.readouterr().out


def test_idx_files_keep_order_pixels_and_class_names(idx):
    source = IdxFiles(idx, classes=["a", "b", "c"])
    samples = list(source.samples("train", range(12)))
    images = torch.stack([decode_image(sample.data, channels=1, name="x") for sample in samples])
    assert images.shape == (12, 1, 6, 7)
    assert images[:, 0, 0, 0].tolist() == list(range(12))
    assert [sample.label for sample in samples] == [0, 1, 2] * 4
    assert (source.classes, source.counts) == (("a", "b", "c"), {"train": 12, "val": 5})
    with pytest.raises(ValueError, match=r"^val_fraction must not be set .* a train and a val split"):
        open_source(idx, val_fraction=0.5)


def idx_header(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (idx_header(5, 6, 7) + bytes(2**24), r"the 210 values of \(5, 6, 7\), got more"),
        (idx_header(2**31, 6, 7), "must hold 1 byte to 1.07 GB in 3 dimensions"),
        (idx_header(5, 0, 7), "must hold 1 byte to 1.07 GB in 3 dimensions"),
        (idx_header(5, 6, 7) + bytes(9), r"the 210 values of \(5, 6, 7\), got 9"),
        (b"\0\0\x0d\3" + bytes(2**24), "must hold 1 byte to 1.07 GB in 3 dimensions"),
    ],
    ids=["a small header", "a large one", "an empty one", "few values", "no header"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_no_more_of_an_idx_file_is_unpacked_than_its_header_says(idx, content, text, packed):
    (idx / "t10k-images-idx3-ubyte.gz").unlink()
    path = idx / f"t10k-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    match = rf"IDX file \S+t10k-images-idx3-ubyte\S* .*{text}"
    with less_memory_than(2**20), pytest.raises(ValueError, match=match):
        open_source(idx)


def test_an_idx_file_that_is_cut_or_missing_is_named(idx):
    path = idx / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz must be a complete file"):
        open_source(idx)
    path.unlink()
    with pytest.raises(ValueError, match=r"must have the four IDX files, got no t10k-images"):
        open_source(idx)
