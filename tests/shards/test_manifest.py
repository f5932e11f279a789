import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from maskgit_pl.shards.index import find_shards, index_shards, parse_label
from maskgit_pl.shards.manifest import load_manifest, read_manifest_summary
from maskgit_pl.shards.reader import ShardReader


def png(value: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def index_one(path: Path, **options):
    return index_shards(path.parent, {"train": [path]}, **options)["train"]


@pytest.fixture
def folder(tmp_path):
    """Train in two shards of 6 and 4, val in one of 3, written by webdataset."""
    for split, count in (("train", 10), ("val", 3)):
        with webdataset.ShardWriter(f"{tmp_path}/{split}-%06d.tar", maxcount=6, verbose=0) as writer:
            for number in range(count):
                writer.write({"__key__": f"{number:04d}", "png": png(number), "cls": number % 5, "json": {"a": 1}})
    index_shards(tmp_path, {s: find_shards(tmp_path, f"{s}-*.tar") for s in ("train", "val")})
    return tmp_path


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


def test_fingerprint_follows_content_not_place(folder, tmp_path_factory):
    before = read_manifest_summary(folder).fingerprint
    moved = tmp_path_factory.mktemp("moved") / "data"
    folder.rename(moved)
    assert read_manifest_summary(moved).fingerprint == before
    write_tar(moved / "val-000000.tar", [("a.png", png(9)), ("a.cls", b"0")])
    index_shards(moved, {s: find_shards(moved, f"{s}-*.tar") for s in ("train", "val")})
    assert read_manifest_summary(moved).fingerprint != before


def test_start_up_check_names_every_bad_shard(folder):
    with open(folder / "train-000000.tar", "ab") as file:
        file.write(b"x")
    (folder / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"2 of 2 shards[\s\S]*000000.tar: \d+ bytes expected, \d+ found[\s\S]*000001"):
        load_manifest(folder, "train")


def test_missing_manifest_names_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="maskgit data index"):
        load_manifest(tmp_path, "train")


def test_shard_names_of_a_manifest_are_never_paths(folder):
    path = folder / "train.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = "../train-000000.tar"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="plain file name"):
        load_manifest(folder, "train")


def test_interleaved_members_and_upper_case_extensions_are_paired(tmp_path):
    members = [("a.PNG", png(1)), ("b.png", png(2)), ("b.cls", b"1"), ("a.cls", b"0\n")]
    manifest = index_one(write_tar(tmp_path / "x.tar", members))
    assert ShardReader(manifest).labels(np.arange(2)).tolist() == [0, 1]


@pytest.mark.parametrize("text", [b"1_000", b"", b"-1", b"cat", b"1.0", b"+1", "\u0661".encode(), b"01"])
def test_label_that_is_not_a_class_number_is_refused_by_name(tmp_path, text):
    path = write_tar(tmp_path / "x.tar", [("a.png", png()), ("a.cls", text)])
    with pytest.raises(ValueError, match=r"x\.tar:a\.cls"):
        index_one(path)


def test_label_beyond_the_class_names_is_refused():
    assert parse_label(b"2", name="a", num_classes=3) == 2
    with pytest.raises(ValueError, match="below 3"):
        parse_label(b"3", name="a", num_classes=3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png())], r"1 samples have no label.*x\.tar:a\.png"),
        ([("a.cls", b"0")], r"1 samples have no image.*x\.tar:a"),
        ([("a.png", png()), ("a.jpg", png()), ("a.cls", b"0")], r"two images"),
        ([("a.png", png()), ("a.cls", b"0"), ("a.cls", b"1")], r"two labels"),
        ([("a.png", b"<html>"), ("a.cls", b"0")], r"x\.tar:a\.png"),
        ([("a.pkl", b"0")], r"no image samples"),
    ],
)
def test_incomplete_and_doubled_samples_are_refused_by_name(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        index_one(write_tar(tmp_path / "x.tar", members))


def test_links_are_refused_and_directories_ignored(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ValueError, match="regular file"):
        index_one(path)


@pytest.mark.parametrize("damage", ["cut at a member", "cut in a payload", "flipped header", "gzip", "empty"])
def test_damaged_tar_is_refused_not_shortened(tmp_path, damage):
    members = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("png", png(n)), ("cls", b"0"))]
    path = write_tar(tmp_path / "x.tar", members)
    data = bytearray(path.read_bytes())
    second = 512 * 4  # a.png and a.cls take two blocks each
    if damage == "cut at a member":
        data = data[:second]
    elif damage == "cut in a payload":
        data = data[: second + 520]
    elif damage == "flipped header":
        data[second + 150] ^= 0xFF
    elif damage == "gzip":
        import gzip

        data = gzip.compress(data)
    else:
        data = b""
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"(shard|member) x\.tar"):
        index_one(path)


def test_patterns_take_braces_and_refuse_paths_and_gaps(folder):
    assert [p.name for p in find_shards(folder, "train-{000000..000001}.tar")] == [
        "train-000000.tar",
        "train-000001.tar",
    ]
    with pytest.raises(ValueError, match="train-000002"):
        find_shards(folder, "train-{000000..000002}.tar")
    with pytest.raises(ValueError, match="not paths"):
        find_shards(folder, "../*.tar")
