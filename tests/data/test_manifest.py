import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES
from maskgit_pl.data.index import index_shards
from maskgit_pl.data.manifest import (
    ImageRange,
    describe_resizing,
    index_sha256,
    load_manifest,
    load_manifests,
    read_manifest_summary,
    save_manifest,
)
from maskgit_pl.data.reader import ShardReader, find_shards
from maskgit_pl.data.verify import verify_shards


def test_every_sample_is_read_by_index(folder):
    reader = ShardReader(load_manifest(folder, "train"))
    values = [np.asarray(Image.open(io.BytesIO(reader.read(index))))[0, 0] for index in range(len(reader))]
    assert values == list(range(10))
    assert reader.labels(np.arange(10)).tolist() == [0, 1, 2, 3, 4] * 2


def test_summary_tells_classes_counts_and_sizes(folder):
    summary = read_manifest_summary(folder)
    assert (summary.num_classes, summary.samples, summary.channels) == (5, {"train": 10, "val": 3}, 1)
    assert summary.images.height == (8, 8)


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


def test_missing_manifest_names_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="maskgit data index"):
        load_manifest(tmp_path, "train")


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "a/../../x.tar", ".hidden.tar", "a\x1b.tar"])
def test_shards_of_a_manifest_lie_in_its_folder(folder, name):
    path = folder / "train.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a path inside the data folder"):
        load_manifest(folder, "train")


def test_what_is_usual_does_not_stand_in_the_manifest(folder, tars):
    """The fingerprint of data is made of the keys of the manifest."""
    assert not {"labels", "left_out"} & set(json.loads((folder / "train.json").read_text()))


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_damaged_index_is_refused_by_name(folder, data):
    (folder / "train.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"index .*train\.npy: cannot be read"):
        load_manifests(folder)
    (folder / "train.npy").unlink()
    with pytest.raises(ValueError, match=r"index .*train\.npy: cannot be read"):
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


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard", 2), ("shard", 2**32 - 1), ("offset", 0), ("offset", 2**64 - 1), ("offset", 2**40), ("size", 2**32 - 1)],
)
def test_an_index_whose_rows_lie_outside_the_shards_is_refused_though_its_hash_is_right(folder, field, value):
    manifest = load_manifest(folder, "train")
    rows = manifest.index().copy()
    rows[field][7] = value
    save_manifest(manifest, rows)
    content = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(content | {"index_sha256": index_sha256(rows)}))
    with pytest.raises(
        ValueError, match=r"train\.npy: row 7 must lie inside one of 2 shards, with .* got .*maskgit data index"
    ):
        load_manifest(folder, "train")


def test_an_index_of_images_larger_than_any_is_refused_though_the_shard_is_that_long(folder):
    manifest = load_manifest(folder, "train")
    length = 2**31  # of a file with holes, which has hardly a byte on the disk
    long = replace(manifest, shards=(replace(manifest.shards[0], bytes=length), *manifest.shards[1:]))
    os.truncate(folder / manifest.shards[0].name, length)
    rows = manifest.index().copy()
    rows["size"][0] = MAX_IMAGE_BYTES + 1
    save_manifest(long, rows)
    content = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(content | {"index_sha256": index_sha256(rows)}))
    with pytest.raises(ValueError, match=rf"row 0 must lie inside .* with at most {MAX_IMAGE_BYTES} bytes, got"):
        load_manifest(folder, "train")


def test_the_last_bytes_of_a_shard_are_inside_it(folder):
    manifest = load_manifest(folder, "train")
    rows = manifest.index().copy()
    rows["size"][2] = manifest.shards[0].bytes - rows["offset"][2]
    save_manifest(manifest, rows)
    content = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(content | {"index_sha256": index_sha256(rows)}))
    load_manifest(folder, "train")


def in_first_shard(**fields):
    return lambda content: content | {"shards": [content["shards"][0] | fields, *content["shards"][1:]]}


def in_images(**fields):
    return lambda content: content | {"images": content["images"] | fields}


def changed(**fields):
    return lambda content: content | fields


HOSTILE = {  # the key that the message names, and what is done to the manifest
    "format": changed(format=2),
    "format ": changed(format={}),
    "split": changed(split="val"),
    "samples": changed(samples=11),
    "samples ": changed(shards=[]),
    "classes": changed(classes=[]),
    "classes ": changed(classes="abcde"),
    "classes  ": changed(classes=[0, 1, 2, 3, 4]),
    "index_sha256": changed(index_sha256=None),
    "index_sha256 ": changed(index_sha256="0" * 63),
    "labels": changed(labels=["cls"]),
    "labels ": changed(labels="x"),
    "left_out": changed(left_out=[1]),
    "left_out ": changed(left_out={"a": "b"}),
    "extra": changed(extra=0),
    "shards": changed(shards={"a": 1}),
    r"shards\[0\]": changed(shards=["train-000000.tar"]),
    r"shards\[0\]: bytes": in_first_shard(bytes=2**60),
    r"shards\[0\]: bytes ": in_first_shard(bytes=-1),
    r"shards\[0\]: samples": in_first_shard(samples="6"),
    r"shards\[0\]: samples ": in_first_shard(samples=10**18),
    r"shards\[0\]: samples  ": in_first_shard(samples=6.0),
    r"shards\[0\]: sha256": in_first_shard(sha256="../"),
    r"shards\[0\]: name": in_first_shard(name=7),
    r"shards\[0\]: unknown key 'more'": in_first_shard(more=1),
    "images": changed(images=[]),
    "images.height": in_images(height=[8]),
    "images.height ": in_images(height=[9, 8]),
    "images.width": in_images(width=[0, 8]),
    "images.width ": in_images(width=[1, 2**40]),
    "images.channels": in_images(channels=[]),
    "images.channels ": in_images(channels=[2]),
    "images.channels  ": in_images(channels=["1"]),
}
for missing in ("format", "classes", "images", "index_sha256", "shards"):
    HOSTILE[f"{missing}   "] = lambda content, missing=missing: {k: v for k, v in content.items() if k != missing}


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_line_with_file_and_key(folder, case):
    path = folder / "train.json"
    path.write_text(json.dumps(HOSTILE[case](json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=rf"manifest .*train\.json.*{case.strip()}.*; make it with") as caught:
        read_manifest_summary(folder)
    assert "\n" not in str(caught.value)


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
        (
            (64, 64),
            (64, 64),
            32,
            "64 x 64 pixels are reduced to 32 x 32; set data.image_size of the tokenizer to 64, or",
        ),
        (
            (48, 48),
            (64, 64),
            32,
            "64 x 48 pixels are reduced to 32 x 32; set data.image_size of the tokenizer to [48, 64]",
        ),
        ((64, 64), (64, 64), (32, 48), "make the data with --image-size 32,48"),
        ((32, 32), (32, 32), 64, "32 x 32 pixels are enlarged to 64 x 64, which adds no detail; set data.image_size"),
        ((32, 32), (90, 90), 64, "images of 90 x 32 pixels are enlarged to 64 x 64"),
        ((20, 48), (30, 60), 64, "images of at most 60 x 48 pixels are enlarged to 64 x 64"),
        ((20, 48), (30, 60), 64, "from larger images with --image-size 64"),
    ],
)
def test_images_that_are_all_resized_are_described_with_the_way_out(height, width, size, expected):
    assert expected in describe_resizing(ImageRange(height, width, (3,)), size)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        ((64, 64), (64, 64), 64),
        ((48, 48), (64, 64), (48, 64)),
        ((64, 64), (90, 90), 64),  # only cropped
        ((300, 900), (400, 800), 64),  # photos of several sizes, reduced as usual
        ((20, 900), (30, 800), 64),  # some are enlarged; the range does not tell how many
    ],
)
def test_images_that_are_not_all_resized_are_not_described(height, width, size):
    assert describe_resizing(ImageRange(height, width, (3,)), size) is None
