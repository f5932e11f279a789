"""Data with vectors through the commands: make, train both stages, tokenize, sample and evaluate; and refusals."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.data.images import encode_png
from maskgit_pl.pipeline.pretrained import load_transformer
from tests.conftest import flags

DIM, SIDE = 3, 8
RECIPE = {
    "data": {"vectors": True, "source": "tokens", "global_batch": 8, "max_batch_per_device": 8, "validation_batch": 8,
             "num_workers": 0},
    "model": {
        "network": {"backbone": "adaln", "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32},
        "decoding": {"num_steps": 4},
    },
    "trainer": {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1},
}  # fmt: skip
TOKENIZER = {
    "data": {"image_size": 8, "in_channels": 1, "global_batch": 8, "max_batch_per_device": 8, "validation_batch": 8,
             "num_workers": 0},
    "model": {
        "network": {"base_channels": 8, "channel_multipliers": [1, 1], "num_res_blocks": 1, "num_middle_blocks": 1,
                    "num_groups": 2, "codebook_size": 16, "code_dim": 4, "patch_size": 1},
        "perceptual": None,
    },
    "trainer": {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1},
}  # fmt: skip


def maskgit(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of two classes with vectors."""
    folder = tmp_path_factory.mktemp("vectors")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate("ab"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                image = torch.from_numpy(generator.integers(100 * label, 100 * label + 90, (1, SIDE, SIDE), np.uint8))
                stem = folder / "photos" / split / name / str(number)
                stem.with_suffix(".png").write_bytes(encode_png(image))
                np.save(stem.with_suffix(".npy"), generator.normal(size=DIM).astype(np.float16))
    maskgit("data", "make", folder / "photos", "--out", folder / "shards")
    return folder


def common(place: Path, stage: str) -> Sequence[object]:
    recipe = TOKENIZER if stage == "tokenizer" else RECIPE
    return ("--recipe", "base", "--data", place / "shards", "--run", place / "runs" / "demo", *flags(recipe))


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    maskgit("train", "tokenizer", *common(place, "tokenizer"))
    maskgit("tokenize", *common(place, "transformer"))
    maskgit("train", "transformer", *common(place, "transformer"))
    return place / "runs" / "demo"


@pytest.mark.slow  # 10 s
def test_vectors_reach_the_exported_model_and_its_samples(place: Path, run: Path) -> None:
    assert (run / "transformer" / "samples.png").is_file()
    assert load_transformer(run / "pretrained" / "transformer").network.config.condition_dim == DIM
    np.save(place / "wanted.npy", np.random.default_rng(1).normal(size=(5, DIM)))
    maskgit("sample", run, "--classes", "a", "--vectors", place / "wanted.npy", "--images", place / "images",
            "--out", place / "samples.png", "--device", "cpu")  # fmt: skip
    assert len(list((place / "images").glob("*.png"))) == 5
    maskgit("sample", run, "--vectors", place / "wanted.npy", "--num-images", 6, "--out", place / "s.npz")
    assert np.load(place / "s.npz")["arr_0"].shape == (6, SIDE, SIDE, 3)


@pytest.mark.slow  # 10 s
def test_a_model_with_vectors_is_evaluated_with_those_of_the_val_split(
    place: Path, run: Path, quick_judge: None
) -> None:
    maskgit("evaluate", run, "--data", place / "shards", "--num-images", 8, "--features", "classifier",
            "--likelihood-images", 4)  # fmt: skip
    assert (run / "evaluation.json").is_file()


def test_wrong_vectors_are_refused(tiny_pretrained, tmp_path, capsys, monkeypatch) -> None:
    outline = MaskGIT.from_pretrained(tiny_pretrained).outline
    monkeypatch.setattr(MaskGIT, "outline", replace(outline, condition_dim=DIM))
    np.save(tmp_path / "wide.npy", np.zeros((2, DIM + 1)))
    np.save(tmp_path / "nan.npy", np.full((2, DIM), np.nan))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for words, message in (
        ((), f"--vectors must be given: the model was trained with a vector of {DIM} values"),
        (("--vectors", tmp_path / "wide.npy"), f"must hold floats of shape (n, {DIM})"),
        (("--vectors", tmp_path / "nan.npy"), "must be finite"),
        (("--vectors", tmp_path / "objects.npy"), "cannot be read"),
        (("--vectors", tmp_path / "missing.npy"), "missing.npy"),
    ):
        assert main([str(word) for word in ("sample", tiny_pretrained, "--out", tmp_path / "s.png", *words)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(MaskGIT, "outline", outline)
    words = ("sample", tiny_pretrained, "--out", tmp_path / "s.png", "--vectors", tmp_path / "wide.npy")
    assert main([str(word) for word in words]) == 2
    assert "--vectors must be left out" in capsys.readouterr().err


def test_accepted_images_have_one_vector(tiny_pretrained, tmp_path, capsys, monkeypatch) -> None:
    outline = MaskGIT.from_pretrained(tiny_pretrained).outline
    monkeypatch.setattr(MaskGIT, "outline", replace(outline, condition_dim=DIM))
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "config.json").write_text("{}")
    for rows, out in ((2, ("--out", tmp_path / "s.png")), (3, ("--num-images", 3, "--out", tmp_path / "s.npz"))):
        np.save(tmp_path / "wanted.npy", np.zeros((rows, DIM)))
        words = ("sample", tiny_pretrained, "--vectors", tmp_path / "wanted.npy", "--accept-rate", 0.5)
        assert main([str(word) for word in (*words, "--classifier", tmp_path / "classifier", *out)]) == 2
        expected = (
            f"wanted.npy must hold 1 vector with --accept-rate, which chooses among all images of a class, got {rows}"
        )
        assert expected in " ".join(capsys.readouterr().err.split())
    np.save(tmp_path / "wanted.npy", np.zeros((1, DIM)))
    assert main([str(word) for word in (*words, "--classifier", tmp_path / "classifier", *out)]) != 0
    assert "--vectors" not in capsys.readouterr().err  # but the classifier, which is none


def test_a_recipe_that_takes_vectors_needs_a_backbone_and_data_with_them(
    place: Path, tiny_shards, tiny_pretrained, capsys
) -> None:
    shutil.copytree(tiny_pretrained / "tokenizer", place / "given", dirs_exist_ok=True)
    options = ("--recipe", "base", *flags(RECIPE), "--tokenizer", place / "given", "--run", place / "runs" / "no")
    assert main([*map(str, ("train", "transformer", *options, "--data", tiny_shards)), "--data.source=images"]) == 2
    assert "data.vectors must be false" in capsys.readouterr().err
    words = ("train", "transformer", *options, "--data", place / "shards", "--data.source=images")
    assert main([str(word) for word in words if "adaln" not in str(word)]) == 2  # bert, the default
    assert "condition_dim must be 0 for the backbone bert" in capsys.readouterr().err
    assert main([*map(str, words), "--data.vectors=false", "--model.network.condition_dim=3"]) == 2
    assert "model.network.condition_dim must be 0, without data.vectors: true, got 3" in capsys.readouterr().err
