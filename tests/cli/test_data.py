import io
import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.cli import data, main
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.data.token_store import StoreDescription
from maskgit_pl.data.tokenizing import StoreParts
from tests.cli.commands import call_command
from tests.conftest import save_uneven_shards


def call(*words) -> int:
    return call_command("data", *words)


@pytest.fixture
def tree(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(20):
            image = Image.new("RGB", (12, 10), (number, 0, ord(name[0])))
            image.save(tmp_path / "tree" / name / f"{number}.png")
    return tmp_path / "tree"


def test_make_then_make_again_then_index_agree(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("make", tree, "--out", out, "--val-fraction", 0.25, "--image-size", 8) == 0
    assert "2 classes; 8 x 8 pixels, colour" in capsys.readouterr().out
    made = read_manifest_summary(out)
    assert sum(made.samples.values()) == 40
    call("make", tree, "--out", out, "--val-fraction", 0.25, "--image-size", 8)
    assert "nothing to do" in capsys.readouterr().out
    call("index", out, "--class-names", "cat,dog")
    assert read_manifest_summary(out) == made


def test_make_writes_through_a_link_and_names_what_is_in_its_way(tree, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    before = {each.name for each in tmp_path.iterdir()}
    for said in ("2 classes", "nothing to do"):
        assert call("make", tree, "--out", tmp_path / "link", "--image-size", 8) == 0
        assert said in capsys.readouterr().out
        assert (tmp_path / "link").is_symlink()
        assert {each.name for each in tmp_path.iterdir()} == before
    (tmp_path / ".other.partial").touch()
    (tmp_path / ".more.partial").symlink_to("disk")
    for name in ("other", "more"):
        with pytest.raises(
            ValueError, match=rf"must have \S+/\.{name}\.partial free for its shards, .*; remove it, or"
        ):
            call("make", tree, "--out", tmp_path / name)
    assert {each.name for each in tmp_path.iterdir()} == {*before, ".other.partial", ".more.partial"}


@pytest.mark.parametrize("out", [".", "/"])
def test_make_does_not_replace_the_current_folder_or_a_disk(tree, tmp_path, monkeypatch, out):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="data folder must be a folder that a new one can replace, got /"):
        call("make", tree, "--out", out)
    assert [each.name for each in tmp_path.iterdir() if each.name != "tree"] == ["empty"]


def test_make_says_which_images_are_equal(tree, tmp_path, capsys, monkeypatch):
    shutil.copy(tree / "cat" / "1.png", tree / "dog" / "again.png")
    for _ in range(2):  # made, and complete already
        assert call("make", tree, "--out", tmp_path / "out", "--val-fraction", 0.25) == 0
        said = capsys.readouterr().out
        assert "  duplicates: 1 image has the same bytes as an earlier one" in said
        assert "    1 have another class than the earlier one\n" in said
        assert re.search(r"    \S+\.tar:\d+\.png = train-000000\.tar:\d+\.png\n", said)
    monkeypatch.setattr(data, "_MOST_COMPARED", 10)
    call("make", tree, "--out", tmp_path / "out", "--val-fraction", 0.25)
    assert f"not searched for in so much data; `maskgit data stats {tmp_path / 'out'}` does" in capsys.readouterr().out


def test_make_says_what_it_left_out_and_stats_says_it_again(tree, tmp_path, capsys):
    (tree / "cat" / "a.gif").write_bytes(b"GIF89a")
    (tree / "loose.png").write_bytes(b"x")
    whole = (tree / "cat" / "1.png").read_bytes()
    (tree / "dog" / "cut.png").write_bytes(whole[:60])
    (tree / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"2 of 42 images cannot be read:\n.*\n.*\nreplace .* with --lenient$"
    ) as caught:
        call("make", tree, "--out", tmp_path / "out")
    assert f"image {tree}/dog/cut.png is truncated after 60 bytes" in str(caught.value)
    assert f"image {tree}/dog/empty.png is empty" in str(caught.value)
    said = [
        "  left out: 1 .gif (cat/a.gif)",
        "  left out: 1 outside the class folders (loose.png)",
        "  left out: 2 images that cannot be read, listed in left_out.txt",
    ]
    for _ in range(2):
        assert call("make", tree, "--out", tmp_path / "out", "--lenient") == 0
        assert capsys.readouterr().out.splitlines()[1:] == said
    call("stats", tmp_path / "out")
    assert said[-1] in capsys.readouterr().out.splitlines()
    assert sum(read_manifest_summary(tmp_path / "out").samples.values()) == 40


def test_make_and_index_name_the_classes_that_train_lacks(tree, tmp_path, capsys):
    for split, kind in (("train", "cat"), ("val", "dog")):
        (tmp_path / "split" / split / kind).mkdir(parents=True)
        (tree / kind / "0.png").rename(tmp_path / "split" / split / kind / "0.png")
        (tmp_path / "split" / split / {"cat": "dog", "dog": "cat"}[kind]).mkdir()
    line = "  no image in train of 1 of 2 classes: dog"
    call("make", tmp_path / "split", "--out", tmp_path / "out")
    assert line in capsys.readouterr().out.splitlines()
    call("index", tmp_path / "out")
    assert line in capsys.readouterr().out.splitlines()
    call("make", tree, "--out", tmp_path / "both", "--val-fraction", 0.25)
    assert "no image in train" not in capsys.readouterr().out


def test_index_of_foreign_names_numbers_the_classes(tree, tmp_path):
    call("make", tree, "--out", tmp_path / "out")
    for split in ("train", "val"):
        (tmp_path / "out" / f"{split}-000000.tar").rename(tmp_path / "out" / f"{split == 'val':05d}.tar")
        (tmp_path / "out" / f"{split}.json").unlink()
    call("index", tmp_path / "out", "--train", "{00000..00000}.tar", "--val", "00001.tar")
    assert read_manifest_summary(tmp_path / "out").classes == ("0", "1")


def test_user_errors_say_what_is_wrong(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call("make", tmp_path / "nowhere", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="names of its sub-folders"):
        call("make", tree, "--out", tmp_path / "out", "--class-names", "a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^source \S+ must "):  # SOURCE is no flag
        call("make", tmp_path / "empty", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"--val-fraction must be"):
        call("make", tree, "--out", tmp_path / "out", "--val-fraction", "2")
    for split in ("train", "val"):
        shutil.copytree(tree, tmp_path / "split" / split)
    wrong = r"^--val-fraction must not be set for source \S+/split, which has a train and a val split; leave it out$"
    with pytest.raises(ValueError, match=wrong):
        call("make", tmp_path / "split", "--out", tmp_path / "out", "--val-fraction", "0.5")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="got none"):
        call("index", tree)


@pytest.mark.parametrize(("split", "other"), [("train", "val"), ("val", "train"), ("test", "train")])
def test_one_split_folder_without_the_other_is_refused(tree, tmp_path, split, other):
    folder = tmp_path / "half"
    shutil.copytree(tree, folder / split)
    with pytest.raises(ValueError, match=rf"half must have {other}/.* beside {split}/"):
        call("make", folder, "--out", tmp_path / "out")


def test_a_class_may_be_called_train(tree, tmp_path):
    folder = tmp_path / "vehicles"
    shutil.copytree(tree, folder)
    (folder / read_class(tree)).rename(folder / "train")
    call("make", folder, "--out", tmp_path / "out", "--val-fraction", "0.5")
    assert "train" in read_manifest_summary(tmp_path / "out").classes


def read_class(tree):
    """Returns the name of the first class of an image folder."""
    return min(path.name for path in tree.iterdir() if path.is_dir())


def test_parser_needs_no_heavy_import():
    code = "import sys, maskgit_pl.cli.data; assert not {'torch', 'PIL', 'webdataset', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_console_script_makes_a_newcomers_folder(tmp_path, capsys):
    from maskgit_pl.cli import main
    from maskgit_pl.data.images import encode_png
    from maskgit_pl.data.manifest import read_manifest_summary

    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(10):
            image = torch.full((3, 8, 8), 20 * number, dtype=torch.uint8)
            (tmp_path / "photos" / label / f"{number}.png").write_bytes(encode_png(image))
    assert main(["data", "make", str(tmp_path / "photos"), "--out", str(tmp_path / "shards")]) == 0
    assert read_manifest_summary(tmp_path / "shards").classes == ("cat", "dog")


def test_every_command_of_the_console_script_runs_something():
    import argparse

    from maskgit_pl.cli import build_parser

    def check(name, parser):
        if callable(parser.get_default("run")):
            return
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        assert inner, name
        for more, each in inner[0].choices.items():
            check(f"{name} {more}", each)

    check("maskgit", build_parser())


def shards(folder, tars_of):
    """Writes two train shards and one val shard, with the names of img2dataset."""
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for name, data in tars_of(number):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def image(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 6), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def labelled(shard: int):
    return [
        (f"{shard}{number}.{kind}", data)
        for number in range(4)
        for kind, data in (("PNG", image(number)), ("cls", b"%d" % (number % 2)), ("pkl", b"x"))
    ]


def test_index_prints_splits_counts_and_what_is_not_read(tmp_path, capsys):
    folder = shards(tmp_path / "in", labelled)
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\ngoldfish\n")
    assert call("index", f"{folder}/{{00000..00002}}.tar", "--class-names", tmp_path / "names.txt") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: indexed: 8 train, 4 val; 2 classes; 9 x 6 pixels, colour",
        "  train: 2 shards, 00000.tar ... 00001.tar",
        "  val: 1 shard, 00002.tar",
        "  the last 1 of 3 shards are val (--val-fraction 0.1)",
        "  train: members not read: 8 .pkl",
        "  val: members not read: 4 .pkl",
    ]
    assert read_manifest_summary(folder).classes == ("tench, Tinca tinca", "goldfish")
    call("index", folder)
    assert "  class names: kept from the existing manifest" in capsys.readouterr().out
    assert read_manifest_summary(folder).classes == ("tench, Tinca tinca", "goldfish")


def test_index_leaves_out_and_counts_only_when_asked(tmp_path, capsys):
    folder = shards(tmp_path / "in", lambda shard: [*labelled(shard), ("half.png", image(0))])
    with pytest.raises(ValueError, match=r"3 of 3 shards are rejected:\n  00000.tar: 1 without a label \(first 00000"):
        call("index", folder)
    call("index", folder, "--lenient")
    assert "  train: left out: 2 without a label\n  train: members" in capsys.readouterr().out
    call("stats", folder)
    assert "  left out: 2 without a label" in capsys.readouterr().out
    call("verify", folder)
    call("index", folder, "--no-labels")
    assert read_manifest_summary(folder).samples == {"train": 10, "val": 5}
    assert read_manifest_summary(folder).classes == ("image",)


def test_what_a_library_refuses_is_bad_input_too(tmp_path, capsys):
    save_uneven_shards(tmp_path / "shards", (1, 2))
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    assert main(["data", "index", str(tmp_path / "shards"), "--class-names", str(tmp_path / "names.txt")]) == 2
    assert "names.txt must be UTF-8 text, one name per line" in capsys.readouterr().err
    assert main(["data", "index", str(tmp_path / "shards"), "--train", ""]) == 2
    assert "shard pattern '' must be a glob" in capsys.readouterr().err


def test_class_names_are_checked(tmp_path):
    folder = shards(tmp_path / "in", labelled)
    for names in ("a,,b", "a,a", ","):
        with pytest.raises(ValueError, match="class names must be unique and not empty"):
            call("index", folder, "--class-names", names)
    with pytest.raises(ValueError, match=r"must be a class in \[0, 1\), got 1"):
        call("index", folder, "--class-names", "a")


def test_verify_prints_counts_or_one_table(tmp_path, capsys):
    folder = shards(tmp_path / "in", labelled)
    call("index", folder)
    capsys.readouterr()
    assert call("verify", folder) == 0
    printed = capsys.readouterr().out
    assert printed == f"{folder}: 3 shards, 12 samples, 61.4 kB: hashes, headers and labels agree with the index\n"
    assert call("verify", folder, "--decode") == 0
    with open(folder / "00000.tar", "r+b") as file:
        file.truncate(3072)
    data = bytearray((folder / "00002.tar").read_bytes())
    data[3 * 1024] ^= 1
    (folder / "00002.tar").write_bytes(data)
    with pytest.raises(ValueError, match="2 files differ from the manifest") as caught:
        call("verify", folder)
    table = [line.split(maxsplit=2) for line in str(caught.value).splitlines()[1:]]
    assert [row[0] for row in table] == ["file", "00000.tar", "00002.tar"]
    assert "20480 bytes     3072 bytes" in str(caught.value)


def test_stats_prints_a_table_and_draws_a_sheet(tmp_path, capsys):
    folder = shards(tmp_path / "in", labelled)
    call("index", folder, "--class-names", "cat,dog")
    capsys.readouterr()
    call("stats", folder, "--out", tmp_path / "sheet.png")
    printed = capsys.readouterr().out.splitlines()
    assert printed[4:6] == ["    0  cat        4    2", "    1  dog        4    2"]
    assert "all images 9 x 6 pixels (width x height), RGB" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "RGB"
        assert len(sheet.getcolors(10**6)) > 8
    with pytest.raises(ValueError, match=r"--out must end in \.png, got"):
        call("stats", folder, "--out", tmp_path / "sheet.jpg")


def test_every_error_ends_with_code_2(tmp_path, capsys):
    from maskgit_pl.cli import main

    (tmp_path / "empty").mkdir()
    for words in (
        ("verify", tmp_path / "nowhere"),
        ("verify", tmp_path / "empty"),
        ("stats", tmp_path / "empty"),
        ("index", "pipe:cat x"),
        ("index", tmp_path / "empty"),
        ("index", tmp_path / "empty", "--num-workers", "0"),
    ):
        assert main(["data", *map(str, words)]) == 2
        assert capsys.readouterr().err.startswith("maskgit data: ")


def test_verify_of_a_token_store_names_file_row_and_rule(tmp_path, capsys):
    description = StoreDescription((2, 2), 16, 8, "tokenizer", "data", ("a", "b"), {"train": 3, "val": 2})
    parts = StoreParts(tmp_path, description, part_size=8)
    for part in parts.parts():
        count = part.stop - part.start
        parts.write(part, np.zeros((count, 1, 4), np.int64), np.zeros(count, np.int64))
    parts.finish()
    assert call("verify", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 5 rows, 80 bytes: hashes and ranges agree with the description\n"
    np.save(tmp_path / "val-labels.npy", np.array([0, -1]))
    with pytest.raises(
        ValueError, match=r"1 file differs from store.json\n.*\n *val-labels\.npy .*-1 in row 1 .*\nregenerate it"
    ):
        call("verify", tmp_path)
    with pytest.raises(ValueError, match="--decode must be left out"):
        call("verify", tmp_path, "--decode")


@pytest.mark.parametrize("place", ["", "/*.tar", "/{00000..00002}.tar"])
def test_a_fifo_among_the_tars_is_refused_and_not_waited_for(tmp_path, place):
    folder = shards(tmp_path / "in", labelled)
    call("index", folder)
    (folder / "00001.tar").unlink()
    os.mkfifo(folder / "00001.tar")
    with pytest.raises(ValueError, match=r"00001\.tar: must be a regular file, got a FIFO"):
        call("index", f"{folder}{place}")
    with pytest.raises(ValueError, match=r"00001\.tar .*must be a regular file, got a FIFO"):
        call("verify", folder)
