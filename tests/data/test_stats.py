import io

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.data.index import index_shards
from maskgit_pl.data.manifest import load_manifest
from maskgit_pl.data.stats import images_of_classes, read_statistics
from tests.data_folders import save_data


def test_classes_and_sizes_are_counted(tars, tmp_path):
    sizes = [8, 8, 8, 16, 64]
    members = [
        (f"{number}.{kind}", data)
        for number, size in enumerate(sizes)
        for kind, data in (("png", tars.png(number, size=size)), ("cls", b"%d" % (2 * (number % 2))))
    ]
    train, val = tars.write(tmp_path / "a.tar", members), tars.write(tmp_path / "b.tar", tars.samples(3))
    index_shards(tmp_path, {"train": [train], "val": [val]})
    statistics = read_statistics(tmp_path)
    assert {split: counts.tolist() for split, counts in statistics.classes.items()} == {
        "train": [3, 0, 2],
        "val": [1, 1, 1],
    }
    assert (statistics.medians, statistics.measured) == ((8, 8), 5)
    assert sum(bar.images for bar in statistics.short_sides) == 5
    assert statistics.short_sides[0][:2] == (8, 14)
    assert statistics.short_sides[0].images == 3
    assert statistics.short_sides[-1].high == 64


def test_first_images_of_each_class(folder):
    rows = list(images_of_classes(load_manifest(folder, "train"), [0, 4, 9], each=3))
    values = [[np.asarray(Image.open(io.BytesIO(data)))[0, 0] for data, _ in row] for row in rows]
    assert values == [[0, 5], [4, 9], []]


def test_a_label_that_is_no_class_is_refused_and_not_counted_up_to(tmp_path):
    folder = save_data(tmp_path, {"train": [(b"", 2**31 - 1)]})
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        read_statistics(folder)


def test_a_folder_without_train_says_so(tmp_path):
    folder = save_data(tmp_path, {"val": [(b"", 0)]})
    with pytest.raises(FileNotFoundError, match=r"no manifest train\.json"):
        read_statistics(folder)
