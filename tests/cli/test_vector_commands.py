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
from tests.cli.commands import refused
from tests.conftest import tiny_flags

DIM, SIDE = 3, 8
OF_DATA = ("grid", "num_classes")  # sizes that the data and the tokenizer give
STAGE_2 = [
    *(word for word in tiny_flags("transformer") if not any(name in word for name in OF_DATA)),
    "--data.vectors=true",
    "--model.network.backbone=adaln",
]


def run_command(*words: object) -> None:
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
    run_command("data", "make", folder / "photos", "--out", folder / "shards")
    return folder


def common(place: Path, stage: str) -> Sequence[object]:
    words = tiny_flags(stage) if stage == "tokenizer" else [*STAGE_2, "--data.source=tokens"]
    return ("--recipe", "base", "--data", place / "shards", "--run", place / "runs" / "demo", *words)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    run_command("train", "tokenizer", *common(place, "tokenizer"))
    run_command("tokenize", *common(place, "transformer"))
    run_command("train", "transformer", *common(place, "transformer"))
    return place / "runs" / "demo"


@pytest.mark.slow  # 10 s
def test_vectors_reach_the_exported_model_and_its_samples(place: Path, run: Path) -> None:
    assert (run / "transformer" / "samples.png").is_file()
    assert load_transformer(run / "pretrained" / "transformer").network.config.condition_dim == DIM
    np.save(place / "wanted.npy", np.random.default_rng(1).normal(size=(5, DIM)))
    run_command("sample", run, "--classes", "a", "--vectors", place / "wanted.npy", "--images", place / "images",
            "--out", place / "samples.png", "--device", "cpu")  # fmt: skip
    assert len(list((place / "images").glob("*.png"))) == 5
    run_command("sample", run, "--vectors", place / "wanted.npy", "--num-images", 6, "--out", place / "s.npz")
    assert np.load(place / "s.npz")["arr_0"].shape == (6, SIDE, SIDE, 3)


@pytest.mark.slow  # 10 s
def test_a_model_with_vectors_is_evaluated_with_those_of_the_val_split(
    place: Path, run: Path, quick_judge: None
) -> None:
    run_command("evaluate", run, "--data", place / "shards", "--num-images", 8, "--features", "classifier",
            "--likelihood-images", 4)  # fmt: skip
    assert (run / "evaluation.json").is_file()


@pytest.fixture
def with_vectors(tiny_pretrained, monkeypatch) -> None:
    """Models take a vector for each image, whatever their folder says."""
    outline = MaskGIT.from_pretrained(tiny_pretrained).outline
    monkeypatch.setattr(MaskGIT, "outline", replace(outline, condition_dim=DIM))


def test_wrong_vectors_are_refused(with_vectors, maskgit, tiny_pretrained, tmp_path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((2, DIM + 1)))
    np.save(tmp_path / "nan.npy", np.full((2, DIM), np.nan))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    sample = ("sample", tiny_pretrained, "--out", tmp_path / "s.png")
    for words, message in (
        ((), f"--vectors must be given: the model was trained with a vector of {DIM} values"),
        (("--vectors", tmp_path / "wide.npy"), f"must hold floats of shape (n, {DIM})"),
        (("--vectors", tmp_path / "nan.npy"), "must be finite"),
        (("--vectors", tmp_path / "objects.npy"), "cannot be read"),
        (("--vectors", tmp_path / "missing.npy"), "missing.npy"),
    ):
        refused(maskgit(*sample, *words), message)


def test_a_model_without_vectors_takes_none(maskgit, tiny_pretrained, tmp_path) -> None:
    words = ("sample", tiny_pretrained, "--out", tmp_path / "s.png", "--vectors", tmp_path / "any.npy")
    refused(maskgit(*words), "--vectors must be left out")


def test_accepted_images_have_one_vector(with_vectors, maskgit, tiny_pretrained, tmp_path) -> None:
    np.save(tmp_path / "wanted.npy", np.zeros((2, DIM)))
    words = ("--vectors", tmp_path / "wanted.npy", "--accept-rate", 0.5, "--classifier", tmp_path)
    answer = maskgit("sample", tiny_pretrained, *words, "--out", tmp_path / "s.png")
    refused(answer, "must hold 1 vector with --accept-rate, which chooses among all images of a class, got 2")


def test_a_recipe_that_takes_vectors_needs_a_backbone_and_data_with_them(
    place: Path, maskgit, tiny_shards, tiny_pretrained
) -> None:
    shutil.copytree(tiny_pretrained / "tokenizer", place / "given", dirs_exist_ok=True)
    where = ("--recipe", "base", "--tokenizer", place / "given", "--run", place / "runs" / "no")
    train = ("train", "transformer", *where, *STAGE_2, "--data")
    refused(maskgit(*train, tiny_shards), "data.vectors must be false")
    of_bert = maskgit(*train, place / "shards", "--model.network.backbone=bert")
    refused(of_bert, "condition_dim must be 0 for the backbone bert")
    without = maskgit(*train, place / "shards", "--data.vectors=false", "--model.network.condition_dim=3")
    refused(without, "model.network.condition_dim must be 0", "data.vectors False, got 3")
