"""Names of version 0.1.0 are read wherever they may stand, and said once; no key has two names at a time."""

import json
import logging
import re
from pathlib import Path

import pytest
import yaml

from maskgit_pl import old_names
from maskgit_pl.decoding import DecodingConfig, read_settings_file
from maskgit_pl.evaluation.run_folders import read_run_recipe
from maskgit_pl.old_names import (
    drop_context_cache,
    rename_config,
    rename_decoding,
    rename_keys,
    rename_measurement,
    rename_settings,
    rename_tensor,
    rename_tensors,
    rename_tree,
    restore_config,
    restore_tensor,
)
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_schema import load_schema
from maskgit_pl.training.checkpoint_files import read_settings

RECIPES = Path(__file__).parents[1] / "recipes"
CHECKPOINTS = Path(__file__).parent / "checkpoints" / "v0.1.0"
OLD = {"learning_rate": {"peak": 0.5, "warmup_steps": 3}, "betas": [0.8, 0.9], "weight_decay": 0.02, "adamw": "foreach"}


@pytest.fixture(autouse=True)
def _warns_again():
    old_names._warn_once.cache_clear()


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == old_names.__name__]


def test_a_tree_moves_to_the_new_names_and_the_old_one_stays_as_it_is(caplog):
    tree = {"model": {"ema_decay": 0.9, **OLD}, "keep_last": 2}
    before = json.dumps(tree)
    assert rename_tree(tree, "recipe a.yaml") == {"model": {"ema_decay": 0.9, "optimizer": OLD}, "keep_last": 2}
    assert json.dumps(tree) == before
    rename_tree(tree, "recipe a.yaml")  # read again
    assert said(caplog) == [
        "recipe a.yaml: model.learning_rate is now called model.optimizer.learning_rate, "
        "model.betas is now called model.optimizer.betas, "
        "model.weight_decay is now called model.optimizer.weight_decay, "
        "model.adamw is now called model.optimizer.adamw"
    ]


@pytest.mark.parametrize(
    "tree", [{}, {"model": None}, {"model": "word"}, {"model": {"optimizer": OLD}}, {"data": {"betas": [1]}}], ids=str
)
def test_a_tree_without_old_names_is_as_it_was_and_nothing_is_said(tree, caplog):
    assert rename_tree(tree, "recipe") == tree
    assert said(caplog) == []


def test_new_and_old_names_of_different_settings_go_together():
    tree = {"model": {"betas": [0.8, 0.9], "optimizer": {"adamw": "foreach"}}}
    assert rename_tree(tree, "recipe") == {"model": {"optimizer": {"betas": [0.8, 0.9], "adamw": "foreach"}}}


@pytest.mark.parametrize("optimizer", [{"betas": [0.1, 0.2]}, None, "word"], ids=str)
def test_a_setting_with_both_names_is_refused(optimizer):
    with pytest.raises(
        ValueError, match=r"^recipe a: model\.betas is the old name of model\.optimizer\.betas, and both"
    ):
        rename_tree({"model": {"betas": [0.8, 0.9], "optimizer": optimizer}}, "recipe a")


def test_dotted_keys_move_with_what_is_below_them():
    keys = ["model.learning_rate.peak", "model.learning_rate", "model.learning_rates", "model.betas", "data.seed"]
    assert rename_keys(keys, "flags") == [
        "model.optimizer.learning_rate.peak", "model.optimizer.learning_rate", "model.learning_rates",
        "model.optimizer.betas", "data.seed",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.learning_rate is the old name of model\.optimizer\.learning_rate"):
        rename_keys(["model.optimizer.learning_rate.peak", "model.learning_rate.warmup_steps"], "flags")


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_recipe_file_and_flags_of_version_0_1_0_are_read(stage, tmp_path, caplog):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"model": OLD}))
    flags = ["--model.learning_rate.peak=0.25", "--model.adamw", "for-loop"]
    recipe = Recipe.from_files(stage, [RECIPES / stage / "base.yaml", file], flags)
    assert recipe.get("model.optimizer") == {
        "learning_rate": {"peak": 0.25, "warmup_steps": 3, "decay": "cosine"},
        "betas": [0.8, 0.9], "weight_decay": 0.02, "adamw": "for-loop", "algorithm": "adamw",
    }  # fmt: skip
    assert [line.split(": ")[0] for line in said(caplog)] == [f"recipe {file}", "flags"]
    group = Recipe.from_files(stage, [RECIPES / stage / "base.yaml"], ["--model={betas: [0.1, 0.2]}"])
    assert group.get("model.optimizer.betas") == [0.1, 0.2]


@pytest.mark.parametrize(
    "words",
    [
        ["--model.betas=[0.1,0.2]", "--model.optimizer.betas=[0.3,0.4]"],
        ["--model={betas: [0.1, 0.2], optimizer: {betas: [0.3, 0.4]}}"],
    ],
)
def test_flags_with_both_names_are_refused(words):
    with pytest.raises(
        ValueError, match=r"model\.betas is the old name of model\.optimizer\.betas, and both are given"
    ):
        Recipe.from_files("transformer", [RECIPES / "transformer" / "base.yaml"], words)


def test_a_wrong_value_under_an_old_name_is_answered_with_the_new_one():
    with pytest.raises(
        ValueError, match=r"model\.optimizer\.betas must be a list of a number and a number, got \[0.1\]"
    ):
        Recipe.from_files("transformer", [RECIPES / "transformer" / "base.yaml"], ["--model.betas=[0.1]"])


def test_the_configuration_of_an_old_run_is_repeated_and_compared(tmp_path):
    config = tmp_path / "config.yaml"
    network = {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 32}
    tree = {"data": {"path": "x", "global_batch": 4}, "model": {"network": network, **OLD}, "trainer": {"max_steps": 3}}
    config.write_text(yaml.safe_dump(tree))
    assert Recipe.from_run("transformer", config).get("model.optimizer") == OLD
    renamed = {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}
    assert read_run_recipe(config)["model"] == {"network": renamed, "optimizer": OLD}


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_settings_of_a_checkpoint_of_version_0_1_0_get_the_names_of_today(stage, caplog):
    settings = read_settings(CHECKPOINTS / stage)
    renamed = rename_settings(settings, "checkpoint step-00000003")
    assert list(renamed.values()) == list(settings.values())
    assert {
        "model.optimizer.learning_rate.peak", "model.optimizer.betas", "model.optimizer.weight_decay",
        "model.network.codebook_size",
    } <= {key for key in renamed if key not in settings}  # fmt: skip
    known = load_schema(stage)["properties"]["model"]["properties"]
    for group in ("optimizer", "network"):
        prefix = f"model.{group}."
        own = {key.removeprefix(prefix).split(".")[0] for key in renamed if key.startswith(prefix)}
        assert own - {"in_channels"} <= set(known[group]["properties"])  # the data's
    assert len(said(caplog)) == 1
    with caplog.at_level(logging.WARNING):
        assert rename_settings(renamed, "checkpoint") == renamed


def test_keys_of_config_json_and_store_json_get_the_names_of_today_without_a_warning(caplog):
    network = {"num_codes": 16, "width": 8, "mlp_width": 32, "depth": 1}
    content = {"format": "x", "network": network, "num_codes": 16, "width": 3}
    assert rename_config(content, "config.json") == {
        "format": "x", "network": {"codebook_size": 16, "embed_dim": 8, "mlp_dim": 32, "depth": 1}, "codebook_size": 16,
        "width": 3,
    }  # fmt: skip
    assert content["network"] == network
    assert rename_config({"network": [network]}, "config.json") == {"network": [network]}  # refused where it is read
    assert said(caplog) == []
    with pytest.raises(
        ValueError, match=r"^a\.json: network\.width is the old name of network\.embed_dim, and both are"
    ):
        rename_config({"network": {"width": 8, "embed_dim": 8}}, "a.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("words.weight", "token_embedding.weight"),
        ("transformer.blocks.0.query_key_value.bias", "transformer.blocks.0.qkv.bias"),
        ("/state_dict/ema_network.positions.weight", "/state_dict/ema_network.position_embedding.weight"),
        ("blocks.1.attention_output.weight", "blocks.1.proj.weight"),
        ("blocks.1.mlp_hidden.weight", "blocks.1.fc1.weight"),
        ("blocks.1.mlp_output.weight", "blocks.1.fc2.weight"),
        ("/state_dict/words.weight", "/state_dict/token_embedding.weight"),
        ("network.encoder.blocks.0.norm1.weight", "network.encoder.blocks.0.norm1.weight"),
        ("passwords.weight", "passwords.weight"),
        ("words_of.weight", "words_of.weight"),
    ],
)
def test_tensors_get_the_names_of_today_part_by_part(old, new):
    assert rename_tensor(old) == new
    assert rename_tensor(new) == new
    assert old.startswith("/") or restore_tensor(new) == old


@pytest.mark.parametrize("order", [1, -1])
def test_a_tensor_with_both_names_is_refused(order):
    names = ["words.weight", "token_embedding.weight"][::order]
    with pytest.raises(ValueError, match=r"^weights a: tensor token_embedding\.weight must occur once, got it by"):
        rename_tensors(dict.fromkeys(names, 0), "weights a")


def test_the_decoding_of_an_autoregressive_model_has_no_selector_where_it_was_raster():
    assert DecodingConfig(4, "raster") == DecodingConfig(4, None)
    old = {"model": "sequential", "decoding": {"num_steps": 4, "token_selector": "raster"}}
    new = {"model": "autoregressive", "decoding": {"num_steps": 4, "token_selector": None}}
    assert rename_measurement(old) == new
    assert rename_measurement(new) == new
    assert rename_measurement({"method": "sequential, KV cache"}) == {"method": "autoregressive, KV cache"}
    for row in ({"model": "MaskGIT", "decoding": {"token_selector": "halton"}}, {"decoding": {"num_steps": 3}}, {}):
        assert rename_measurement(row) == row


def test_digests_are_made_of_the_old_names_of_a_configuration():
    new = rename_config({"network": {"num_codes": 16, "width": 8, "depth": 1}}, "config.json")["network"]
    assert restore_config(new) == {"num_codes": 16, "width": 8, "depth": 1}


def find_old_names(text: str) -> list[str]:
    """Returns the words of a text that are old names of the table and cannot be anything else, and old flags."""
    names = [name for name in [*old_names._NETWORK, *old_names._TENSORS, "r1_cost"] if "_" in name]
    flags = [flag for flag in old_names._FLAGS if flag not in MODERN_FLAGS]
    return re.findall(rf"(?<![\w/])(?:{'|'.join(names)})\b|(?:{'|'.join(flags)})(?![\w-])", text)


# Flags that another command of ours or another program has today.
MODERN_FLAGS = {"--batch", "--flip", "--runs", "--schedule", "--selector", "--size", "--temperature"}
PLACES = ["maskgit_pl/**/*.py", "recipes/**/*", "benchmarks/*", "data/*.*", "docs/**/*.md", "*.md", "Makefile"]
EXCEPTIONS = {
    "maskgit_pl/old_names.py",
    "maskgit_pl/shards/store_description.py",  # the file keeps the key, by which folders are named
    "docs/hardening.md",  # what was injected into that file
    "docs/slurm-transcript.md",  # recorded
}


def test_nothing_else_knows_the_old_names():
    root = RECIPES.parent
    files = {path for pattern in PLACES for path in root.glob(pattern) if path.is_file()}
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in files}
    assert len(texts) > 300
    found = {name: find_old_names(text) for name, text in texts.items() if name not in EXCEPTIONS}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("text", ["num_codes: 256", "model.network.mlp_width", "mlp_hidden.weight", "sample --steps 8"])
def test_the_search_finds(text):
    assert len(find_old_names(text)) == 1


@pytest.mark.parametrize("text", ["num_middle_blocks", "flax/attention_output_ln", "--num-steps 8", "--batch-size 3"])
def test_the_search_lets_pass(text):
    assert find_old_names(text) == []


@pytest.mark.parametrize(("value", "warnings"), [(1, 0), (4, 1)])
def test_a_context_cache_is_dropped_wherever_decoding_settings_are_read(tmp_path, caplog, value, warnings):
    decoding = {"num_steps": 6, "context_cache": value}
    file = tmp_path / "decoding.json"
    file.write_text(json.dumps({"format": "maskgit_pl.decoding", "version": 1, "decoding": decoding}))
    assert read_settings_file(file)[0] == DecodingConfig(6)
    assert len(said(caplog)) == warnings
    for made in (
        rename_tree({"model": {"decoding": decoding}}, "recipe")["model"],
        rename_config({"decoding": decoding}, "config.json"),
        drop_context_cache({"decoding": decoding}, "file"),
    ):
        assert made == {"decoding": {"num_steps": 6}}
    assert decoding["context_cache"] == value


def test_images_that_were_decoded_with_a_context_cache_are_not_taken_for_exact_ones():
    exact, other = ({"decoding": {"token_selector": "confidence", "context_cache": value}} for value in (1, 4))
    assert rename_decoding(exact) == {"decoding": {"token_selector": "confidence"}}
    assert rename_decoding(other) == other
