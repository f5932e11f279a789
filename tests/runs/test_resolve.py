"""The chosen precision, the steps that ``max_passes`` allows, and what must not change when a run resumes."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from maskgit_pl import runs
from maskgit_pl.runs import resolve
from maskgit_pl.runs.build import build
from maskgit_pl.runs.plan import Plan, plan_run
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import adapt_to_few_images, choose_precision, fixed_settings, list_changes, merge_values
from maskgit_pl.runs.settings import TrainerSettings
from maskgit_pl.tokenizer.losses import AdversarialConfig, PerceptualConfig
from tests.conftest import tiny_flags

NAMES = {"tokenizer": "base_channels", "transformer": "embed_dim"}


@pytest.fixture
def bfloat16(monkeypatch):
    """Sets whether the device has instructions for bfloat16; returns the devices that were asked for."""
    asked = []

    def set_to(*, exists: bool) -> list[str]:
        def has_bfloat16(device: str) -> bool:
            asked.append(device)
            return exists

        monkeypatch.setattr(resolve, "has_bfloat16", has_bfloat16)
        return asked

    return set_to


def config(stage: str, width: object, given: str = "auto", **trainer: object) -> tuple[TrainerSettings, object]:
    return TrainerSettings(precision=given, **trainer), SimpleNamespace(**{NAMES[stage]: width})


@pytest.mark.parametrize(
    ("stage", "width", "exists", "chosen"),
    [
        ("tokenizer", 63, True, "32-true"),
        ("transformer", [256, 512], True, "32-true"),  # a plug-in has what widths it likes
        ("tokenizer", 64, True, "bf16-mixed"),
        ("tokenizer", 64, False, "32-true"),
        ("transformer", 255, True, "32-true"),
        ("transformer", 256, True, "bf16-mixed"),
    ],
)
def test_wide_networks_use_bfloat16_where_the_device_has_it(stage, width, exists, chosen, bfloat16, tmp_path):
    bfloat16(exists=exists)
    assert choose_precision(*config(stage, width), stage, tmp_path) == chosen
    for given in ("32-true", "bf16-mixed"):
        assert choose_precision(*config(stage, width, given), stage, tmp_path) == given


def test_precision_follows_the_device_of_the_run_or_a_named_gpu(bfloat16, tmp_path, monkeypatch):
    asked = bfloat16(exists=False)
    monkeypatch.setattr(resolve, "default_device", lambda: "cuda")
    for accelerator in ("cpu", "auto", "gpu"):
        choose_precision(*config("transformer", 256, accelerator=accelerator), "transformer", tmp_path)
    assert asked == ["cpu", "cuda", "cuda"]
    assert choose_precision(*config("transformer", 256), "transformer", tmp_path, on_gpu=True) == "bf16-mixed"


@pytest.mark.parametrize(("device", "chosen"), [("cpu", "32-true"), ("cuda", "bf16-mixed")])
def test_several_ranks_use_bfloat16_on_gpus_only(device, chosen, bfloat16, tmp_path, monkeypatch):
    bfloat16(exists=True)
    monkeypatch.setattr(resolve, "default_device", lambda: device)
    assert choose_precision(*config("transformer", 256, strategy="ddp"), "transformer", tmp_path) == chosen


def wide(**trainer: object) -> runs.Recipe:
    more = [f"--trainer.{key}={value}" for key, value in trainer.items()]
    return runs.Recipe.read(
        "transformer", overrides=[*tiny_flags("transformer"), "--model.network.embed_dim=256", *more]
    )


def recorded(run: Path) -> str:
    return yaml.safe_load((run / "transformer" / "config.yaml").read_text())["trainer"]["precision"]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["bf16-mixed", "32-true"])
def test_a_run_keeps_its_precision_on_a_device_that_would_choose_another(
    first, bfloat16, tiny_shards, tiny_pretrained, tmp_path, caplog
):
    caplog.set_level("INFO")
    run = tmp_path / "runs" / "one"
    where = {"run": run, "data": tiny_shards, "tokenizer": tiny_pretrained / "tokenizer"}
    bfloat16(exists=first == "bf16-mixed")
    runs.fit(wide(max_steps=1), **where)
    assert recorded(run) == first
    assert (f"{run}/transformer: trainer.precision auto: bf16-mixed" in caplog.messages) == (first == "bf16-mixed")
    bfloat16(exists=first != "bf16-mixed")
    runs.fit(wide(max_steps=2), **where)
    assert recorded(run) == first


FIXED = {  # keys other than those of the model
    "data", "data.image_size", "data.in_channels", "data.augmentations", "data.global_batch", "data.seed",
    "trainer.gradient_clip_val",
}  # fmt: skip
FREE = {
    "tokenizer": {
        "activation_checkpointing", "optimizer.learning_rate.decay",
        "optimizer.learning_rate.final_fraction", "optimizer.learning_rate.warmup_steps", "perceptual.network.weights",
        "seed",
    },
    "transformer": {
        "activation_checkpointing", "compiled", "decoding", "global_batch",
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
def test_every_key_of_a_model_is_fixed_but_those_that_are_free(stage, tiny_shards, tiny_pretrained, tmp_path):
    recipe = Recipe.read(stage, overrides=tiny_flags(stage))
    tokenizer = tiny_pretrained / "tokenizer" if stage == "transformer" else None
    run = build(Plan(recipe, tiny_shards, tmp_path, tokenizer))
    config = run.values.tree
    if stage == "tokenizer":  # the groups that the recipe leaves out
        perceptual = PerceptualConfig({"name": "timm", "model": "resnet50", "weights": "here.pth"})
        config["model"] |= {"adversarial": asdict(AdversarialConfig()), "perceptual": asdict(perceptual)}
    known = {name: run.fixed.get(name) for name in ("data", "tokenizer")}
    before = json.loads(json.dumps(fixed_settings(config, **known)))
    fixed = {key for key in before if not key.startswith("model.")}
    assert fixed == {*FIXED, "tokenizer"} if stage == "transformer" else {*FIXED}
    free = set()
    for key, model in each_changed(config["model"]):
        found = list_changes(before, fixed_settings({**config, "model": model}, **known))
        assert all(f"model.{key}".startswith(change.split(":")[0]) for change in found)
        if not found:
            free.add("decoding" if key.startswith("decoding.") else key)
    assert free == FREE[stage]


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
    values = merge_values(
        plan_run(recipe, run=tmp_path / "run", data=tiny_shards, tokenizer=tiny_pretrained / "tokenizer")
    )
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
    recipe = adapt_to_few_images(Recipe.read("transformer", names=f"adaln {budget}", dataset="mine"), tmp_path)
    found = [
        recipe.get(key) for key in ("trainer.max_steps", "model.optimizer.learning_rate.warmup_steps", "data.views")
    ]
    assert found == [steps, warmup, views]


def test_few_images_get_no_views_if_the_recipe_crops_them(tiny_shards):
    crops = {"data.source": "tokens", "max_passes": 1, "data.augmentations": ["random_crop"]}
    assert adapt_to_few_images(Recipe.read("transformer", overrides=crops), tiny_shards).get("data.views") is None


def test_a_stream_has_no_passes(tiny_shards):
    recipe = Recipe.read("tokenizer", overrides={"max_passes": 1, "data.source": "stream", "data.stream.urls": ["a"]})
    assert adapt_to_few_images(recipe, tiny_shards) is recipe
