import argparse
import subprocess
import sys

import pytest
import torch
from PIL import Image

from maskgit_pl.cli.data import add_parser, run
from maskgit_pl.shards.manifest import read_manifest_summary


def call(*words) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return run(parser.parse_args(["data", *map(str, words)]))


@pytest.fixture
def tree(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (12, 10), (number, 0, 0)).save(tmp_path / "tree" / name / f"{number}.png")
    return tmp_path / "tree"


def test_make_then_make_again_then_index_agree(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("make", tree, "--out", out, "--val-fraction", 0.25, "--size", 8) == 0
    assert "2 classes; 8 x 8 pixels, colour" in capsys.readouterr().out
    made = read_manifest_summary(out)
    assert sum(made.samples.values()) == 40
    call("make", tree, "--out", out, "--val-fraction", 0.25, "--size", 8)
    assert "nothing to do" in capsys.readouterr().out
    call("index", out, "--class-names", "cat,dog")
    assert read_manifest_summary(out) == made


def test_index_of_foreign_names_numbers_the_classes(tree, tmp_path):
    call("make", tree, "--out", tmp_path / "out")
    for split in ("train", "val"):
        (tmp_path / "out" / f"{split}-000000.tar").rename(tmp_path / "out" / f"{split == 'val':05d}.tar")
    call("index", tmp_path / "out", "--train", "{00000..00000}.tar", "--val", "00001.tar")
    assert read_manifest_summary(tmp_path / "out").classes == ("0", "1")


def test_user_errors_say_what_is_wrong(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call("make", tmp_path / "nowhere", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="names of its sub-folders"):
        call("make", tree, "--out", tmp_path / "out", "--class-names", "a,b")
    with pytest.raises(ValueError, match="val fraction"):
        call("make", tree, "--out", tmp_path / "out", "--val-fraction", "2")
    with pytest.raises(ValueError, match="nothing in"):
        call("index", tree)


def test_parser_needs_no_heavy_import():
    code = "import sys, maskgit_pl.cli.data; assert not {'torch', 'PIL', 'webdataset', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_console_script_makes_a_newcomers_folder(tmp_path, capsys):
    from maskgit_pl.cli import main
    from maskgit_pl.shards.images import encode_png
    from maskgit_pl.shards.manifest import read_manifest_summary

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

    (commands,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in commands.choices.items():
        assert callable(parser.get_default("run")), name
