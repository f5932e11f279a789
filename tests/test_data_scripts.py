import gzip
import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "data"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fashion():
    return load("fashion_mnist")


@pytest.fixture(scope="module")
def marble():
    return load("blue_marble")


def test_fashion_mnist_refuses_files_that_are_not_the_known_ones(fashion, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>")
    assert fashion.fault_of(tmp_path, "train-images-idx3-ubyte") == "wrong checksum"
    assert "gzip" in fashion.fault_of(tmp_path, "t10k-images-idx3-ubyte")
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte: missing"):
        fashion.convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fashion_mnist_unpacks_no_more_than_the_known_files_have(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "LARGEST", 2**20)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    assert fashion.fault_of(tmp_path, "train-images-idx3-ubyte") == "wrong checksum"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_fashion_mnist_without_any_source_names_the_ways_out(fashion, tmp_path, monkeypatch):
    def unreachable(folder):
        raise OSError("no route")

    monkeypatch.setattr(fashion, "from_mirrors", unreachable)
    monkeypatch.setattr(fashion, "from_debian", lambda folder: None)  # answers, but brings nothing
    with pytest.raises(FileNotFoundError, match=r"no route[\s\S]*missing[\s\S]*--source FOLDER"):
        fashion.fetch(tmp_path / "raw")


@pytest.mark.parametrize("size", [32, 64])
def test_blue_marble_splits_share_no_pixel(marble, size):
    tiles = marble.BlueMarbleTiles(np.full((2700, 5400, 3), 120, np.uint8), size).tiles
    owner = np.zeros((2700, 5400), np.uint8)
    for tile in tiles:
        owner[tile.top : tile.top + size, tile.left : tile.left + size] |= 1 + (tile.split == "val")
    assert set(np.unique(owner)) == {0, 1, 2}
    for split in ("train", "val"):
        assert {tile.label for tile in tiles if tile.split == split} == set(range(18))


def test_blue_marble_leaves_the_sea_out_and_knows_places(marble):
    assert not marble.BlueMarbleTiles(np.full((2700, 5400, 3), (2, 5, 30), np.uint8)).tiles
    places = {"Sahara": (23, 5), "Australia and New Zealand": (-25, 133), "Amazon": (-4, -62), "Europe": (48, 10)}
    for name, place in places.items():
        assert marble.CLASSES[marble.label_at(*place)] == name
    assert marble.label_at(-80, 0) is None


def test_blue_marble_refuses_another_picture(marble, tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="wrong checksum"):
        marble.convert(tmp_path / "x.jpg", tmp_path / "out")
