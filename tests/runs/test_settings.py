"""The values of a run: ranges, and the keys of backbones."""

from dataclasses import fields

import pytest

from maskgit_pl.files import parse_yaml
from maskgit_pl.networks.backbone import BUILT_IN, config_class
from maskgit_pl.runs.layers import Layer, merge
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import config_text, values_without_data
from maskgit_pl.runs.settings import json_schema, resolve

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
        run = resolve("transformer", given)
        name = tree["model"]["network"].get("backbone", "bert")
        assert run.model.network == config_class(name)(**{**given["model"]["network"], "grid": (16, 16)})
        assert run.tree["model"]["network"].keys() == {each.name for each in fields(config_class(name))}
        again = merge([read(parse_yaml(config_text(run))).tree, {"model": {"tokenizer": ""}}])
        assert resolve("transformer", again) == run


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
                resolve(stage, merge([given, tree]))
            assert "\n" not in str(caught.value)
