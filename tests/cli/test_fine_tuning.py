"""``maskgit train --pretrained``: a run that starts from the weights of another model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskgit_pl.networks.transformer import MaskedTransformer
from maskgit_pl.pretrained.fine_tuning import weights_for
from maskgit_pl.pretrained.networks import fingerprint, load_transformer, read_config
from tests.conftest import save_tiny_pretrained, tiny_flags

# A step that moves nothing.
STILL = ("--model.optimizer.learning_rate.peak=1e-30", "--model.optimizer.learning_rate.warmup_steps=0")


@pytest.fixture
def tune(maskgit, tiny_shards: Path, tmp_path: Path):
    """Trains a stage of the run ``tuned`` with the sizes of its pretrained model; returns the pretrained folder."""

    def call(stage: str, *more: object) -> Path:
        words = [word for word in tiny_flags(stage) if not word.startswith("--model.")]
        words += ["--model.decoding.num_steps=4"] if stage == "transformer" else []
        where = ("--data", tiny_shards, "--runs-folder", tmp_path / "runs", "--run", "tuned")
        answer = maskgit("train", stage, *where, *words, *more)
        assert answer.code == 0, answer
        return tmp_path / "runs" / "tuned" / "pretrained"

    return call


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_run_starts_from_the_weights_and_sizes_of_another(tune, tiny_pretrained, tmp_path, stage):
    more = ("--model.network.dropout=0",) if stage == "transformer" else ()
    tuned, given = tune(stage, "--pretrained", tiny_pretrained, *more, *STILL), tiny_pretrained / stage
    before, after = weights(given), weights(tuned / stage)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert read_config(tuned / stage, stage)["network"] == read_config(given, stage)["network"] | (
        {"dropout": 0.0} if stage == "transformer" else {}
    )
    record = json.loads((tmp_path / "runs" / "tuned" / stage / "environment.json").read_text())
    assert record["pretrained"] == {"folder": str(given), "sha256": fingerprint(given)}
    assert fingerprint(tuned / "tokenizer") == fingerprint(tiny_pretrained / "tokenizer") or stage == "tokenizer"


@pytest.mark.slow
def test_a_resumed_run_continues_from_its_own_weights(tune, tiny_pretrained):
    words = ("tokenizer", "--pretrained", tiny_pretrained)
    first = weights(tune(*words) / "tokenizer")
    still = "--model.optimizer.learning_rate.warmup_steps=1000000000"  # a resumed run keeps its peak
    second = weights(tune(*words, still, "--trainer.max_steps=2") / "tokenizer")
    given, name = weights(tiny_pretrained / "tokenizer"), "decoder.head.weight"
    assert not torch.allclose(first[name], given[name], atol=1e-5)  # the first run moved it
    assert (second[name] - first[name]).norm() < (second[name] - given[name]).norm()


def test_new_classes_begin_as_the_mean_class_and_the_mask_token_stays_last(tiny_pretrained, tmp_path):
    given = load_transformer(tiny_pretrained / "transformer")  # 16 codes, 3 classes, a null class, the mask token
    old, table = given.network.config, given.network.token_embedding.weight
    for change, rows in (
        ({"num_classes": 5}, [*range(16), None, None, None, None, None, 19, 20]),
        ({"class_dropout": 0.0}, [*range(19), 20]),
        ({"num_classes": 2, "class_dropout": 0.0}, [*range(16), None, None, 20]),
    ):
        config = replace(old, **change)
        tuned = weights_for(config, given)
        MaskedTransformer(config).load_state_dict(tuned)
        expected = torch.stack([table[16:19].mean(0) if row is None else table[row] for row in rows])
        assert torch.equal(tuned["token_embedding.weight"], expected)
    given = load_transformer(save_tiny_pretrained(tmp_path / "given", class_dropout=0.0) / "transformer")
    tuned = weights_for(replace(given.network.config, class_dropout=0.1), given)
    table = given.network.token_embedding.weight
    assert torch.equal(tuned["token_embedding.weight"][19], table[16:19].mean(0))  # the null class
    assert torch.equal(tuned["token_embedding.weight"][20], table[19])


@pytest.mark.slow
def test_a_run_on_larger_images_starts_from_the_weights_of_a_smaller_grid(tune, tiny_pretrained, tmp_path):
    # The same tokenizer at twice the image size: 8 x 8 tokens.
    large = shutil.copytree(tiny_pretrained / "tokenizer", tmp_path / "large")
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "image_size": 16}))
    more = ("--tokenizer", large, "--pretrained", tiny_pretrained, "--model.network.dropout=0")
    tuned = tune("transformer", *more, *STILL) / "transformer"
    assert read_config(tuned, "transformer")["network"]["grid"] == [8, 8]
    before, after = weights(tiny_pretrained / "transformer"), weights(tuned)
    for name in before.keys() - {"position_embedding.weight"}:
        assert torch.allclose(before[name], after[name], atol=1e-6), name
    assert len(after["position_embedding.weight"]) - len(before["position_embedding.weight"]) == 64 - 16
