"""``maskgit data``: the lines that each command prints; ``test_mistakes`` has the wrong commands."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.data.sources.public import public_datasets


def png(value: int, size: tuple[int, int] = (9, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of 20 images of 12 x 10 pixels for each of two classes."""
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "tree" / name / f"{number}.png").write_bytes(png(number, (12, 10)))
    return tmp_path / "tree"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two train shards and one val shard of four images, with the names of img2dataset."""
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(3):
        files = [
            (f"{shard}{number}.{kind}", content)
            for number in range(4)
            for kind, content in (("PNG", png(number)), ("cls", b"%d" % (number % 2)), ("pkl", b"not read"))
        ]
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


def test_make_then_make_again_then_index_agree(tree, tmp_path, maskgit):
    words = ("data", "make", tree, "--out", tmp_path / "out", "--val-fraction", 0.25, "--image-size", 8)
    assert "2 classes; 8 x 8 pixels, colour" in maskgit(*words).out
    summary = read_manifest_summary(tmp_path / "out")
    assert sum(summary.samples.values()) == 40
    assert "nothing to do" in maskgit(*words).out
    assert maskgit("data", "index", tmp_path / "out", "--class-names", "cat,dog").code == 0
    assert read_manifest_summary(tmp_path / "out") == summary


def test_make_and_index_count_the_classes_that_train_lacks(tree, tmp_path, maskgit):
    for split, kind, empty in (("train", "cat", "dog"), ("val", "dog", "cat")):
        (tmp_path / "split" / split / empty).mkdir(parents=True)
        (tree / kind).rename(tmp_path / "split" / split / kind)
    for words in (("make", tmp_path / "split", "--out", tmp_path / "out"), ("index", tmp_path / "out")):
        lines = maskgit("data", *words).out.splitlines()
        assert "  no image in train of 1 of 2 classes, which a model cannot learn" in lines


def test_index_prints_splits_and_counts(tars, tmp_path, maskgit):
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\ngoldfish\n")
    answer = maskgit("data", "index", f"{tars}/{{00000..00002}}.tar", "--class-names", tmp_path / "names.txt")
    assert answer.out.splitlines() == [
        f"{tars}: indexed: 8 train, 4 val; 2 classes; 9 x 6 pixels, colour",
        "  train: 2 shards, 00000.tar ... 00001.tar",
        "  val: 1 shard, 00002.tar",
        "  the last 1 of 3 shards are val",
        "  train images of each class: tench, Tinca tinca 4, goldfish 4",
    ]
    assert maskgit("data", "index", tars, "--val", "00000.tar").code == 0
    assert read_manifest_summary(tars).classes == ("0", "1")


def test_verify_prints_counts_or_a_list_of_damaged_files(tars, maskgit):
    maskgit("data", "index", tars)
    assert maskgit("data", "verify", tars).out.splitlines() == [
        f"{tars}: 3 shards, 12 samples, 61.4 kB: hashes agree with the manifest",
        f"{tars}: content: 8 train, 4 val; 2 classes; 9 x 6 pixels, colour",
        "  train images of each class: 0 4, 1 4",
    ]
    assert "every image can be decoded" in maskgit("data", "verify", tars, "--decode").out
    os.truncate(tars / "00000.tar", 3072)
    content = bytearray((tars / "00002.tar").read_bytes())
    content[3 * 1024] ^= 1
    (tars / "00002.tar").write_bytes(content)
    head, *faults = maskgit("data", "verify", tars).error.splitlines()
    assert "2 damaged files:" in head
    assert [line.split()[0] for line in faults] == ["00000.tar:", "00002.tar:"]
    assert "20480 bytes expected, got 3072" in faults[0]


def test_the_help_of_fetch_describes_each_data_set(maskgit):
    text = " ".join(maskgit("data", "fetch", "--help").out.split())
    assert all(f"{name}: {dataset.contents}" in text for name, dataset in public_datasets().items())
