"""Images that are not square, with alpha in their files, through the commands: from files to an evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.data.images import encode_png
from maskgit_pl.evaluation import train_classifier
from maskgit_pl.evaluation.options import ClassifierConfig
from maskgit_pl.networks.feature_networks import load_classifier
from tests.conftest import save_tiny_pretrained, tiny_flags

WIDE = ("--data.image_size=[24,40]", "--data.in_channels=3", "--model.network.channel_multipliers=[1,1,1]")


def maskgit(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def size_and_mode(file: Path) -> tuple[tuple[int, int], str]:
    with Image.open(file) as picture:
        return picture.size, picture.mode


def save_photos(folder: Path, *, channels: int, height: int, width: int) -> Path:
    """Saves PNG files with alpha, of two classes, with random pixels and a transparent left half."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for label, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                low = 100 * label
                image = torch.from_numpy(generator.integers(low, low + 90, (channels, height, width), np.uint8))
                image[-1] = 255
                image[-1, :, : width // 2] = 0
                (folder / split / name / f"{number}.png").write_bytes(encode_png(image))
    return folder


@pytest.mark.slow  # 30 s
def test_images_of_24_by_40_pixels_go_from_files_to_an_evaluation(tmp_path: Path, quick_judge: None) -> None:
    photos = save_photos(tmp_path / "photos", channels=4, height=30, width=44)
    shards, run = tmp_path / "shards", tmp_path / "runs" / "wide"
    common = ("--recipe", "base", "--data", shards, "--run", run)
    stage_1 = (*common, *tiny_flags("tokenizer"), *WIDE)
    own = [word for word in tiny_flags("transformer") if "grid" not in word and "num_classes" not in word]
    stage_2 = (*common, *own, "--data.source=tokens", "--model.network.backbone=adaln")
    maskgit("data", "make", photos, "--out", shards, "--image-size", "24,40")
    maskgit("train", "tokenizer", *stage_1)
    assert size_and_mode(run / "tokenizer" / "reconstructions.png")[1] == "RGB"
    maskgit("tokenize", *stage_2)
    stored = json.loads((run / "tokens" / "store.json").read_text())
    assert (stored["image_size"], stored["grid"]) == ([24, 40], [6, 10])
    maskgit("train", "transformer", *stage_2)
    # The exported folder has the size of the images.
    assert json.loads((run / "pretrained" / "tokenizer" / "config.json").read_text())["image_size"] == [24, 40]
    maskgit("sample", run, "--classes", "a", "--per-class", 2, "--images", tmp_path / "made", "--gif",
            tmp_path / "a.gif", "--filmstrip", tmp_path / "a-steps.png", "--out", tmp_path / "a.png")  # fmt: skip
    assert [size_and_mode(file) for file in (tmp_path / "made").glob("*.png")] == [((40, 24), "RGB")] * 2
    maskgit("edit", run, photos / "val" / "a" / "0.png", "--box", "0,0,50%,50%", "--class", "b", "--fit", "--out",
            tmp_path / "edited.png", "--images", tmp_path / "edited")  # fmt: skip
    assert size_and_mode(next((tmp_path / "edited").glob("*.png"))) == ((40, 24), "RGB")
    maskgit("sample", run, "--num-images", 6, "--out", tmp_path / "many.npz")
    assert np.load(tmp_path / "many.npz")["arr_0"].shape == (6, 24, 40, 3)  # over white
    measured = (run, "--data", shards, "--num-images", 8, "--features", "classifier")
    maskgit("evaluate", *measured, "--likelihood-images", 4)
    judge = load_classifier(tmp_path / "runs" / "shards-classifier" / "small").network.sizes
    assert (judge.in_channels, judge.image_size) == (3, (24, 40))
    assert json.loads((run / "evaluation.json").read_text())["model"]["image_size"] == [24, 40]
    maskgit("evaluate-tokenizer", *measured)
    maskgit("inspect", run, "--data", shards)
    maskgit("doctor", "tokenizer", *stage_1)
    maskgit("train", "transformer", *stage_2, "--trainer.max_steps=3")  # resumes


def test_a_model_of_wide_images_generates_edits_and_extends_them(tmp_path: Path) -> None:
    save_tiny_pretrained(tmp_path / "wide", image_size=(8, 16))
    pipe = MaskGIT.from_pretrained(tmp_path / "wide")
    assert "grey images of 16 x 8 pixels, 4 x 8 tokens" in repr(pipe)
    image = pipe.generate([0], seed=3, output_type="pt")[0]
    assert image.shape == (1, 8, 16)
    # The right half is new; without blending, the left half is the original.
    kept = pipe.edit_class(image, (8, 0, 16, 8), 1, blend=0.0, dilation=0, output_type="pt")[0]
    assert torch.equal(kept[..., :8], image[..., :8])
    tall = torch.randint(0, 256, (1, 30, 16), dtype=torch.uint8)
    everything = torch.ones(30, 16, dtype=torch.bool)
    assert pipe.inpaint(tall, everything, classes=[0], fit=True, output_type="pt").shape == (1, 1, 8, 16)
    assert pipe.outpaint(image, down=4, right=2, classes=[0], output_type="pt").shape == (1, 1, 12, 18)
    assert pipe.panorama([0], 20, output_type="pt").shape == (1, 1, 8, 20)
    pipe.save_pretrained(tmp_path / "again")
    assert MaskGIT.from_pretrained(tmp_path / "again").tokenizer.image_size == (8, 16)


def test_a_recipe_with_a_size_of_another_kind_is_refused(tiny_shards: Path, tmp_path: Path, capsys) -> None:
    words = ("train", "tokenizer", "--recipe", "base", "--data", tiny_shards, "--run", tmp_path / "runs" / "no")
    for size in ("[24]", "[24,40,3]", "[24,0]", "wide"):
        assert main([*map(str, words), f"--data.image_size={size}"]) == 2
        assert "data.image_size must be" in capsys.readouterr().err


def test_the_classifier_of_the_data_needs_no_square_images(tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", channels=2, height=12, width=20)
    maskgit("data", "make", photos, "--out", tmp_path / "shards")
    options = {"config": ClassifierConfig(width=4, max_steps=2, batch=8), "out": tmp_path / "judge", "device": "cpu"}
    assert not train_classifier(tmp_path / "shards", **options).is_reused
    assert train_classifier(tmp_path / "shards", **options).is_reused
    assert load_classifier(tmp_path / "judge").network.sizes.image_size == (12, 20)
