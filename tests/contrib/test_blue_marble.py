"""Blue Marble: its tiles, split by place."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.contrib.blue_marble import DATASETS, BlueMarbleTiles, label_at

TILES = {  # size -> SHA-256 of place, class and split of all tiles of EARTH in their order; shards that exist have them
    32: "0e671b3d4522e1ecea7099d57134eff363da0324ae4aa7d03bcd02be88d4854b",
    64: "4ed10ba08b2dd263625be04776c153a868f76c035f6a11431dc3ae32c033e941",
}
EARTH = np.random.default_rng(0).integers(0, 256, (45, 90, 3), dtype=np.uint8).repeat(60, 0).repeat(60, 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_blue_marble_has_the_tiles_that_it_always_had(size):
    source = BlueMarbleTiles(EARTH, size)
    assert source.describe()["tiles"] == TILES[size]
    first = next(tile for tile in source.tiles if tile.split == "train")
    sample = next(iter(source.samples("train", range(1))))
    expected = EARTH[first.top : first.top + size, first.left : first.left + size]
    assert np.array_equal(np.asarray(Image.open(BytesIO(sample.data))), expected)
    assert sample.label == first.label


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_blue_marble_splits_share_no_pixel(size):
    tiles = BlueMarbleTiles(np.full((2700, 5400, 3), 120, np.uint8), size).tiles
    owner = np.zeros((2700, 5400), np.uint8)
    for tile in tiles:
        owner[tile.top : tile.top + size, tile.left : tile.left + size] |= 1 + (tile.split == "val")
    assert set(np.unique(owner)) == {0, 1, 2}
    for split in ("train", "val"):
        assert {tile.label for tile in tiles if tile.split == split} == set(range(18))


@pytest.mark.slow
def test_blue_marble_leaves_the_sea_out_and_knows_places():
    assert not BlueMarbleTiles(np.full((2700, 5400, 3), (2, 5, 30), np.uint8)).tiles
    places = {"Sahara": (23, 5), "Australia and New Zealand": (-25, 133), "Amazon": (-4, -62), "Europe": (48, 10)}
    for name, place in places.items():
        assert BlueMarbleTiles.classes[label_at(*place)] == name
    assert label_at(-80, 0) is None


def test_blue_marble_refuses_another_picture(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="wrong checksum"):
        DATASETS[0].open(tmp_path / "x.jpg")
