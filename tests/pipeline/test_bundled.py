"""The model in the package: what it was trained with, that it draws clothes, and how its name is found."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.pipeline.sharing import bundled_models, find_folder
from maskgit_pl.runs.recipe import STAGES, Recipe
from maskgit_pl.runs.resolve import choose_precision, resolve

NAME = "fashion-mnist-demo"
MAX_BYTES = 6_000_000


@pytest.fixture(scope="module")
def pipe() -> MaskGIT:
    return MaskGIT.from_pretrained(NAME)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_package_has_one_small_model_and_nothing_but_weights_and_facts() -> None:
    assert [*bundled_models()] == [NAME]
    files = {file.relative_to(bundled_models()[NAME]).as_posix(): file for file in bundled_models()[NAME].rglob("*.*")}
    parts = [f"{stage}/{file}" for stage in STAGES for file in ("config.json", "model.safetensors")]
    assert sorted(files) == sorted(["README.md", "config.json", *parts])
    assert sum(file.stat().st_size for file in files.values()) < MAX_BYTES


@pytest.mark.parametrize("stage", STAGES)
def test_it_was_trained_with_the_recipe_of_the_demo(stage) -> None:
    run = json.loads((bundled_models()[NAME] / "config.json").read_text())["run"]
    recipe, settings = Recipe.read(stage, names=run[stage]["recipe"]), run[stage]["settings"]
    assert recipe.run_name == run["name"] == "fashion-mnist-adaln"  # the demo's
    assert {"trainer.max_steps", "data.global_batch", "model.ema_decay"} <= settings.keys()
    given = {key: recipe.get(key) for key in settings if recipe.get(key) is not None}
    given["trainer.precision"] = choose_precision(resolve(stage, recipe.tree), stage, Path("nowhere"))
    assert len(given) > 4
    for key, value in given.items():
        trained = settings[key]
        assert (trained.items() >= value.items()) if isinstance(value, dict) else trained == value, key
    assert run["measured"]["figures"]["samples.exported_guidance.class_agreement"] > 0.9


def test_the_decoding_is_that_of_the_recipe(pipe: MaskGIT) -> None:
    wanted = Recipe.read("transformer", names="adaln").get("model.decoding")
    assert pipe.decoding.num_steps == wanted["num_steps"]
    assert pipe.decoding.guidance == wanted["guidance"]
    assert pipe.decoding.token_selector == wanted["token_selector"]


@pytest.mark.slow
def test_it_draws_what_was_asked_for(pipe: MaskGIT) -> None:
    trousers, bags = (pipe.generate([name] * 8, seed=0, output_type="pt").float() for name in ("Trouser", "Bag"))
    again = pipe.generate(["Trouser"] * 8, seed=0, output_type="pt").float()
    assert torch.equal(trousers, again)
    # Trousers are narrow and high, bags are wide and leave the top of the image empty.
    narrow, wide = (images.mean(1) > 0.2 * images.max() for images in (trousers, bags))  # (8, 28, 28) bool
    assert (narrow.any(1).sum(1) < wide.any(1).sum(1)).float().mean() > 0.7
    assert narrow[:, 3].any(1).sum() > wide[:, 3].any(1).sum()
    assert len({image.numpy().tobytes() for image in trousers}) == 8  # no two alike


def test_a_folder_of_the_same_name_comes_first(empty: Path, tiny_pretrained: Path) -> None:
    assert find_folder(NAME) == bundled_models()[NAME]
    shutil.copytree(tiny_pretrained, empty / NAME)
    assert find_folder(NAME) == Path(NAME)
    (empty / NAME / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no transformer in fashion-mnist-demo"):
        find_folder(NAME)


@pytest.mark.parametrize("name", ["fashion-mnist-dem", "nothing", "x.png"])
def test_a_name_that_is_neither_is_answered_with_the_models_there_are(name: str, empty: Path, capsys) -> None:
    assert main(["sample", name]) == 2
    said = capsys.readouterr().err
    assert f"run {name}: no such folder" in said
    assert said.endswith(f"Models of the package: {NAME}\n")
    assert ("did you mean fashion-mnist-demo?" in said) is name.startswith("fashion")


@pytest.mark.slow
def test_pictures_are_made_before_anything_is_trained(empty: Path, capsys) -> None:
    assert main(["sample", NAME, "--classes", "Bag", "--per-class", "2", "--images", "bags"]) == 0
    (first, _) = sorted((empty / "bags").glob("*.png"))
    assert main(["edit", NAME, str(first), "--box", "0,0,28,14", "--class", "Ankle boot", "--out", "boot.png"]) == 0
    assert (empty / "boot.png").is_file()


def test_its_measurements_are_not_written_into_the_package(empty: Path) -> None:
    folders = find_run(NAME, data=empty)
    assert folders.run == Path("runs", NAME)
    assert folders.pretrained == bundled_models()[NAME]
