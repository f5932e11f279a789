import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from maskgit_pl.runs.build import build
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import fixed_settings, list_changes
from maskgit_pl.training.tokenizer_losses import AdversarialConfig, PerceptualConfig

RECIPES, TINY = Path(__file__).parents[2] / "recipes", Path(__file__).parents[1] / "tiny"

CONFIG = {
    "model": {
        "network": {"embed_dim": 8, "quantizer": {"name": "ema", "decay": 0.9}},
        "optimizer": {"learning_rate": {"peak": 0.1, "warmup_steps": 5}, "betas": (0.9, 0.99), "adamw": "fused"},
        "perceptual": {"network": {"name": "timm", "model": "m", "weights": "here.pth"}, "weight": 0.1},
        "adversarial": None,
        "decoding": {"num_steps": 8},
        "tokenizer": "folder",
        "seed": 0,
    },
    "data": {
        "path": "x",
        "global_batch": 4,
        "num_workers": 3,
        "seed": 0,
        "image_size": 8,
        "in_channels": 1,
        "crop": "c",
    },
    "trainer": {"max_steps": 10, "gradient_clip_val": 1.0},
}


def settings(**model):
    return fixed_settings({**CONFIG, "model": {**CONFIG["model"], **model}}, data="a" * 64, tokenizer="b" * 64)


def test_what_decides_what_is_learned_is_kept_and_nothing_else():
    assert settings() == {
        "data": "a" * 64,
        "tokenizer": "b" * 64,
        "model.network.embed_dim": 8,
        "model.network.quantizer": {"name": "ema", "decay": 0.9},
        "model.optimizer.learning_rate.peak": 0.1,
        "model.perceptual.network": {"name": "timm", "model": "m"},
        "model.perceptual.weight": 0.1,
        "model.optimizer.betas": [0.9, 0.99],
        "model.adversarial": None,
        "data.image_size": 8,
        "data.in_channels": 1,
        "data.augmentations": None,
        "data.crop": "c",
        "data.global_batch": 4,
        "data.seed": 0,
        "data.shuffle_window": None,
        "trainer.gradient_clip_val": 1.0,
        "trainer.gradient_clip_algorithm": None,
    }


def test_how_a_run_is_executed_may_change():
    optimizer = {**CONFIG["model"]["optimizer"], "adamw": "foreach"}
    free = {"activation_checkpointing": "blocks", "compiled": "blocks", "optimizer": optimizer}
    assert settings(**free) == settings()


def test_changes_are_listed_by_key_and_hashes_are_short():
    optimizer = {**CONFIG["model"]["optimizer"], "betas": (0.9, 0.9)}
    other = {**settings(adversarial={"weight": 0.5}, optimizer=optimizer), "tokenizer": "c" * 64}
    assert list_changes(settings(), other) == [
        "model.adversarial.weight: None -> 0.5",
        "model.optimizer.betas: [0.9, 0.99] -> [0.9, 0.9]",
        "tokenizer: bbbbbbbbbbbb -> cccccccccccc",
    ]
    assert list_changes(settings(), settings()) == []


FREE = {
    "tokenizer": {
        "activation_checkpointing", "memory_format", "optimizer.adamw", "optimizer.learning_rate.decay",
        "optimizer.learning_rate.final_fraction", "optimizer.learning_rate.warmup_steps", "perceptual.network.weights",
        "seed",
    },
    "transformer": {
        "activation_checkpointing", "compiled", "decoding", "global_batch", "optimizer.adamw",
        "optimizer.learning_rate.decay", "optimizer.learning_rate.final_fraction",
        "optimizer.learning_rate.warmup_steps", "seed", "tokenizer",
    },
}  # fmt: skip
"""Every key of the model that may change when a run resumes; ``data.seed`` is checked for both seeds."""


def each_changed(tree: dict, path: str = "") -> Iterator[tuple[str, dict]]:
    """Yields each key of a tree, and the tree with that key changed."""
    for name, value in tree.items():
        if isinstance(value, dict):
            for key, changed in each_changed(value, f"{path}{name}."):
                yield key, {**tree, name: changed}
        else:
            yield f"{path}{name}", {**tree, name: "another" if isinstance(value, str) else [value, 1]}


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_every_key_of_a_resolved_model_is_refused_but_those_that_are_free(
    stage, tiny_shards, tiny_pretrained, tmp_path
):
    files = [RECIPES / stage / "base.yaml", RECIPES / "cluster" / "single.yaml", TINY / f"{stage}.yaml"]
    tokenizer = tiny_pretrained / "tokenizer" if stage == "transformer" else None
    run = build(Plan(Recipe.from_files(stage, files), tiny_shards, tmp_path, tokenizer))
    config = run.config
    if stage == "tokenizer":  # the groups that the recipe leaves out
        perceptual = PerceptualConfig({"name": "timm", "model": "resnet50", "weights": "here.pth"})
        config["model"] |= {"adversarial": asdict(AdversarialConfig()), "perceptual": asdict(perceptual)}
    known = {name: run.fixed.get(name) for name in ("data", "tokenizer")}
    before = json.loads(json.dumps(fixed_settings(config, **known)))
    free = set()
    for key, model in each_changed(config["model"]):
        found = list_changes(before, fixed_settings({**config, "model": model}, **known))
        assert all(f"model.{key}".startswith(change.split(":")[0]) for change in found)
        if not found:
            free.add("decoding" if key.startswith("decoding.") else key)
    assert free == FREE[stage]
