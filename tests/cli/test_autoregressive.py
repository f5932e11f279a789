"""The autoregressive baseline from the command line: it trains, resumes and samples; other tasks are refused."""

import pytest
from PIL import Image

from maskgit_pl.pipeline.pretrained import load_transformer
from maskgit_pl.training.checkpoints import newest_checkpoint
from tests.cli.commands import refused
from tests.conftest import tiny_flags


@pytest.fixture
def train_baseline(maskgit, tiny_shards, tiny_pretrained, runs):
    """Trains the baseline's run ``one`` with tiny sizes."""
    where = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one", "--tokenizer", tiny_pretrained / "tokenizer")
    sizes = [word for word in tiny_flags("transformer") if "decoding" not in word]
    return lambda *more: maskgit("train", "transformer", *where, "--recipe=autoregressive", *sizes, *more)


@pytest.mark.slow
def test_a_run_trains_goes_on_and_keeps_its_kind(train_baseline, runs):
    first = train_baseline("--model.decoding.guidance=constant")
    assert first.code == 0, first
    assert "base.yaml: causal attention ignores model.mask_schedule, model.min_mask_ratio" in first.out
    assert "resuming from step-00000001" in train_baseline("--trainer.max_steps=2").out
    assert newest_checkpoint(runs / "one" / "transformer" / "checkpoints").name == "step-00000002"
    assert load_transformer(runs / "one" / "pretrained" / "transformer").mask_schedule is None
    assert "| attention | causal |" in (runs / "one" / "pretrained" / "README.md").read_text()
    refused(
        train_baseline("--trainer.max_steps=3", "--model.network.attention=bidirectional"),
        "from step 2: settings changed (",
        "model.network.attention: causal -> bidirectional",
    )


def test_weights_of_the_other_kind_are_refused_before_a_step(train_baseline, tiny_pretrained):
    refused(
        train_baseline("--pretrained", tiny_pretrained),
        "model.network.attention must be bidirectional, as in the pretrained transformer, got causal",
        "RECIPE=autoregressive",
    )


@pytest.mark.slow
def test_it_samples_with_an_animation_in_time_and_a_filmstrip(maskgit, tiny_autoregressive, tmp_path):
    answer = maskgit(
        "sample", tiny_autoregressive, "--classes=0,1", "--per-class=2", "--out", tmp_path / "all.png",
        "--gif", tmp_path / "decoding.gif", "--filmstrip", tmp_path / "strip.png",
    )  # fmt: skip
    assert answer.code == 0, answer
    assert "4 images of 2 classes in 16 steps" in answer.out
    with Image.open(tmp_path / "decoding.gif") as frames:
        assert frames.n_frames == 16
    assert (tmp_path / "strip.png").is_file()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("sample --num-steps=8", ("--num-steps must be 16 for an autoregressive model", "got 8", "leave it out")),
        ("sample --token-selector=halton", ("--token-selector must not be set for an autoregressive model",)),
        ("panorama --classes=0 --width=16", ("panorama requires a model with bidirectional attention",)),
        ("compare --data=DATA", ("compare requires a model with bidirectional attention", "choose another run")),
        ("tune --data=DATA", ("tune requires a model with bidirectional attention",)),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(
    maskgit, tiny_autoregressive, tiny_shards, tmp_path, monkeypatch, words, parts
):
    monkeypatch.chdir(tmp_path)
    command, *more = words.replace("DATA", str(tiny_shards)).split()
    refused(maskgit(command, tiny_autoregressive, *more), *parts)
    assert not list(tmp_path.iterdir())
