"""Duplicates within and across splits, against a comparison of all pairs."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.data.index import index_shards
from maskgit_pl.data.manifest import load_manifest
from maskgit_pl.data.stats import Duplicates, find_duplicates, images_of_classes, read_statistics
from maskgit_pl.data.verify import duplicate_lines
from tests.cli.commands import call_command
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
    assert statistics.medians == (8, 8)


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


def png(number: int, *, level: int = 6) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 4, (8, 8, 3), np.uint8) * 80  # levels of compression differ
    Image.fromarray(noise).save(file, "PNG", compress_level=level)
    return file.getvalue()


def find(folder: Path, train: Sequence[tuple[bytes, int]], val: Sequence[tuple[bytes, int]], **options) -> Duplicates:
    save_data(folder, {"train": train, "val": val})
    return find_duplicates({split: load_manifest(folder, split) for split in ("train", "val")}, **options)


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_are_those_of_a_comparison_of_all_pairs(tmp_path, seed):
    generator = np.random.default_rng(seed)
    numbers = generator.integers(0, 25, 40).tolist()
    labels = generator.integers(0, 3, 40).tolist()
    samples = [(png(number), label) for number, label in zip(numbers, labels, strict=True)]
    found = find(tmp_path / "data", samples[:28], samples[28:])
    first = [numbers.index(number) for number in numbers]
    repeats = [place for place in range(40) if first[place] < place]
    assert found.repeated["train"] == sum(place < 28 for place in repeats)
    assert found.val_in_train == sum(place >= 28 and first[place] < 28 for place in repeats)
    assert found.repeated["val"] == sum(first[place] >= 28 for place in repeats)
    assert found.other_label == sum(labels[place] != labels[first[place]] for place in repeats)
    assert found.images == {"train": 28, "val": 12}
    assert found.share_of_val == found.val_in_train / 12


def test_pairs_have_the_names_of_the_images_in_their_tars(tmp_path):
    found = find(tmp_path / "data", [(png(0), 0), (png(1), 0), (png(0), 1)], [(png(1), 0)])
    assert list(found.pairs) == [
        ("train-000000.tar:00000000.jpg", "train-000000.tar:00000002.jpg"),
        ("train-000000.tar:00000001.jpg", "val-000000.tar:00000000.jpg"),
    ]
    lines = list(duplicate_lines(found))
    assert lines[0] == "duplicates: 2 images have the same bytes as an earlier one (1 in train of the same split)"
    assert lines[1] == "  1 of 1 val images (100.0%) are in train, so val does not measure new images"
    assert lines[2] == "  1 have another class than the earlier one"
    assert len(lines) == 5


def test_pixels_find_what_was_compressed_again_and_not_other_shapes(tmp_path):
    black = [np.zeros((2, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]
    files = []
    for array in black:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        files.append(file.getvalue())
    train = [(png(0, level=0), 0), (png(0, level=9), 0), (files[0], 0), (files[1], 0), (b"broken", 0)]
    val = [(png(0, level=1), 0), (b"broken", 0)]
    by_bytes = find(tmp_path / "data", train, val)
    assert (by_bytes.repeated["train"], by_bytes.val_in_train) == (0, 1)
    by_pixels = find(tmp_path / "again", train, val, compare="pixels")
    assert (by_pixels.repeated["train"], by_pixels.val_in_train) == (1, 2)


def test_files_of_a_length_of_their_own_are_not_read(tmp_path, monkeypatch):
    from maskgit_pl.data import stats

    read = []
    monkeypatch.setattr(stats.ShardReader, "read", lambda self, index: read.append(index) or b"%d" % index)
    assert find(tmp_path / "data", [(b"a", 0), (b"bb", 0), (b"ccc", 0), (b"dd", 0)], [(b"eeee", 0)]).pairs == ()
    assert read == [1, 3]


def test_a_folder_without_duplicates_says_so(tmp_path):
    assert list(duplicate_lines(find(tmp_path / "data", [(png(0), 0)], [(png(1), 0)]))) == [
        "duplicates: no two images have the same bytes"
    ]


def test_the_command_prints_them_as_text_and_as_json(tmp_path, capsys):
    find(tmp_path / "data", [(png(0), 0), (png(1), 1), (png(0), 0)], [(png(1), 1), (png(2), 1)])
    call_command("data", "stats", tmp_path / "data")
    assert "  1 of 2 val images (50.0%) are in train" in capsys.readouterr().out
    call_command("data", "stats", tmp_path / "data", "--json", "--decode")
    found = json.loads(capsys.readouterr().out)
    assert found["duplicates"]["compared"] == "pixels"
    assert found["duplicates"]["share_of_val"] == 0.5
    assert found["splits"]["train"]["classes"] == [2, 1, 0]
    assert found["images"] == {"height": [8, 8], "width": [8, 8], "channels": [3]}
    call_command("data", "stats", tmp_path / "data", "--json", "--no-duplicates")
    assert json.loads(capsys.readouterr().out)["duplicates"] is None
