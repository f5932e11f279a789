import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.shards.index import find_shards, index_shards
from maskgit_pl.shards.manifest import load_manifest, load_manifests, read_manifest_summary
from maskgit_pl.shards.reader import ShardReader


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
        "import sys; from maskgit_pl.shards.manifest import read_manifest_summary as read; "
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
    with pytest.raises(ValueError, match="a file inside the data folder"):
        load_manifest(folder, "train")


def test_what_is_usual_does_not_stand_in_the_manifest(folder, tars):
    """So that the fingerprint of shards that were indexed before stays the same."""
    assert not {"labels", "left_out"} & set(json.loads((folder / "train.json").read_text()))


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_damaged_index_is_refused_by_name(folder, data):
    (folder / "train.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"index .*train\.npy: cannot be read"):
        load_manifests(folder)
    (folder / "train.npy").unlink()
    with pytest.raises(ValueError, match=r"index .*train\.npy: cannot be read"):
        load_manifests(folder)
