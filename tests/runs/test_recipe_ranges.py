"""Numbers out of range are rejected with the name of their key, for every key of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import ConfigDict, TypeAdapter, ValidationError

from maskgit_pl.files import read_yaml
from maskgit_pl.runs.build import StageRun
from maskgit_pl.runs.layers import Layer
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import merge_values
from maskgit_pl.runs.settings import RUNS, resolve

TINY = Path(__file__).parents[1] / "tiny"
RECIPES = TINY.parents[1] / "recipes"
# Every number key, and the values of HOSTILE that it takes with a meaning.
HOSTILE = [-1, 0, -0.5, 1.5, 2**40, 2**70, 1e300, -1e300]
ANY_COUNT = {0, 2**40}  # for example steps: a number that is never reached
STEPS = {2**40}
TAKEN: dict[str, set[float]] = {
    "data.seed": {0},
    "data.num_workers": {0},
    "data.unreadable_budget": {0},
    "data.stream.shuffle_buffer": ANY_COUNT,
    "trainer.max_steps": {-1, 0, 2**40},  # -1 is Lightning's for none; a run must have one
    "trainer.devices": {-1, 0},
    "trainer.limit_val_batches": ANY_COUNT,
    "trainer.num_sanity_val_steps": {-1, 0, 2**40},
    "trainer.val_check_interval": STEPS,
    "trainer.log_every_n_steps": STEPS,
    "trainer.gradient_clip_val": {1.5, 2**40, 2**70, 1e300},
    "model.gradient_clip": {1.5, 2**40, 2**70, 1e300},
    "model.optimizer.learning_rate.peak": {1.5, 2**40, 2**70, 1e300},
    "model.optimizer.learning_rate.warmup_steps": ANY_COUNT,
    "model.optimizer.learning_rate.final_fraction": {0},
    "model.optimizer.weight_decay": {0, 1.5},
    "model.ema_decay": {0},
    "model.reconstruction_weight": {0, 1.5},
    "model.label_smoothing": {0},
    "model.flip_probability": {0},
    "model.min_mask_ratio": {0},
    "checkpoint_every": STEPS,
    "keep_every": STEPS,
    "hang_seconds": {1.5},
    "max_passes": STEPS,
}


def fits(value: object, annotation: Any) -> bool:
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        return False
    return True


def number_keys(kind: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the key and the annotation of each number; those of optional groups are their dataclass's own tests."""
    hints = get_type_hints(kind)
    for name, annotation in ((each.name, hints[each.name]) for each in fields(kind)):
        where = f"{path}.{name}" if path else name
        if is_dataclass(annotation):
            yield from number_keys(annotation, where)
        elif not any(map(is_dataclass, get_args(annotation))) and fits(1, annotation):
            yield where, annotation


KEYS = {
    (stage, key): annotation
    for stage in ("tokenizer", "transformer")
    for key, annotation in number_keys(RUNS[stage])
    if key not in ("model.seed", "model.image_size", "model.global_batch", "model.network.in_channels")
}
OWN = [(stage, key) for stage, key in KEYS if key in TAKEN]


@cache
def layers(stage: str) -> list[Layer]:
    """Returns the files of the recipe, parsed once for all keys and values."""
    files = [RECIPES / stage / "base.yaml", TINY / f"{stage}.yaml"]
    return [Layer(file.name, read_yaml(file)) for file in files]


def read(stage: Any, word: str) -> Recipe:
    return Recipe.from_layers(stage, layers(stage), [word])


def built(stage: Any, word: str, shards: Path, folder: Path, tokenizer: Path | None) -> StageRun:
    plan = Plan(read(stage, word), shards, folder, tokenizer)
    return StageRun(stage, resolve(plan.recipe.kind, merge_values(plan)), folder)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "key"), OWN)
def test_a_number_without_a_meaning_is_refused_by_its_key(
    stage: Any, key: str, tiny_shards: Path, tiny_pretrained: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_pretrained / "tokenizer" if stage == "transformer" else None
    for value in HOSTILE:
        if value in TAKEN[key] or not fits(value, KEYS[stage, key]):
            continue
        with pytest.raises(ValueError, match=key.rpartition(".")[2]) as caught:
            built(stage, f"--{key}={json.dumps(value)}", tiny_shards, tmp_path, tokenizer)
        assert "\n" not in str(caught.value)


def test_every_number_of_a_recipe_is_in_the_table_or_checked_where_it_is_built() -> None:
    """Checks that a new numeric key is added to the table, unless its range is checked elsewhere."""
    elsewhere = ("model.network.", "model.decoding.", "data.")
    missing = {key for _, key in KEYS if key not in TAKEN and not key.startswith(elsewhere)}
    assert missing == {"trainer.num_nodes", "keep_last", "cpu_threads"}


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_no_number_of_a_recipe_is_non_finite(stage: Any, value: str) -> None:
    for each, key in KEYS:
        if each == stage and not fits("word", KEYS[each, key]):
            with pytest.raises(ValueError, match="must be"):
                read(stage, f"--{key}={value}")
