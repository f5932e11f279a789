"""``max_passes`` lowers the steps of a recipe to the passes over the images that it allows."""

import pytest

from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import merge_values
from maskgit_pl.runs.settings import resolve


def trainer_of(shards, folder, **flags):
    """Returns the Trainer settings of a tokenizer run of the base recipe, of 3,000 steps, with flags."""
    plan = plan_run(Recipe.read("tokenizer", overrides=flags), run=folder / "run", data=shards)
    return resolve(plan.recipe.kind, merge_values(plan)).trainer


@pytest.mark.parametrize("passes", [1, 5])
def test_the_steps_are_those_of_the_passes(tiny_shards, tmp_path, passes):
    images = read_manifest_summary(tiny_shards).samples["train"]
    trainer = trainer_of(tiny_shards, tmp_path, max_passes=passes, **{"data.global_batch": 4})
    assert trainer.max_steps == trainer.val_check_interval == passes * images // 4


def test_recipes_of_fewer_steps_keep_theirs(tiny_shards, tmp_path):
    trainer = trainer_of(tiny_shards, tmp_path, max_passes=1_000_000)
    assert (trainer.max_steps, trainer.val_check_interval) == (3000, 1500)


def test_a_flag_of_the_steps_wins(tiny_shards, tmp_path):
    trainer = trainer_of(tiny_shards, tmp_path, max_passes=1, **{"trainer.max_steps": 77})
    assert trainer.max_steps == 77


def test_a_batch_larger_than_the_data_still_makes_a_step(tiny_shards, tmp_path):
    assert trainer_of(tiny_shards, tmp_path, max_passes=1, **{"data.global_batch": 4096}).max_steps == 1


def test_a_stream_has_no_passes(tmp_path):
    flags = {"max_passes": 1, "data.source": "stream", "data.stream.urls": ["a"], "data.stream.classes": 3}
    plan = plan_run(Recipe.read("tokenizer", overrides=flags), run=tmp_path / "run", data=None)
    assert merge_values(plan)["trainer"]["max_steps"] == 3000
