"""``maskgit data``: the lines that each command prints, and what it refuses."""

import io
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.data.sources.public import public_datasets
from maskgit_pl.data.token_store import StoreDescription
from maskgit_pl.data.tokenizing import StoreParts
from tests.cli.commands import call_command


def call(*words) -> int:
    return call_command("data", *words)


@pytest.fixture
def logged(caplog):
    """A function that returns the lines that the command has logged since the last call."""
    caplog.set_level(logging.INFO)

    def lines() -> list[str]:
        text = "\n".join(caplog.messages)
        caplog.clear()
        return text.splitlines()

    return lines


def png(value: int, blue: int = 0, size: tuple[int, int] = (9, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, blue)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path):
    """A folder of 20 images of 12 x 10 pixels for each of two classes."""
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "tree" / name / f"{number}.png").write_bytes(png(number, ord(name[0]), (12, 10)))
    return tmp_path / "tree"


def labelled(shard: int):
    """The members of a tar: four images of two classes, and a file that is not read."""
    return [
        (f"{shard}{number}.{kind}", content)
        for number in range(4)
        for kind, content in (("PNG", png(number)), ("cls", b"%d" % (number % 2)), ("pkl", b"x"))
    ]


def save_tars(folder: Path, members_of=labelled) -> Path:
    """Writes two train shards and one val shard, with the names of img2dataset."""
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for name, content in members_of(number):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def tars(tmp_path):
    return save_tars(tmp_path / "in")


# make


def test_make_then_make_again_then_index_agree(tree, tmp_path, logged):
    out = tmp_path / "out"
    words = ("make", tree, "--out", out, "--val-fraction", 0.25, "--image-size", 8)
    assert call(*words) == 0
    assert "2 classes; 8 x 8 pixels, colour" in logged()[0]
    made = read_manifest_summary(out)
    assert sum(made.samples.values()) == 40
    call(*words)
    assert "nothing to do" in logged()[0]
    call("index", out, "--class-names", "cat,dog")
    assert read_manifest_summary(out) == made


def test_make_says_what_it_left_out(tree, tmp_path, logged, capsys):
    (tree / "cat" / "a.gif").write_bytes(b"GIF89a")
    (tree / "loose.png").write_bytes(b"x")
    (tree / "dog" / "cut.png").write_bytes((tree / "cat" / "1.png").read_bytes()[:60])
    (tree / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 42 images cannot be read:\n.*\n.*\nreplace .* with --lenient$"):
        call("make", tree, "--out", tmp_path / "out")
    said = [
        "  left out: 1 .gif (cat/a.gif)",
        "  left out: 1 outside the class folders (loose.png)",
        "  left out: 2 images that cannot be read, listed in left_out.txt",
    ]
    for _ in range(2):
        assert call("make", tree, "--out", tmp_path / "out", "--lenient") == 0
        assert logged()[1:-1] == said


def test_make_and_index_name_the_classes_that_train_lacks(tree, tmp_path, logged, capsys):
    for split, kind, empty in (("train", "cat", "dog"), ("val", "dog", "cat")):
        (tmp_path / "split" / split / empty).mkdir(parents=True)
        (tree / kind).rename(tmp_path / "split" / split / kind)
    for words in (("make", tmp_path / "split", "--out", tmp_path / "out"), ("index", tmp_path / "out")):
        call(*words)
        said = [*logged(), *capsys.readouterr().out.splitlines()]
        assert "  no image in train of 1 of 2 classes, which a model cannot learn" in said


# index


def test_index_prints_splits_counts_and_what_is_not_read(tars, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\ngoldfish\n")
    assert call("index", f"{tars}/{{00000..00002}}.tar", "--class-names", tmp_path / "names.txt") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tars}: indexed: 8 train, 4 val; 2 classes; 9 x 6 pixels, colour",
        "  train: 2 shards, 00000.tar ... 00001.tar",
        "  val: 1 shard, 00002.tar",
        "  the last 1 of 3 shards are val (--val-fraction 0.1)",
        "  train images of each class: tench, Tinca tinca 4, goldfish 4",
    ]
    call("index", tars, "--train", "{00001..00002}.tar", "--val", "00000.tar")
    assert "  class names: kept from the existing manifest" in capsys.readouterr().out
    assert read_manifest_summary(tars).classes == ("tench, Tinca tinca", "goldfish")


def test_index_leaves_out_and_counts_only_when_asked(tmp_path, capsys):
    folder = save_tars(tmp_path / "in", lambda shard: [*labelled(shard), ("half.png", png(0))])
    with pytest.raises(ValueError, match=r"3 of 3 shards are rejected:\n  00000.tar: 1 without a label \(first 00000"):
        call("index", folder)
    call("index", folder, "--lenient")
    assert "  train: left out: 2 without a label\n" in capsys.readouterr().out
    call("index", folder, "--no-labels")
    assert read_manifest_summary(folder).samples == {"train": 10, "val": 5}


# verify


def test_verify_prints_counts_or_one_table(tars, capsys):
    call("index", tars)
    capsys.readouterr()
    assert call("verify", tars) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        f"{tars}: 3 shards, 12 samples, 61.4 kB: hashes and images agree with the index",
        f"{tars}: content: 8 train, 4 val; 2 classes; 9 x 6 pixels, colour",
        "  train images of each class: 0 4, 1 4",
    ]
    assert call("verify", tars, "--decode") == 0
    with open(tars / "00000.tar", "r+b") as file:
        file.truncate(3072)
    content = bytearray((tars / "00002.tar").read_bytes())
    content[3 * 1024] ^= 1
    (tars / "00002.tar").write_bytes(content)
    with pytest.raises(ValueError, match="2 files differ from the manifest") as caught:
        call("verify", tars)
    table = [line.split() for line in str(caught.value).splitlines()[1:]]
    assert [row[0] for row in table] == ["file", "00000.tar", "00002.tar"]
    assert table[1][1:5] == ["20480", "bytes", "3072", "bytes"]


def test_verify_of_a_token_store_names_the_changed_file(tmp_path, capsys):
    description = StoreDescription((2, 2), 16, 8, "tokenizer", "data", ("a", "b"), {"train": 3, "val": 2})
    parts = StoreParts(tmp_path, description, part_size=8)
    for part in parts.parts():
        count = part.stop - part.start
        parts.write(part, np.zeros((count, 1, 4), np.int64), np.zeros(count, np.int64))
    parts.finish()
    assert call("verify", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 5 rows: hashes agree with the description\n"
    np.save(tmp_path / "val-labels.npy", np.array([0, -1]))
    with pytest.raises(ValueError, match=r"val-labels\.npy: changed since it was made: .*; regenerate it"):
        call("verify", tmp_path)
    with pytest.raises(ValueError, match="--decode must be left out"):
        call("verify", tmp_path, "--decode")


@pytest.mark.parametrize("place", ["", "/*.tar", "/{00000..00002}.tar"])
def test_a_fifo_among_the_tars_is_refused_and_not_waited_for(tars, place):
    call("index", tars)
    (tars / "00001.tar").unlink()
    os.mkfifo(tars / "00001.tar")
    with pytest.raises(ValueError, match=r"00001\.tar: must be a regular file, got a FIFO"):
        call("index", f"{tars}{place}")
    with pytest.raises(ValueError, match=r"00001\.tar .*must be a regular file, got a FIFO"):
        call("verify", tars)


# fetch


def test_the_help_of_fetch_says_what_each_data_set_holds(capsys):
    with pytest.raises(SystemExit):
        main(["data", "fetch", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {each.contents}" in said for name, each in public_datasets().items())
