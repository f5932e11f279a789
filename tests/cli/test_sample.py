import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.cli import sample
from maskgit_pl.pipeline import MaskGIT


def call(*words: object) -> int:
    parser = argparse.ArgumentParser()
    sample.add_parser(parser.add_subparsers())
    args = parser.parse_args(["sample", *map(str, words), "--device", "cpu"])
    code: int = args.run(args)
    return code


def test_writes_a_picture_single_files_and_an_animation(tiny_pretrained: Path, tmp_path: Path, capsys) -> None:
    out, images, gif = tmp_path / "samples.png", tmp_path / "images", tmp_path / "decoding.gif"
    code = call(
        tiny_pretrained, "--classes", "2,T-shirt", "--per-class", 3, "--steps", 5, "--seed", 7,
        "--out", out, "--images", images, "--gif", gif,
    )  # fmt: skip
    assert code == 0
    names = sorted(path.name for path in images.iterdir())
    assert names[0] == "class-0001-seed-000010.png"
    assert len(names) == 6
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.generate([2, 2, 2, 1, 1, 1], seed=7, num_steps=5, output_type="np")
    with Image.open(images / "class-0002-seed-000008.png") as picture:
        assert picture.mode == "L"
        assert (np.asarray(picture) == expected[1, ..., 0]).all()
    with Image.open(gif) as animation:
        assert animation.n_frames == 5
    assert out.is_file()
    assert "6 images of 2 classes, 5 steps each" in capsys.readouterr().out


def test_a_run_folder_stands_for_its_pretrained_folder(tiny_pretrained: Path, tmp_path: Path) -> None:
    assert sample.pretrained_folder(tiny_pretrained.parent) == tiny_pretrained
    assert sample.pretrained_folder(tiny_pretrained) == tiny_pretrained
    assert call(tiny_pretrained.parent, "--per-class", 1, "--out", tmp_path / "all.png") == 0
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.height == 8 + 3 * 88 + 2 * 4 + 8  # all three classes, 8 px shown as 88


def test_what_is_missing_is_named(tiny_pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        call(tmp_path / "nowhere")
    shutil.copytree(tiny_pretrained / "tokenizer", tmp_path / "pretrained" / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"no transformer in .*maskgit train transformer"):
        call(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "Trousers"], "did you mean 'Trouser'"),
        (["--classes", "17"], r"class 17: a number in \[0, 3\)"),
        (["--classes", ","], "at least one"),
        (["--per-class", "0"], "--per-class: at least 1"),
        (["--batch", "0"], "batch_size: at least 1"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(
    words: list[str], message: str, tiny_pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_pretrained, *words, "--out", tmp_path / "samples.png")
    assert list(tmp_path.iterdir()) == []
