"""The values of a run: ranges, keys of backbones, precision, and what a resumed run keeps."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from maskgit_pl import runs
from maskgit_pl.files import parse_yaml
from maskgit_pl.networks.backbone import BUILT_IN, config_class
from maskgit_pl.runs import fitting, resolve
from maskgit_pl.runs.fitting import build, choose_precision
from maskgit_pl.runs.plan import Plan, values_without_data
from maskgit_pl.runs.recipe import Layer, Recipe, config_text, merge
from maskgit_pl.runs.resolve import (
    TrainerSettings,
    fixed_settings,
    free_keys,
    json_schema,
    list_changes,
)
from maskgit_pl.tokenizer.adversarial import AdversarialConfig
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

        monkeypatch.setattr(fitting, "has_bfloat16", has_bfloat16)
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
        ("transformer", 127, True, "32-true"),
        ("transformer", 128, True, "bf16-mixed"),
    ],
)
def test_wide_networks_use_bfloat16_where_the_device_has_it(stage, width, exists, chosen, bfloat16, tmp_path):
    bfloat16(exists=exists)
    assert choose_precision(*config(stage, width), stage, tmp_path) == chosen
    for given in ("32-true", "bf16-mixed"):
        assert choose_precision(*config(stage, width, given), stage, tmp_path) == given


def test_precision_follows_the_device_of_the_run_or_a_named_gpu(bfloat16, tmp_path, monkeypatch):
    asked = bfloat16(exists=False)
    monkeypatch.setattr(fitting, "default_device", lambda: "cuda")
    for accelerator in ("cpu", "auto", "gpu"):
        choose_precision(*config("transformer", 256, accelerator=accelerator), "transformer", tmp_path)
    assert asked == ["cpu", "cuda", "cuda"]
    assert choose_precision(*config("transformer", 256), "transformer", tmp_path, on_gpu=True) == "bf16-mixed"
    assert choose_precision(*config("transformer", 255), "transformer", tmp_path, on_gpu=True) == "32-true"


@pytest.mark.parametrize(("device", "chosen"), [("cpu", "32-true"), ("cuda", "bf16-mixed")])
def test_several_ranks_use_bfloat16_on_gpus_only(device, chosen, bfloat16, tmp_path, monkeypatch):
    bfloat16(exists=True)
    monkeypatch.setattr(fitting, "default_device", lambda: device)
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


def test_the_weights_of_a_term_may_move(tiny_shards, tmp_path):
    run = build(Plan(Recipe.read("tokenizer", overrides=tiny_flags("tokenizer")), tiny_shards, tmp_path, None))
    free = free_keys(run.values.model)

    def fixed(**network: str) -> dict:
        term = {"name": "perceptual", "network": {"name": "timm", "weights": "here.pth", **network}, "weight": 0.1}
        tree = {**run.values.tree, "model": {**run.values.tree["model"], "losses": ["l2", term]}}
        return fixed_settings(tree, data="", free=free)

    assert not list_changes(fixed(), fixed(weights="there.pth"))
    assert list_changes(fixed(), fixed(model="resnet50"))


FREE = {
    "tokenizer": {
        "activation_checkpointing", "optimizer.learning_rate.decay",
        "optimizer.learning_rate.final_fraction", "optimizer.learning_rate.warmup_steps", "seed",
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
    if stage == "tokenizer":  # the group that the recipe leaves out
        config["model"] |= {"adversarial": asdict(AdversarialConfig())}
    known = {name: run.checkpoints.settings.get(name) for name in ("data", "tokenizer")}
    known["free"] = free_keys(run.values.model)
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


BERT = {"model": {"network": {"embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512, "dropout": 0.3}}}
ADALN = {"model": {"network": {"backbone": "adaln", "num_registers": 3}}}


def read(*trees: dict, flags: tuple[str, ...] = ()) -> Recipe:
    layers = [Layer(f"recipe {number}.yaml", tree) for number, tree in enumerate(trees)]
    return Recipe.from_layers("transformer", layers, flags)


def network_of(recipe: Recipe) -> dict:
    return recipe.get("model.network")


def test_another_backbone_keeps_only_the_common_keys():
    recipe = read(BERT, ADALN, {"model": {"network": {"num_heads": 2}}})
    assert network_of(recipe) == {"dropout": 0.3, "backbone": "adaln", "num_registers": 3, "num_heads": 2}
    assert network_of(read(ADALN, {"model": {"network": {"backbone": "adaln", "depth": 3}}}))["num_registers"] == 3
    back = read(ADALN, {"model": {"network": {"backbone": "bert"}}}, BERT)
    assert network_of(back) == {"backbone": "bert", **BERT["model"]["network"]}
    named = read(BERT, {"model": {"network": {"backbone": "bert"}}})  # the same backbone as before
    assert network_of(named) == {**BERT["model"]["network"], "backbone": "bert"}
    # What data and tokenizer determine comes first, without a backbone.
    sizes = {"model": {"network": {"codebook_size": 16, "num_classes": 3, "grid": [4, 4]}}}
    assert merge([sizes, ADALN])["model"]["network"].keys() == {
        "codebook_size", "num_classes", "grid", "backbone", "num_registers",
    }  # fmt: skip


def test_a_flag_changes_a_term_of_a_list_by_its_name():
    tree = {"model": {"losses": ["l2", {"name": "perceptual", "network": {"name": "lpips", "weights": "a"}}]}}
    change = {"model": {"losses": {"l2": {"weight": 4.0}, "perceptual": {"network": {"weights": "b"}}}}}
    assert merge([tree, change])["model"]["losses"] == [
        {"name": "l2", "weight": 4.0}, {"name": "perceptual", "network": {"name": "lpips", "weights": "b"}},
    ]  # fmt: skip
    assert merge([tree, {"model": {"losses": {"perceptual": None}}}])["model"]["losses"] == ["l2"]
    with pytest.raises(ValueError, match="'l1' must be a name in the list, got a list of l2, perceptual"):
        merge([tree, {"model": {"losses": {"l1": {"weight": 2.0}}}}])


@pytest.mark.parametrize("turned", [False, True])
def test_the_order_of_flags_does_not_matter(turned):
    flags = ("--model.network.backbone=adaln", "--model.network.num_registers=3", "--model.network.embed_dim=64")
    recipe = read(BERT, flags=tuple(reversed(flags)) if turned else flags)
    assert network_of(recipe) == {"dropout": 0.3, "backbone": "adaln", "num_registers": 3, "embed_dim": 64}
    more = recipe.with_overrides(("--model.network.num_registers=2",))
    assert network_of(more)["num_registers"] == 2


def test_missing_keys_get_the_defaults_and_the_record_is_a_recipe():
    for tree in (BERT, ADALN):
        given = merge([values_without_data("transformer"), Recipe.read("transformer").tree, tree])
        run = resolve.resolve("transformer", given)
        name = tree["model"]["network"].get("backbone", "bert")
        assert run.model.network == config_class(name)(**{**given["model"]["network"], "grid": (16, 16)})
        assert run.tree["model"]["network"].keys() == {each.name for each in fields(config_class(name))}
        again = merge([read(parse_yaml(config_text(run.tree))).tree, {"model": {"tokenizer": ""}}])
        assert resolve.resolve("transformer", again) == run


@pytest.mark.parametrize(
    ("trees", "flags", "said"),
    [
        (
            (BERT, ADALN, {"model": {"network": {"num_head": 1}}}),
            (),
            r"^recipe 2\.yaml: unknown key 'model\.network\.num_head': did you mean 'model\.network\.num_heads'\? "
            "keys of model.network: .*num_registers",
        ),
        ((BERT,), ("--model.network.backbone=brt",), r"^flag --model\.network\.backbone: .*'brt': did you mean 'bert'"),
        ((ADALN,), ("--model.network.attention=round",), r"attention must be 'bidirectional' or .*got 'round'"),
    ],
)
def test_a_wrong_key_is_answered_with_the_keys_of_the_backbone(trees, flags, said):
    with pytest.raises(ValueError, match=said):
        read(*trees, flags=flags)


def test_the_schema_of_editors_has_the_keys_of_each_backbone():
    schema = json_schema("transformer")
    choices = schema["$defs"]["MaskedTokenConfig"]["properties"]["network"]["anyOf"]
    for name, choice in zip(BUILT_IN, choices, strict=True):
        own = schema["$defs"][choice["$ref"].rpartition("/")[2]]
        assert own["properties"].keys() == {each.name for each in fields(config_class(name))}
        assert not own["additionalProperties"]


RANGES = {  # keys of each group, with a value that is out of range
    "tokenizer": {"trainer.max_steps": -2, "hang_seconds": 0, "model.ema_decay": 1.5, "data.seed": -1},
    "transformer": {"model.label_smoothing": 1.5, "model.optimizer.learning_rate.warmup_steps": -1},
}


@pytest.mark.parametrize("stage", RANGES)
def test_a_number_out_of_range_or_not_finite_is_refused_by_its_key(stage):
    given = merge([{"data": {"path": ""}}, values_without_data(stage), Recipe.read(stage).tree])
    for key, wrong in RANGES[stage].items():
        for value in (wrong, 2**70, float("nan"), "inf"):
            tree = value
            for part in reversed(key.split(".")):
                tree = {part: tree}
            with pytest.raises(ValueError, match=key.rpartition(".")[2]) as caught:
                resolve.resolve(stage, merge([given, tree]))
            assert "\n" not in str(caught.value)
