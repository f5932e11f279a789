"""The autoregressive baseline from the command line: it trains, resumes and samples; other tasks are refused."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.pipeline.pretrained import load_transformer
from maskgit_pl.training.checkpoint_files import newest_checkpoint
from tests.conftest import flags

TINY = Path(__file__).parents[1] / "tiny"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command; gives the exit code, and what was said if it ended well, else what was complained about."""
    ours = logging.getLogger("maskgit_pl")
    for name in ("propagate", "level"):
        monkeypatch.setattr(ours, name, getattr(ours, name))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(ours, "handlers", [])
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.err if code else said.out + said.err

    return run


@pytest.fixture
def train(call, tiny_shards, tiny_pretrained, tmp_path):
    """Trains the baseline's run ``one`` with tiny sizes."""
    tiny = yaml.safe_load((TINY / "transformer.yaml").read_text())
    del tiny["model"]["decoding"]
    where = (
        "--data",
        tiny_shards,
        "--runs-folder",
        tmp_path,
        "--run",
        "one",
        "--tokenizer",
        tiny_pretrained / "tokenizer",
    )
    return lambda *more: call("train", "transformer", *where, "--recipe=autoregressive", *flags(tiny), *more)


def refused(answer: tuple[int, str], *parts: str) -> None:
    """Checks for exit code 2 and one line with all parts."""
    code, said = answer
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    for part in parts:
        assert part in said


@pytest.mark.slow
def test_a_run_trains_goes_on_and_keeps_its_kind(train, call, tmp_path):
    code, said = train("--model.decoding.guidance=constant")
    assert code == 0, said
    assert "base.yaml: causal attention ignores model.mask_schedule, model.min_mask_ratio" in said
    code, said = train("--trainer.max_steps=2")
    assert "resuming from step-00000001" in said
    assert newest_checkpoint(tmp_path / "one" / "transformer" / "checkpoints").name == "step-00000002"
    exported = load_transformer(tmp_path / "one" / "pretrained" / "transformer")
    assert exported.mask_schedule is None
    assert "| attention | causal |" in (tmp_path / "one" / "pretrained" / "README.md").read_text()
    refused(
        train("--trainer.max_steps=3", "--model.network.attention=bidirectional"),
        "from step 2: settings changed (",
        "model.network.attention: causal -> bidirectional",
    )


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--model.mask_schedule=log", ("flag --model.mask_schedule: with causal attention",)),
        ("--model.decoding.num_steps=4", ("flag --model.decoding.num_steps: with causal attention",)),
        ("--model.decoding.num_step=4", ("unknown key 'model.decoding.num_step'", "recipes/transformer")),
        ("--model.network.attention=casual", ("casual", "causal")),
        ("--model.label_smoothin=0", ("key 'model.label_smoothin'", "did you mean 'model.label_smoothing'")),
    ],
)
def test_a_flag_that_has_no_meaning_is_refused_in_one_line(train, tmp_path, flag, parts):
    refused(train(flag), *parts)
    assert not (tmp_path / "one").exists()


def test_weights_of_the_other_kind_are_refused_before_a_step(train, tiny_pretrained):
    refused(
        train("--pretrained", tiny_pretrained),
        "model.network.attention must be bidirectional, as in the pretrained transformer, got causal",
        "RECIPE=autoregressive",
    )


@pytest.mark.slow
def test_it_samples_with_an_animation_in_time_and_a_filmstrip(call, tiny_autoregressive, tmp_path):
    code, said = call(
        "sample", tiny_autoregressive, "--classes=0,1", "--per-class=2", "--out", tmp_path / "all.png",
        "--gif", tmp_path / "decoding.gif", "--filmstrip", tmp_path / "strip.png",
    )  # fmt: skip
    assert code == 0, said
    assert "4 images of 2 classes in 16 steps" in said
    with Image.open(tmp_path / "decoding.gif") as frames:
        assert frames.n_frames == 16
    assert (tmp_path / "strip.png").is_file()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["sample", "--num-steps=8"], ("--num-steps must be 16 for an autoregressive model", "got 8", "leave it out")),
        (
            ["sample", "--token-selector=halton"],
            ("--token-selector must not be set for an autoregressive model", "'halton'"),
        ),
        (
            ["sample", "--choice-temperature=2"],
            ("--token-selector must not be set for an autoregressive model", "'choice_temperature': 2.0"),
        ),
        (["panorama", "--classes=0", "--width=16"], ("panorama requires a model with bidirectional attention",)),
        (["compare"], ("compare requires a model with bidirectional attention", "choose another run")),
        (["tune"], ("tune requires a model with bidirectional attention",)),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(
    call, tiny_autoregressive, tiny_shards, tmp_path, monkeypatch, words, parts
):
    monkeypatch.chdir(tmp_path)
    data = ["--data", tiny_shards] if words[0] in ("compare", "tune") else []
    out = ["--out", tmp_path / "out.png"] if words[0] in ("sample", "panorama") else []
    refused(call(words[0], tiny_autoregressive, *words[1:], *data, *out), *parts)
    assert not list(tmp_path.iterdir())


def test_an_edit_of_an_image_is_refused_in_one_line(call, tiny_autoregressive, tmp_path):
    Image.fromarray(torch.zeros(8, 8, dtype=torch.uint8).numpy()).save(tmp_path / "image.png")
    for command, words in (("edit", ["--box=0,0,4,4", "--class=1"]), ("outpaint", ["--left=2", "--class=1"])):
        answer = call(command, tiny_autoregressive, tmp_path / "image.png", *words, "--out", tmp_path / "out.png")
        refused(answer, "requires a model with bidirectional attention", "got an autoregressive one")
