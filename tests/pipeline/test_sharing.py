"""Folders and repositories: what is found, what is fetched, what is told of it. No network.

The model in the package: what it was trained with, that it draws clothes, and how its name is found.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskgit_pl.cli import main
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.opening import find_run
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pipeline import MaskGIT, sharing
from maskgit_pl.pipeline.pretrained import read_decoding, save_decoding
from maskgit_pl.pipeline.sharing import bundled_models, find_folder
from maskgit_pl.runs.layers import merge
from maskgit_pl.runs.recipe import STAGES, Recipe
from maskgit_pl.runs.resolve import choose_precision, values_without_data
from maskgit_pl.runs.settings import resolve
from tests.conftest import CLASSES, save_tiny_pretrained
from tests.modules import masked_model

TUNED = DecodingConfig(3, "margin", sampling_temperature=(1.2, 0.7))


def images(pipe: MaskGIT) -> torch.Tensor:
    return pipe.generate([0, 1, 2], output_type="pt")


def test_a_folder_that_is_not_there_is_told_as_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in (
        tmp_path / "nowhere",
        "runs/nowhere",
        "./owner/name",
        "../owner/name",
        "one",
        "a/b/c",
        "~/name",
        "a//b",
    ):
        with pytest.raises(FileNotFoundError, match="no such folder; train one with `maskgit demo`, or name another"):
            sharing.find_folder(path)


@pytest.mark.parametrize("missing", ["runs/one-cosine", "pretrained/places512"])
def test_our_own_folders_are_paths_whether_they_are_there_or_not(missing: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"run {missing}: no such folder; train one"):
        MaskGIT.from_pretrained(missing)


@pytest.mark.parametrize(
    ("missing", "nearest"),
    [
        ("runs/one-cosin", "runs/one-cosine"),
        ("run/one-cosine", None),
        ("./run/one-cosine", "runs"),
        ("runs/one-cosin/pretrained", "runs/one-cosine"),
        ("runs/one-cosine/pretraned", "runs/one-cosine/pretrained"),
        ("runs/xyz", None),
    ],
)
def test_a_mistyped_folder_is_answered_with_the_nearest(
    missing: str, nearest: str | None, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one-cosine" / "pretrained").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        sharing.find_folder(missing, cache_dir=tmp_path / "cache", local_files_only=True)
    assert (f"did you mean {nearest}?" in str(caught.value)) == (nearest is not None)


def test_a_run_folder_is_read_like_its_pretrained_folder(tiny_pretrained: Path) -> None:
    assert tiny_pretrained.name == "pretrained"
    pipe = MaskGIT.from_pretrained(tiny_pretrained.parent)
    assert torch.equal(images(pipe), images(MaskGIT.from_pretrained(tiny_pretrained)))


def test_a_stage_that_is_missing_is_named_with_what_makes_it(tiny_pretrained: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pretrained / "tokenizer", tmp_path / "one" / "pretrained" / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"no transformer in .*; `maskgit train transformer` writes it"):
        MaskGIT.from_pretrained(tmp_path / "one")


def test_a_repository_that_is_not_in_the_cache_is_told_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        MaskGIT.from_pretrained("owner/name", cache_dir=tmp_path / "cache", local_files_only=True)
    assert str(caught.value).startswith("hub owner/name: no such folder, not in the cache")
    assert "or name a folder, such as runs/RUN/pretrained" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_offline_the_hub_is_not_asked(tmp_path: Path) -> None:
    code = "from maskgit_pl import MaskGIT; MaskGIT.from_pretrained('owner/name')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError: hub owner/name: no such folder, not in")


def cached(cache: Path, folder: Path) -> None:
    """A folder as the Hub's client would have left it in its cache."""
    commit = "0" * 40
    home = cache / "models--owner--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(folder)


def test_a_repository_in_the_cache_is_read_like_a_folder(tiny_pretrained: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cached(tmp_path / "cache", tiny_pretrained)
    pipe = MaskGIT.from_pretrained("owner/name", cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(images(pipe), images(MaskGIT.from_pretrained(tiny_pretrained)))
    (tmp_path / "owner" / "name").mkdir(parents=True)  # a folder of that name comes first
    with pytest.raises(FileNotFoundError, match="run owner/name: no tokenizer in owner/name"):
        MaskGIT.from_pretrained("owner/name", cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_repository_of_something_else_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    cached(tmp_path / "cache", tmp_path / "other")
    with pytest.raises(ValueError, match=r"maskgit push` wrote, but tokenizer/config\.json is missing"):
        sharing.find_folder("owner/name", cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_saved_pipeline_stands_alone(tiny_pretrained: Path, tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    pipe.save_pretrained(tmp_path / "copy")
    files = sorted(
        str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()
    )
    assert files == [
        "README.md", "config.json", "tokenizer/config.json", "tokenizer/model.safetensors",
        "transformer/config.json", "transformer/model.safetensors",
    ]  # fmt: skip
    assert torch.equal(images(MaskGIT.from_pretrained(tmp_path / "copy")), images(pipe))
    assert not (tiny_pretrained / "config.json").exists()  # a folder without it is read too


def test_an_exported_model_is_read_with_its_tokenizer(tiny_pretrained: Path, tmp_path: Path) -> None:
    network = TransformerConfig(16, 3, (4, 4), 16, 1, 2, 32)
    model = masked_model(network, tiny_pretrained / "tokenizer")
    for _ in range(2):  # the second time over the first
        model.export(tmp_path / "out", class_names=CLASSES)
        pipe = MaskGIT.from_pretrained(tmp_path / "out")
    assert pipe.class_names == CLASSES
    assert pipe.tokenizer.fingerprint == MaskGIT.from_pretrained(tiny_pretrained).tokenizer.fingerprint
    assert len(pipe.generate("Trouser", num_steps=2)) == 1


def test_a_model_exported_beside_its_tokenizer_leaves_it_as_it_is(tiny_pretrained: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pretrained / "tokenizer", tmp_path / "tokenizer")
    network = TransformerConfig(16, 3, (4, 4), 16, 1, 2, 32)
    masked_model(network, tmp_path / "tokenizer").export(tmp_path, class_names=CLASSES)
    assert len(MaskGIT.from_pretrained(tmp_path).generate(0, num_steps=2)) == 1


def test_a_tuned_way_of_decoding_goes_with_the_weights(tmp_path: Path, caplog) -> None:
    folder = save_tiny_pretrained(tmp_path / "model")
    own = MaskGIT.from_pretrained(folder)
    save_decoding(folder, TUNED, tuned={"metric": "fid"})
    pipe = MaskGIT.from_pretrained(folder)
    assert pipe.decoding == TUNED != own.decoding
    pipe.to("cpu", dtype=torch.bfloat16).save_pretrained(tmp_path / "copy")
    again = MaskGIT.from_pretrained(tmp_path / "copy")
    assert again.decoding == TUNED
    assert again.transformer.decoding == own.decoding  # as it was exported
    assert '"metric": "fid"' in (tmp_path / "copy" / "decoding.json").read_text()
    assert not caplog.records  # no word of other weights
    own.save_pretrained(tmp_path / "copy")
    assert read_decoding(tmp_path / "copy") is None


def test_decoding_is_given_as_a_recipe_or_as_its_file(tiny_pretrained: Path, tmp_path: Path) -> None:
    folder = save_tiny_pretrained(tmp_path / "model")
    save_decoding(folder, TUNED, tuned={"metric": "fid"})
    for decoding in (TUNED, folder / "decoding.json", str(folder / "decoding.json")):
        assert MaskGIT.from_pretrained(tiny_pretrained, decoding=decoding).decoding == TUNED
    given = MaskGIT.from_pretrained(folder, decoding=DecodingConfig(2))
    assert given.decoding == DecodingConfig(2)
    assert given.decoding_with(num_steps=5) == DecodingConfig(5)
    with pytest.raises(FileNotFoundError, match=r"decoding nowhere\.json: no such file"):
        MaskGIT.from_pretrained(folder, decoding="nowhere.json")


def test_a_config_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_pretrained(tmp_path)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"format must be 'maskgit_pl\.pipeline', got None"):
        MaskGIT.from_pretrained(folder)


def test_an_unknown_argument_is_refused_for_a_folder_too(tiny_pretrained):
    with pytest.raises(TypeError, match="takes no argument 'revison'; options of a download: revision, cache_dir"):
        MaskGIT.from_pretrained(tiny_pretrained, revison="main")


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
    values = resolve(stage, merge([values_without_data(stage), recipe.tree]))
    given["trainer.precision"] = choose_precision(values.trainer, values.model.network, stage, Path("nowhere"))
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
