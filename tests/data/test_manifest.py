import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.manifest import (
    ImageRange,
    ShardReader,
    describe_resizing,
    index_sha256,
    load_manifest,
    load_manifests,
    read_manifest_summary,
    save_manifest,
)
from maskgit_pl.data.verify import verify_shards
from maskgit_pl.errors import DataChangedError
from tests.data_folders import save_data


def test_every_sample_is_read_by_index(folder):
    reader = ShardReader(load_manifest(folder, "train"))
    values = [np.asarray(Image.open(io.BytesIO(reader.read(index))))[0, 0] for index in range(len(reader))]
    assert values == list(range(10))
    assert reader.labels(np.arange(10)).tolist() == [0, 1, 2, 3, 4] * 2


def test_manifest_needs_no_torch(folder):
    code = (
        "import sys; from maskgit_pl.data.manifest import read_manifest_summary as read; "
        f"read({str(folder)!r}); assert not {{'torch', 'PIL', 'webdataset'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_follows_content_not_place(folder, tars, tmp_path_factory):
    before = read_manifest_summary(folder).fingerprint
    moved = tmp_path_factory.mktemp("moved") / "data"
    folder.rename(moved)
    assert read_manifest_summary(moved).fingerprint == before
    tars.write(moved / "val-000000.tar", tars.samples(1))
    index_shards(moved, {s: find_shards(moved, f"{s}-*.tar") for s in ("train", "val")})
    assert read_manifest_summary(moved).fingerprint != before


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "a/../../x.tar", ".hidden.tar", "a\x1b.tar"])
def test_shards_of_a_manifest_lie_in_its_folder(folder, name):
    path = folder / "train.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a path inside the data folder"):
        load_manifest(folder, "train")


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_damaged_index_is_refused_by_name(folder, data):
    (folder / "train.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"index .*train\.npy: cannot be read"):
        load_manifests(folder)
    (folder / "train.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"index .*train\.npy: no such file; make it with"):
        load_manifests(folder)


INDEX_CHANGES = {
    "label": ("label", 1),
    "offset": ("offset", 2048 + 512),
    "size": ("size", 1),
    "shard": ("shard", 1),
}


@pytest.mark.parametrize("case", INDEX_CHANGES)
def test_a_changed_index_is_refused_before_training_with_the_way_out(folder, case):
    """A row with another label or another image of the same shard would be trained on silently."""
    rows = np.load(folder / "train.npy", mmap_mode="r+")
    field, value = INDEX_CHANGES[case]
    assert rows[field][3] != value
    rows[field][3] = value
    rows.flush()
    with pytest.raises(ValueError, match=r"index .*train\.npy changed since it was made.*maskgit data index"):
        load_manifests(folder)
    assert verify_shards(folder).bad[0].name == "train.npy"


@pytest.mark.parametrize("offset", [10**6, 2**64 - 1])
def test_an_index_of_a_stranger_that_leads_out_of_the_shard_is_refused_with_its_name(folder, offset):
    manifest = load_manifest(folder, "val")
    rows = np.array(manifest.index())
    rows["offset"][-1] = offset
    save_manifest(replace(manifest, index_sha256=index_sha256(rows)), rows)
    with pytest.raises(ValueError, match=r"1 of 3 shards[^\n]*\n  val-000000\.tar: .* expected"):
        load_manifests(folder)
    with pytest.raises(DataChangedError, match=r"val-000000\.tar changed while it was in use"):
        ShardReader(load_manifest(folder, "val", check=False)).read(2)


HOSTILE = {  # what the message names, and what is done to the manifest
    "must have format 1": lambda content: content | {"format": 2},
    "classes": lambda content: content | {"classes": "abcde"},
    "left_out": lambda content: content | {"left_out": [1]},
    "shards": lambda content: content | {"shards": [content["shards"][0] | {"samples": "6"}]},
    "shards ": lambda content: content | {"shards": [content["shards"][0] | {"more": 1}]},
    "images.height": lambda content: content | {"images": content["images"] | {"height": [8]}},
    "unknown key 'extra'": lambda content: content | {"extra": 0},
    "index_sha256": lambda content: {key: value for key, value in content.items() if key != "index_sha256"},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_wrong_manifest_is_refused_in_one_line_with_file_and_key(folder, case):
    path = folder / "train.json"
    path.write_text(json.dumps(HOSTILE[case](json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=rf"^manifest .*train\.json.*{case.strip()}.*; make it with .*$"):
        read_manifest_summary(folder)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"format":' + b"[" * 10**5, b'{"format": 1, "format": 1}'])
def test_a_manifest_that_is_no_json_mapping_is_refused_in_one_line(folder, content):
    (folder / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest .*train\.json.*; make it with") as caught:
        read_manifest_summary(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train-000000.tar", "train.npy", "train.json"])
def test_a_fifo_in_a_data_folder_is_refused_and_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"{name}.*must be a regular file"):
        load_manifests(folder)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        ((64, 64), (64, 64), 32, "64 x 64 pixels are reduced to 32 x 32; set data.image_size of the tokenizer to 64"),
        ((48, 48), (64, 64), 32, "64 x 48 pixels are reduced to 32 x 32; set data.image_size of the tokenizer to [48"),
        ((64, 64), (64, 64), (32, 48), "make the data with --image-size 32,48"),
        ((32, 32), (32, 32), 64, "32 x 32 pixels are enlarged to 64 x 64, which adds no detail; set data.image_size"),
        ((32, 32), (90, 90), 64, "images of 90 x 32 pixels are enlarged to 64 x 64"),
        ((20, 48), (30, 60), 64, "images of at most 60 x 48 pixels are enlarged to 64 x 64"),
        ((20, 48), (30, 60), 64, "from larger images with --image-size 64"),
        ((64, 64), (64, 64), 64, None),
        ((48, 48), (64, 64), (48, 64), None),
        ((64, 64), (90, 90), 64, None),  # only cropped
        ((300, 900), (400, 800), 64, None),  # photos of several sizes, reduced as usual
        ((20, 900), (30, 800), 64, None),  # some are enlarged; the range does not tell how many
    ],
)
def test_images_that_are_all_resized_are_described_with_the_way_out(height, width, size, expected):
    found = describe_resizing(ImageRange(height, width, (3,)), size)
    assert found is None if expected is None else expected in found


@pytest.mark.parametrize("label", [-1, 3, 9999])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_label_that_is_no_class_is_refused_by_name_before_training(tmp_path, split, label):
    samples = [(b"", 0), (b"", 1), (b"", 2)]
    splits = {"train": samples, "val": samples}
    folder = save_data(tmp_path, {**splits, split: [*samples, (b"", label)]})
    with pytest.raises(
        ValueError, match=rf"labels must be in \[0, 3\), got {label} in {split}-000000.tar:00000003.jpg, the first of 1"
    ):
        ShardData(ShardDataConfig(str(folder), global_batch=2)).setup()


def cut(path):
    os.truncate(path, 700)


def replaced(path):
    path.rename(path.with_suffix(".old"))
    path.write_bytes(b"another file")


def removed(path):
    path.unlink()


@pytest.mark.parametrize("change", [cut, replaced, removed])
def test_a_shard_that_is_changed_while_it_is_read_is_named(tmp_path, change):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"image", 0)] * 12}), "train"))
    reader.read(11)  # the second shard is open, the first is not
    change(tmp_path / "train-000000.tar")
    for _ in range(2):
        with pytest.raises(DataChangedError, match=r"train-000000\.tar changed while .*maskgit data verify"):
            reader.read(3)
    assert reader.read(11) == b"image"


def test_an_open_shard_that_is_cut_is_named_and_one_that_is_removed_is_read_on(tmp_path):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"image", 0)] * 2}), "train"))
    reader.read(0)
    (tmp_path / "train-000000.tar").rename(tmp_path / "moved.tar")
    assert reader.read(1) == b"image"
    cut(tmp_path / "moved.tar")
    with pytest.raises(DataChangedError, match=r"train-000000\.tar changed .*5 bytes expected at byte 2\d+, got 0"):
        reader.read(1)


def test_an_index_that_is_cut_while_it_is_read_ends_the_run_and_does_not_kill_it(tmp_path):
    reader = ShardReader(load_manifest(save_data(tmp_path, {"train": [(b"image", 0)] * 2}), "train"))
    reader.read(0)
    os.truncate(tmp_path / "train.npy", 100)
    with pytest.raises(DataChangedError, match=r"train\.npy changed .*the file was truncated"):
        reader.read(1)
