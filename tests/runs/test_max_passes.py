"""``max_passes`` lowers the steps of a recipe to the passes over the images that it allows."""

import pytest

from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import merge_values
from maskgit_pl.runs.settings import resolve


def trainer_of(shards, folder, **flags):
    """Returns the Trainer settings of a tokenizer run of the base recipe, of 3,000 steps, with flags."""
    plan = plan_run(Recipe.read("tokenizer", overrides=flags), run=folder / "run", data=shards)
    return resolve(plan.recipe.kind, merge_values(plan)).trainer


@pytest.mark.parametrize(
    ("flags", "steps", "interval"),
    [
        ({"max_passes": 1, "data.global_batch": 4}, 60 // 4, 60 // 4),  # 60 images
        ({"max_passes": 5, "data.global_batch": 4}, 5 * 60 // 4, 5 * 60 // 4),
        ({"max_passes": 1_000_000}, 3000, 1500),  # a recipe of fewer steps keeps its own
        ({"max_passes": 1, "trainer.max_steps": 77, "trainer.val_check_interval": 11}, 77, 11),  # flags win
        ({"max_passes": 1, "data.global_batch": 4096}, 1, 1),  # at least one step
    ],
)
def test_the_steps_are_those_of_the_passes(tiny_shards, tmp_path, flags, steps, interval):
    trainer = trainer_of(tiny_shards, tmp_path, **flags)
    assert (trainer.max_steps, trainer.val_check_interval) == (steps, interval)


def test_a_stream_has_no_passes(tiny_shards, tmp_path):
    flags = {"max_passes": 1, "data.source": "stream", "data.stream.urls": ["a"]}
    plan = plan_run(Recipe.read("tokenizer", overrides=flags), run=tmp_path / "run", data=tiny_shards)
    assert merge_values(plan)["trainer"]["max_steps"] == 3000
