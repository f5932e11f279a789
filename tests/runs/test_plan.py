"""The folders of a run, which tests/cli/test_train.py tests with whole commands, and the steps by ``max_passes``."""

import json
from pathlib import Path

import pytest

from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.runs.plan import adapt_to_few_images, find_data, find_tokenizer, merge_values, plan_run, read_inputs
from maskgit_pl.runs.recipe import Recipe


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.read("transformer")


def test_data_are_the_named_else_the_repeated_runs_else_the_data_sets(tmp_path, recipe, monkeypatch):
    for name in ("named", "own", "data/shards/fashion-mnist"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("data: {path: own}\nmodel: {}\ntrainer: {}\n")
    again = Recipe.from_run("transformer", Path("config.yaml"))
    assert find_data(again, "named") == Path("named")
    assert find_data(again) == Path("own")
    assert find_data(recipe) == Path("data/shards/fashion-mnist")
    with pytest.raises(FileNotFoundError, match="data gone: no such folder"):
        find_data(recipe, "gone")


def test_the_tokenizer_is_the_named_else_the_runs_else_the_weights(tiny_pretrained, tmp_path, recipe):
    where = {"folder": tmp_path / "one", "shards": tmp_path}
    with pytest.raises(FileNotFoundError, match="no such folder; train one"):
        find_tokenizer(recipe, **where)
    of_weights = find_tokenizer(recipe, **where, pretrained=tiny_pretrained)
    assert of_weights == tiny_pretrained / "tokenizer"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "pretrained").symlink_to(tiny_pretrained)
    assert find_tokenizer(recipe, **where, pretrained=tiny_pretrained) == tmp_path / "one" / "pretrained" / "tokenizer"
    assert find_tokenizer(recipe, **where, tokenizer=of_weights) == of_weights


@pytest.mark.parametrize(
    ("flags", "steps", "interval", "warmup"),
    [
        ({"max_passes": 40}, 600, 500, 100),  # 60 images in batches of 4
        ({"max_passes": 1}, 400, 400, 80),  # the least
        ({"max_passes": 1_000_000}, 1000, 500, 100),  # a recipe of fewer steps keeps its own
        ({"max_passes": 1, "trainer.max_steps": 77, "trainer.val_check_interval": 11}, 77, 11, 80),  # flags win
        ({"max_passes": 1, "model.optimizer.learning_rate.warmup_steps": 7}, 400, 400, 7),
    ],
)
def test_few_images_are_trained_for_fewer_steps(tiny_shards, tmp_path, tiny_pretrained, flags, steps, interval, warmup):
    recipe = Recipe.read("transformer", overrides={"data.global_batch": 4, **flags})
    plan = plan_run(recipe, run=tmp_path / "run", data=tiny_shards, tokenizer=tiny_pretrained / "tokenizer")
    values = merge_values(plan, read_inputs(plan))
    assert (values["trainer"]["max_steps"], values["trainer"]["val_check_interval"]) == (steps, interval)
    assert values["model"]["optimizer"]["learning_rate"]["warmup_steps"] == warmup


@pytest.mark.parametrize(
    ("budget", "images", "steps", "warmup", "views"),
    [("15m", 100, 400, 80, 8), ("15m", 1_000, 1_250, 100, 8), ("1h", 45_000, 8_000, 100, None)],
)
def test_a_budget_follows_the_number_of_images(tiny_shards, tmp_path, budget, images, steps, warmup, views):
    for split in ("train", "val"):
        manifest = json.loads((tiny_shards / f"{split}.json").read_text())
        shards = [{**shard, "samples": images} for shard in manifest["shards"]]
        (tmp_path / f"{split}.json").write_text(json.dumps({**manifest, "samples": images, "shards": shards}))
    own = Recipe.read("transformer", names=f"adaln {budget}", dataset="mine")
    recipe = adapt_to_few_images(own, read_manifest_summary(tmp_path))
    found = [
        recipe.get(key) for key in ("trainer.max_steps", "model.optimizer.learning_rate.warmup_steps", "data.views")
    ]
    assert found == [steps, warmup, views]


def test_few_images_get_no_views_if_the_recipe_crops_them(tiny_shards):
    crops = {"data.source": "tokens", "max_passes": 1, "data.augmentations": ["random_crop"]}
    recipe = Recipe.read("transformer", overrides=crops)
    assert adapt_to_few_images(recipe, read_manifest_summary(tiny_shards)).get("data.views") is None


def test_a_stream_has_no_passes(tiny_shards):
    recipe = Recipe.read("tokenizer", overrides={"max_passes": 1, "data.source": "stream", "data.stream.urls": ["a"]})
    assert adapt_to_few_images(recipe, read_manifest_summary(tiny_shards)) is recipe
