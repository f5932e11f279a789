import json
import os

import numpy as np
import pytest

from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.manifest import (
    ImageRange,
    ShardReader,
    describe_enlarging,
    load_manifest,
    load_manifests,
    read_manifest_summary,
)
from maskgit_pl.data.verify import verify_shards
from maskgit_pl.errors import DataChangedError
from tests.data_folders import save_data


def test_fingerprint_follows_content_not_place(folder, tars, tmp_path_factory):
    before = read_manifest_summary(folder).fingerprint
    moved = tmp_path_factory.mktemp("moved") / "data"
    folder.rename(moved)
    assert read_manifest_summary(moved).fingerprint == before
    tars.write(moved / "val-000000.tar", tars.samples(1))
    index_shards(moved, {s: find_shards(moved, f"{s}-*.tar") for s in ("train", "val")})
    assert read_manifest_summary(moved).fingerprint != before


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_damaged_index_is_refused_by_name(folder, data):
    (folder / "train.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"train\.npy: cannot be read"):
        load_manifests(folder)


@pytest.mark.parametrize(("field", "value"), [("label", 1), ("offset", 2048 + 512), ("size", 1), ("shard", 1)])
def test_a_changed_index_is_refused_before_training_with_the_way_out(folder, field, value):
    """A row with another label or another image of the same shard would be trained on silently."""
    rows = np.load(folder / "train.npy", mmap_mode="r+")
    assert rows[field][3] != value
    rows[field][3] = value
    rows.flush()
    with pytest.raises(ValueError, match=r"train\.npy changed since it was made.*maskgit data index"):
        load_manifests(folder)
    assert verify_shards(folder).faults[0].startswith("train.npy: ")


@pytest.mark.parametrize("classes", [[], ["a"]])
def test_labels_without_a_class_are_refused_before_training_with_the_way_out(folder, classes):
    path = folder / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": classes}))
    rule = rf"train\.json: classes must have a name for each label up to 4, got {len(classes)}; make it with `maskgit"
    with pytest.raises(ValueError, match=rule):
        load_manifests(folder)
    assert verify_shards(folder).faults[0].startswith("train.npy: ")


BROKEN = {  # part of the message -> change of the manifest, or the bytes of the file
    "must have format 1": lambda content: content | {"format": 2},
    "shards": lambda content: content | {"shards": [content["shards"][0] | {"samples": "6"}]},
    "shards ": lambda content: content | {"shards": [content["shards"][0] | {"more": 1}]},
    "images.height": lambda content: content | {"images": content["images"] | {"height": [8]}},
    "unknown key 'extra'": lambda content: content | {"extra": 0},
    "": b"",
    " ": b"[1]",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_manifest_is_refused_in_one_line_with_file_and_key(folder, case):
    path, change = folder / "train.json", BROKEN[case]
    path.write_bytes(change if isinstance(change, bytes) else json.dumps(change(json.loads(path.read_text()))).encode())
    with pytest.raises(ValueError, match=rf"^.*train\.json.*{case.strip()}.*$"):
        read_manifest_summary(folder)


@pytest.mark.parametrize("name", ["train-000000.tar", "train.npy", "train.json"])
def test_a_fifo_in_a_data_folder_is_refused_and_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="must be a regular file") as caught:
        load_manifests(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("height", "width", "size", "sentence"),
    [
        ((32, 32), (32, 32), 64, "32 x 32 pixels are enlarged to 64 x 64, which adds no detail; set data.image_size"),
        ((20, 48), (30, 60), (64, 48), "set data.image_size of the tokenizer to at most [48, 60], or make the data"),
        ((300, 900), (400, 800), 64, "None"),  # photos of several sizes, reduced as usual
    ],
)
def test_images_that_are_all_enlarged_are_described_with_the_way_out(height, width, size, sentence):
    assert sentence in str(describe_enlarging(ImageRange(height, width, (3,)), size))


def replace_file(path):
    path.rename(path.with_suffix(".old"))
    path.write_bytes(b"another file")


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 700), replace_file, os.unlink])
def test_a_shard_that_is_changed_while_it_is_read_is_named(tmp_path, change):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"image", 0)] * 12}), "train"))
    reader.read(11)  # the second shard is open, the first is not
    change(tmp_path / "train-000000.tar")
    for _ in range(2):
        with pytest.raises(DataChangedError, match=r"train-000000\.tar changed while .*maskgit data verify"):
            reader.read(3)
    assert reader.read(11) == b"image"
