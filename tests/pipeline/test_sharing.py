"""Pretrained folders: found on this machine, in the package or in the cache of the Hub, and written. No network."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.sharing import bundled_models, find_folder
from maskgit_pl.pretrained.networks import read_decoding, save_decoding
from maskgit_pl.runs.recipe import STAGES, Recipe
from tests.conftest import CLASSES, save_tiny_pretrained
from tests.pipeline.conftest import images
from tests.short_runs import masked_model

ROOT = Path(__file__).parents[2]

TUNED = DecodingConfig(3, "margin", sampling_temperature=(1.2, 0.7))
NAME = "fashion-mnist-demo"
MAX_BYTES = 6_000_000


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["nowhere", "runs/nowhere", "./owner/name", "one", "a/b/c", "~/name", "pretrained/x"])
def test_a_missing_folder_is_refused_in_one_line(path: str, empty: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; train one with `maskgit demo`, or name another"):
        find_folder(path)


@pytest.mark.parametrize(
    ("missing", "nearest"),
    [
        ("runs/one-cosin", "runs/one-cosine"),
        ("run/one-cosine", None),
        ("runs/mine", None),  # "runs/tokens" is like it by its parent only
        ("runs/one-cosine/pretraned", "runs/one-cosine/pretrained"),
    ],
)
def test_a_mistyped_folder_is_answered_with_the_nearest(missing: str, nearest: str | None, empty: Path) -> None:
    (empty / "runs" / "one-cosine" / "pretrained").mkdir(parents=True)
    (empty / "runs" / "tokens").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        find_folder(missing, cache_dir=empty / "cache", local_files_only=True)
    assert ("did you mean" in str(caught.value)) == (nearest is not None)
    assert (f"did you mean '{nearest}'?" in str(caught.value)) == (nearest is not None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"torch_dtype": torch.float16}, TypeError, "option 'torch_dtype': did you mean 'dtype'? known: cache_dir, "),
        ({"foo": 1}, TypeError, "option 'foo': known: cache_dir, decoding, device, "),
        ({"revision": "main"}, ValueError, "revision must be left out for the folder "),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(options, error, message: str, tiny_pretrained: Path) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        MaskGIT.from_pretrained(tiny_pretrained, **options)


def test_a_run_is_read_like_its_pretrained_folder(tiny_pretrained: Path, tmp_path: Path) -> None:
    assert find_folder(tiny_pretrained.parent) == tiny_pretrained
    shutil.copytree(tiny_pretrained / "tokenizer", tmp_path / "one" / "pretrained" / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"no transformer in .*; `maskgit train transformer` writes it"):
        MaskGIT.from_pretrained(tmp_path / "one")


def test_a_repository_that_is_not_in_the_cache_is_refused_in_one_line(empty: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^hub owner/name: no such folder, and not found on the Hub") as caught:
        MaskGIT.from_pretrained("owner/name", cache_dir=empty / "cache", local_files_only=True)
    assert "\n" not in str(caught.value)


def cached(cache: Path, folder: Path) -> None:
    """Links a folder as the client of the Hub keeps a repository in its cache."""
    commit = "0" * 40
    home = cache / "models--owner--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(folder)


def test_a_repository_in_the_cache_is_read_like_a_folder(pipe, tiny_pretrained: Path, empty: Path) -> None:
    options = {"cache_dir": empty / "cache", "local_files_only": True}
    cached(empty / "cache", tiny_pretrained)
    assert torch.equal(images(MaskGIT.from_pretrained("owner/name", **options), [0, 1]), images(pipe, [0, 1]))
    (empty / "owner" / "name").mkdir(parents=True)  # a folder of that name comes first
    with pytest.raises(FileNotFoundError, match="run owner/name: no tokenizer in owner/name"):
        MaskGIT.from_pretrained("owner/name", **options)


def test_a_repository_of_another_kind_is_refused(empty: Path) -> None:
    (empty / "other").mkdir()
    (empty / "other" / "model.safetensors").write_bytes(b"")
    cached(empty / "cache", empty / "other")
    with pytest.raises(ValueError, match=r"maskgit push` wrote, but tokenizer/config\.json is missing"):
        find_folder("owner/name", cache_dir=empty / "cache", local_files_only=True)


def test_a_saved_pipeline_has_these_files_only(pipe, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    stages = [f"{stage}/{file}" for stage in STAGES for file in ("config.json", "model.safetensors")]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"README.md", "config.json", *stages}
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"format must be 'maskgit_pl\.pipeline', got None"):
        MaskGIT.from_pretrained(tmp_path).save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("is_beside", [False, True])
def test_an_exported_model_is_read_with_its_tokenizer(tiny_pretrained: Path, tmp_path: Path, is_beside: bool) -> None:
    tokenizer = tiny_pretrained / "tokenizer"
    if is_beside:
        tokenizer = Path(shutil.copytree(tokenizer, tmp_path / "tokenizer"))
    model = masked_model(TransformerConfig(16, 3, (4, 4), 16, 1, 2, 32), tokenizer)
    for _ in range(2):  # the second time over the first
        model.export(tmp_path, class_names=CLASSES)
        pipe = MaskGIT.from_pretrained(tmp_path)
    assert pipe.class_names == CLASSES
    assert pipe.tokenizer.fingerprint == MaskGIT.from_pretrained(tiny_pretrained).tokenizer.fingerprint
    assert len(pipe.generate("Trouser", num_steps=2)) == 1


def test_tuned_decoding_settings_are_saved_with_the_weights(tmp_path: Path, caplog) -> None:
    folder = save_tiny_pretrained(tmp_path / "model")
    own = MaskGIT.from_pretrained(folder)
    save_decoding(folder, TUNED, tuned={"metric": "fid"})
    pipe = MaskGIT.from_pretrained(folder)
    assert pipe.decoding == TUNED != own.decoding
    assert MaskGIT.from_pretrained(folder, decoding=DecodingConfig(2)).decoding == DecodingConfig(2)
    pipe.to("cpu", dtype=torch.bfloat16).save_pretrained(tmp_path / "copy")
    again = MaskGIT.from_pretrained(tmp_path / "copy")
    assert again.decoding == TUNED
    assert again.transformer.decoding == own.decoding  # as it was exported
    assert not caplog.records  # no warning of other weights
    own.save_pretrained(tmp_path / "copy")
    assert read_decoding(tmp_path / "copy") is None


def test_the_package_has_one_small_model() -> None:
    assert [*bundled_models()] == [NAME]
    files = {file.relative_to(bundled_models()[NAME]).as_posix(): file for file in bundled_models()[NAME].rglob("*.*")}
    stages = [f"{stage}/{file}" for stage in STAGES for file in ("config.json", "model.safetensors")]
    assert sorted(files) == sorted(["README.md", "config.json", *stages])
    assert sum(file.stat().st_size for file in files.values()) < MAX_BYTES


@pytest.mark.parametrize("stage", STAGES)
def test_the_model_was_trained_with_the_recipe_of_the_demo(stage) -> None:
    run = json.loads((bundled_models()[NAME] / "config.json").read_text())["run"]
    recipe, settings = Recipe.read(stage, names=run[stage]["recipe"]), run[stage]["settings"]
    assert recipe.run_name == run["name"] == "fashion-mnist-adaln"  # the demo's
    assert {"trainer.max_steps", "data.global_batch", "model.ema_decay"} <= settings.keys()
    given = {key: recipe.get(key) for key in settings if recipe.get(key) is not None}
    assert given.pop("trainer.precision") == "auto"
    assert settings["trainer.precision"] in ("32-true", "bf16-mixed")
    assert len(given) > 4
    for key, value in given.items():
        trained = settings[key]
        assert (trained.items() >= value.items()) if isinstance(value, dict) else trained == value, key
    assert run["measured"]["figures"]["samples.exported_guidance.class_agreement"] > 0.9


def test_the_decoding_settings_are_those_of_the_recipe(demo) -> None:
    settings = Recipe.read("transformer", names="adaln").get("model.decoding")
    assert replace(demo.decoding, **settings) == demo.decoding


def test_a_folder_of_the_same_name_comes_first(empty: Path, tiny_pretrained: Path) -> None:
    assert find_folder(NAME) == bundled_models()[NAME]
    shutil.copytree(tiny_pretrained, empty / NAME)
    assert find_folder(NAME) == Path(NAME)
    (empty / NAME / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no transformer in fashion-mnist-demo"):
        find_folder(NAME)


@pytest.mark.parametrize("name", ["fashion-mnist-dem", "nothing", "x.png"])
def test_an_unknown_name_is_answered_with_the_models_of_the_package(name: str, empty: Path, capsys) -> None:
    assert main(["sample", name]) == 2
    error = capsys.readouterr().err
    assert f"run {name}: no such folder" in error
    assert error.endswith(f"Models of the package: {NAME}\n")
    assert ("did you mean 'fashion-mnist-demo'?" in error) is name.startswith("fashion")


@pytest.mark.slow
def test_the_edit_of_the_readme_gives_the_shirt_long_sleeves(empty: Path, capsys) -> None:
    readme = (ROOT / "README.md").read_text()
    exec(re.search(r"```python\n(.*?shirt\.png.*?)```", readme, re.DOTALL)[1], {})
    command = re.search(r"^    maskgit (edit .*)$", readme.replace("\\\n", " "), re.MULTILINE)[1]
    assert main([*shlex.split(command), "--images", "results"]) == 0
    with Image.open("long-sleeves.png") as sheet, Image.open(ROOT / "docs/decoding/edit.png") as printed:
        assert np.abs(np.asarray(sheet, np.int16) - np.asarray(printed, np.int16)).mean() < 2
    with Image.open("shirt.png") as image:
        shirt = np.asarray(image)
    for file in sorted((empty / "results").iterdir()):
        with Image.open(file) as image:
            edited = np.asarray(image)
        for sleeve in (np.s_[16:22, 2:7], np.s_[16:22, 21:26]):
            assert shirt[sleeve].mean() < 30 < 60 < edited[sleeve].mean(), file.name
        assert (edited[:4] == shirt[:4]).mean() > 0.5  # its collar
