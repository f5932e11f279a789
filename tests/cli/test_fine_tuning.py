"""``maskgit train --pretrained``: a run that begins from weights that are there already."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskgit_pl.cli import main
from maskgit_pl.importers.released import import_jax
from maskgit_pl.networks.transformer import MaskedTransformer
from maskgit_pl.pipeline.fine_tuning import weights_for
from maskgit_pl.pipeline.pretrained import fingerprint, load_transformer, read_config
from tests.conftest import flags, save_tiny_pretrained, tiny_flags

GOLDEN = Path(__file__).parents[1] / "golden"
# A step that moves nothing.
STILL = ("--model.optimizer.learning_rate.peak=1e-30", "--model.optimizer.learning_rate.warmup_steps=0")


@pytest.fixture
def train(tiny_shards: Path, tmp_path: Path):
    """Trains a stage of the run ``tuned``; the tiny data and Trainer, the network's sizes left to the run."""

    def call(stage: str, *more: object) -> int:
        words = [word for word in tiny_flags(stage) if not word.startswith("--model.")]
        where = ("--data", tiny_shards, "--runs-folder", tmp_path / "runs", "--run", "tuned")
        return main([str(word) for word in ("train", stage, *where, *words, *more)])

    return call


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imports recorded weights of the released code at a small size: 8 px RGB, 4 x 4 tokens of 64 codes, 10 classes."""
    out = tmp_path_factory.mktemp("imported") / "pretrained"
    import_jax(GOLDEN / "vqvae_checkpoint.msgpack", out, transformer=GOLDEN / "transformer_n16_checkpoint.msgpack")
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_tokenizer_goes_on_from_the_weights_and_sizes_of_another(train, tiny_pretrained, tmp_path):
    assert train("tokenizer", "--pretrained", tiny_pretrained, *STILL) == 0
    run, given = tmp_path / "runs" / "tuned", tiny_pretrained / "tokenizer"
    made = run / "pretrained" / "tokenizer"
    assert read_config(made, "tokenizer")["network"] == read_config(given, "tokenizer")["network"]
    before, after = weights(given), weights(made)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    papers = json.loads((run / "tokenizer" / "environment.json").read_text())
    assert papers["pretrained"] == {"folder": str(given), "sha256": fingerprint(given)}


def test_a_transformer_goes_on_with_the_tokenizer_that_it_knows(train, tiny_pretrained, tmp_path):
    more = ("--model.decoding.num_steps=4", "--model.network.dropout=0")
    assert train("transformer", "--pretrained", tiny_pretrained, *more, *STILL) == 0
    made = tmp_path / "runs" / "tuned" / "pretrained"
    assert fingerprint(made / "tokenizer") == fingerprint(tiny_pretrained / "tokenizer")
    before, after = weights(tiny_pretrained / "transformer"), weights(made / "transformer")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.slow
def test_a_run_that_has_begun_goes_on_from_its_own_weights(train, tiny_pretrained, tmp_path):
    train("tokenizer", "--pretrained", tiny_pretrained)
    first = weights(tmp_path / "runs" / "tuned" / "pretrained" / "tokenizer")
    still = "--model.optimizer.learning_rate.warmup_steps=1000000000"  # a resumed run keeps its peak
    assert train("tokenizer", "--pretrained", tiny_pretrained, still, "--trainer.max_steps=2") == 0
    second = weights(tmp_path / "runs" / "tuned" / "pretrained" / "tokenizer")
    given = weights(tiny_pretrained / "tokenizer")
    name = "decoder.head.weight"
    assert not torch.allclose(first[name], given[name], atol=1e-5)  # the first run moved it
    assert (second[name] - first[name]).norm() < (second[name] - given[name]).norm()


@pytest.mark.parametrize(
    ("stage", "words", "parts"),
    [
        ("tokenizer", ("--pretrained", "nowhere"), ("pretrained nowhere: no tokenizer/config.json there",)),
        ("transformer", ("--pretrained", "nowhere", "--tokenizer", "GIVEN/tokenizer"), ("no transformer/config.json",)),
        ("tokenizer", ("--pretrained", "GIVEN", "--model.network.base_channels=16"), ("weights", "do not fit", "16")),
        ("transformer", ("--pretrained", "GIVEN", "--model.network.embed_dim=32"), ("model.network.embed_dim", "32")),
    ],
)
def test_weights_that_are_missing_or_do_not_fit_are_refused(
    train, tiny_pretrained, tmp_path, capsys, stage, words, parts
):
    words = [word.replace("GIVEN", str(tiny_pretrained)) for word in words]
    steps = ("--model.decoding.num_steps=4",) if stage == "transformer" else ()
    assert train(stage, *words, *steps) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(part in error for part in parts), error
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_new_classes_begin_as_the_mean_class_and_the_mask_token_stays_last(tiny_pretrained, tmp_path):
    given = load_transformer(tiny_pretrained / "transformer")  # 16 codes, 3 classes, a null class, the mask token
    old, table = given.network.config, given.network.token_embedding.weight
    for change, rows in (
        ({"num_classes": 5}, [*range(16), None, None, None, None, None, 19, 20]),
        ({"class_dropout": 0.0}, [*range(19), 20]),
        ({"num_classes": 2, "class_dropout": 0.0}, [*range(16), None, None, 20]),
    ):
        config = replace(old, **change)
        made = weights_for(config, given)
        MaskedTransformer(config).load_state_dict(made)
        wanted = torch.stack([table[16:19].mean(0) if row is None else table[row] for row in rows])
        assert torch.equal(made["token_embedding.weight"], wanted)
    given = load_transformer(save_tiny_pretrained(tmp_path / "given", class_dropout=0.0) / "transformer")
    made = weights_for(replace(given.network.config, class_dropout=0.1), given)
    table = given.network.token_embedding.weight
    assert torch.equal(made["token_embedding.weight"][19], table[16:19].mean(0))  # the null class
    assert torch.equal(made["token_embedding.weight"][20], table[19])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_training_goes_on_from_released_weights_with_other_data(train, imported, tmp_path, stage):
    more = ("--model.decoding.num_steps=4",) if stage == "transformer" else ()
    assert train(stage, "--pretrained", imported, "--data.in_channels=3", *more) == 0
    made = tmp_path / "runs" / "tuned" / "pretrained" / stage
    before, after = weights(imported / stage), weights(made)
    kept = [name for name in before if name not in ("token_embedding.weight", "head_bias")]
    moved = {name: float((after[name] - before[name]).norm() / (1e-2 + before[name].norm())) for name in kept}
    assert 0 < max(moved.values()) < 1  # one step, not a fresh start
    if stage == "transformer":  # 3 classes and a null class in the place of 10 classes
        assert load_transformer(made).network.config.num_classes == 3
        assert after["token_embedding.weight"].shape[0] == 64 + 3 + 1 + 1


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["bert", "adaln"])
def test_a_run_on_larger_images_starts_from_the_weights_of_a_smaller_grid(train, tiny_pretrained, tmp_path, backbone):
    given = tiny_pretrained
    if backbone == "adaln":  # at 4 x 4 tokens
        sizes = {"backbone": "adaln", "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24, "num_registers": 2}
        words = flags({"model": {"network": sizes, "decoding": {"num_steps": 4}}})
        assert train("transformer", "--tokenizer", tiny_pretrained / "tokenizer", *words) == 0
        (tmp_path / "runs" / "tuned").rename(tmp_path / "small")
        given = tmp_path / "small" / "pretrained"
    # The same tokenizer at twice the image size: 8 x 8 tokens.
    large = tmp_path / "large"
    shutil.copytree(given / "tokenizer", large)
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "image_size": 16}))
    steps = ("--model.decoding.num_steps=4", "--model.network.dropout=0")
    assert train("transformer", "--tokenizer", large, "--pretrained", given, *steps, *STILL) == 0
    made = tmp_path / "runs" / "tuned" / "pretrained" / "transformer"
    assert read_config(made, "transformer")["network"]["grid"] == [8, 8]
    before, after = weights(given / "transformer"), weights(made)
    for name in before.keys() - {"position_embedding.weight"}:
        assert torch.allclose(before[name], after[name], atol=1e-6), name
    old, new = (each["position_embedding.weight"] for each in (before, after))
    assert len(new) - len(old) == 64 - 16
    # The corners of the larger grid are nearest to the corners of the smaller one.
    distance = torch.cdist(new[-64:][[0, 7, 56, 63]], old[-16:])
    assert distance.argmin(1).tolist() == [0, 3, 12, 15]
