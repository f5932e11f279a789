"""Chains of commands from files to an evaluation: images that are not square, with alpha."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.data.images import encode_png
from maskgit_pl.networks.classifiers import load_classifier
from tests.conftest import tiny_flags

OF_DATA = ("grid", "num_classes")  # sizes that the data and the tokenizer give
STAGE_2 = [
    *(word for word in tiny_flags("transformer") if not any(name in word for name in OF_DATA)),
    "--data.source=tokens",
    "--model.network.backbone=adaln",
]


def maskgit_runs(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def save_photos(folder: Path, *, channels: int, size: tuple[int, int]) -> Path:
    """Saves random PNG files of two classes; the left half is transparent if there are several channels."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for label, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = torch.from_numpy(generator.integers(90 * label, 90 * label + 90, (channels, *size), np.uint8))
                if channels > 1:
                    image[-1] = 255
                    image[-1, :, : size[1] // 2] = 0
                (folder / split / name / f"{number}.png").write_bytes(encode_png(image))
    return folder


def size_and_mode(file: Path) -> tuple[tuple[int, int], str]:
    with Image.open(file) as picture:
        return picture.size, picture.mode


@pytest.mark.slow  # 30 s
def test_images_of_24_by_40_pixels_go_from_files_to_an_evaluation(tmp_path: Path, quick_judge: None) -> None:
    photos = save_photos(tmp_path / "photos", channels=4, size=(30, 44))
    shards, run = tmp_path / "shards", tmp_path / "runs" / "wide"
    common = ("--recipe", "base", "--data", shards, "--run", run)
    wide = ("--data.image_size=[24,40]", "--data.in_channels=3", "--model.network.channel_multipliers=[1,1,1]")
    stage_1, stage_2 = (*common, *tiny_flags("tokenizer"), *wide), (*common, *STAGE_2)
    maskgit_runs("data", "make", photos, "--out", shards, "--image-size", "24,40")
    maskgit_runs("train", "tokenizer", *stage_1)
    assert size_and_mode(run / "tokenizer" / "reconstructions.png")[1] == "RGB"
    maskgit_runs("tokenize", *stage_2)
    stored = json.loads((run / "tokens" / "store.json").read_text())
    assert (stored["image_size"], stored["grid"]) == ([24, 40], [6, 10])
    maskgit_runs("train", "transformer", *stage_2)
    assert json.loads((run / "pretrained" / "tokenizer" / "config.json").read_text())["image_size"] == [24, 40]
    maskgit_runs("sample", run, "--classes", "a", "--per-class", 2, "--images", tmp_path / "made", "--gif",
                 tmp_path / "a.gif", "--filmstrip", tmp_path / "a-steps.png", "--out", tmp_path / "a.png")  # fmt: skip
    assert [size_and_mode(file) for file in (tmp_path / "made").glob("*.png")] == [((40, 24), "RGB")] * 2
    maskgit_runs("edit", run, photos / "val" / "a" / "0.png", "--box", "0,0,22,15", "--class", "b", "--fit", "--out",
                 tmp_path / "edited.png", "--images", tmp_path / "edited")  # fmt: skip
    assert size_and_mode(next((tmp_path / "edited").glob("*.png"))) == ((40, 24), "RGB")
    maskgit_runs("sample", run, "--num-images", 6, "--out", tmp_path / "many.npz")
    assert np.load(tmp_path / "many.npz")["arr_0"].shape == (6, 24, 40, 3)  # over white
    measured = (run, "--data", shards, "--num-images", 8, "--features", "classifier")
    classifier = ("--image-size", "24,40", "--channels", 3, "--runs-folder", tmp_path / "runs")
    maskgit_runs("train-classifier", "--data", shards, *classifier)
    maskgit_runs("evaluate", *measured, "--likelihood-images", 4)
    judge = load_classifier(tmp_path / "runs" / "shards-classifier" / "small").network.sizes
    assert (judge.in_channels, judge.image_size) == (3, (24, 40))
    assert json.loads((run / "evaluation.json").read_text())["model"]["image_size"] == [24, 40]
    maskgit_runs("evaluate-tokenizer", *measured)
    maskgit_runs("inspect", run, "--data", shards)
    maskgit_runs("doctor", "tokenizer", *stage_1)
    maskgit_runs("train", "transformer", *stage_2, "--trainer.max_steps=3")  # resumes
