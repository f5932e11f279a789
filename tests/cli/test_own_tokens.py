"""Tokens of another tokenizer: from an array to a run without a tokenizer, and back to an array."""

import numpy as np
import pytest
import torch

from maskgit_pl import MaskedTokenModel, MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.pretrained.networks import load_transformer
from tests.cli.conftest import Answer, refused
from tests.conftest import tiny_flags

pytestmark = pytest.mark.slow  # 10 s
CODES, GRID = 300, (2, 3, 2)
OF_DATA = ("grid", "num_classes", "codebook_size", "source", "max_steps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    generator = np.random.default_rng(0)
    np.save(folder / "tokens.npy", generator.integers(0, CODES, (40, *GRID), np.uint16))
    np.save(folder / "labels.npy", np.arange(40) % 3)
    store = folder / "store"
    words = ("--grid=2x3x2", f"--codebook-size={CODES}", f"--labels={folder / 'labels.npy'}", f"--out={store}")
    assert main(["data", "tokens", str(folder / "tokens.npy"), *words]) == 0
    train(folder, "run", 6)
    return folder


def train(folder, run, steps, *more):
    sizes = [word for word in tiny_flags("transformer") if not any(name in word for name in OF_DATA)]
    words = ["train", "transformer", "--recipe=base", f"--data={folder / 'store'}", f"--runs-folder={folder / 'runs'}"]
    return main([*words, f"--run={run}", *sizes, f"--trainer.max_steps={steps}", *more])


def weights(folder, run):
    return load_transformer(folder / "runs" / run / "pretrained" / "transformer").network.state_dict()


def test_a_run_resumes_exactly(folder):
    constant = "--model.optimizer.learning_rate.decay=constant"
    assert [train(folder, "whole", 6, constant)] == [0]
    assert [train(folder, "parts", steps, constant) for steps in (3, 6)] == [0, 0]
    torch.testing.assert_close(weights(folder, "parts"), weights(folder, "whole"), rtol=0, atol=0)


def test_a_run_is_exported_without_a_tokenizer_and_loaded(folder, tmp_path):
    run = folder / "runs" / "run"
    assert sorted(path.name for path in (run / "pretrained").glob("*/")) == ["transformer"]
    assert "2 x 3 x 2, of 300 codes" in (run / "pretrained" / "README.md").read_text()
    assert not list((run / "transformer").glob("*.png"))
    assert MaskedTokenModel.load_from_checkpoint(run).config.tokenizer is None
    assert main(["export", str(run), f"--out={tmp_path / 'export'}"]) == 0
    pipe = MaskGIT.from_pretrained(tmp_path / "export")
    pipe.save_pretrained(tmp_path / "again")
    tokens = [MaskGIT.from_pretrained(tmp_path / name).generate_tokens([0, 1], seed=3) for name in ("export", "again")]
    assert tokens[0].shape == (2, *GRID)
    assert torch.equal(*tokens)
    assert "2 x 3 x 2 tokens of 300 codes" in repr(pipe)


def test_an_export_goes_to_the_hub_and_comes_back(folder, monkeypatch):
    exported = str(folder / "runs" / "run" / "pretrained")
    assert main(["push", exported, "me/clips", "--license=mit", "--dry-run"]) == 0
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: exported)
    assert MaskGIT.from_pretrained("me/clips").class_names == ("0", "1", "2")


def test_sample_writes_tokens_and_keeps_known_ones(folder, tmp_path):
    known = np.full((5, *GRID), -1)
    known[:, 0] = np.arange(5 * 6).reshape(5, 3, 2)
    known[4] = -1  # the samples of a batch may differ
    np.save(tmp_path / "known.npy", known)
    out, run = tmp_path / "out.npy", str(folder / "runs" / "run")
    assert main(["sample", run, f"--known={tmp_path / 'known.npy'}", "--classes=1", f"--out={out}"]) == 0
    tokens = np.load(out)
    assert (tokens.shape, tokens.dtype) == ((5, *GRID), np.uint16)
    assert (tokens[known >= 0] == known[known >= 0]).all()
    assert main(["sample", run, "--per-class=2", f"--out={out}"]) == 0
    assert np.load(out).shape == (3 * 2, *GRID)


KNOWN = {  # words of the message -> known tokens
    "--known must be integers of shape": np.zeros((5, *GRID)) - 1,
    r"got (5, 3, 2)": np.full((5, 3, 2), -1),
    "got 300 to 300": np.full((5, *GRID), 300),
    "with a -1 in each sample": np.zeros((5, *GRID), int),
}


@pytest.mark.parametrize("message", KNOWN)
def test_wrong_known_tokens_are_refused(folder, tmp_path, capsys, message):
    np.save(tmp_path / "known.npy", KNOWN[message])
    words = [f"--known={tmp_path / 'known.npy'}", f"--out={tmp_path / 'out.npy'}", "--classes=1"]
    refused(Answer(main(["sample", str(folder / "runs" / "run"), *words]), *capsys.readouterr()), message)


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "--out=OUT.png"),
        ("sample", "--num-images=6", "--out=OUT.npz"),
        ("panorama", "--width=100", "--out=OUT.png"),
        ("tune",),
    ],
)
def test_commands_of_images_are_refused(folder, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    words = [words[0], str(folder / "runs" / "run"), *words[1:]]
    refused(Answer(main(words), *capsys.readouterr()), "the model must have a tokenizer for images")


def test_what_a_token_store_cannot_be_used_for_is_refused(folder, capsys):
    assert train(folder, "other", 1, "--data.source=images") == 2
    assert "must be a data folder with images" in capsys.readouterr().err
    assert train(folder, "other", 1, f"--tokenizer={folder}") == 2
    assert "--tokenizer must be left out" in capsys.readouterr().err
    assert train(folder, "other", 1, "--model.network.grid=[3,4]") == 2
    assert "model.network.grid must be (2, 3, 2)" in capsys.readouterr().err
