"""``maskgit import-transformer`` makes a folder to sample from, says what it did, and answers bad input at once."""

import subprocess
import sys

import pytest
import torch

from maskgit_pl.cli import main
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import load_transformer, save_tokenizer
from tests.importers.transformer_references import Halton, MaskGIL, randomise, save_checkpoint

SIZES = {"codes": 24, "classes": 3, "side": 4, "size": 32, "blocks": 2, "heads": 4}


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    config = VQGANConfig(
        3, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=24, code_dim=4
    )
    save_tokenizer(tmp_path / "pretrained" / "tokenizer", config, VQGAN(config).state_dict(), image_size=8)
    return tmp_path / "pretrained"


def words_of(file, tokenizer, out, *more):
    return ["import-transformer", *map(str, (file, "--tokenizer", tokenizer, "--out", out, *more))]


@pytest.mark.parametrize(
    ("kind", "layout", "decoding"),
    [
        (Halton, "Halton-MaskGIT", "16 steps, halton, guidance constant scale 2.0"),
        (MaskGIL, "MaskGIL", "16 steps, confidence choice_temperature 4.5, guidance linear scale 4.0"),
    ],
)
def test_the_folder_can_be_sampled_and_the_report_says_what_it_is(kind, layout, decoding, tokenizer, tmp_path, capsys):
    file = save_checkpoint(randomise(kind(**SIZES)), tmp_path / "a.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    out = tmp_path / "out"
    assert main(words_of(file, tokenizer, out, "--num-heads", 4, "--class-names", tmp_path / "names.txt")) == 0
    said = capsys.readouterr().out
    for text in (
        f"{out}: {layout} layout, ",
        "images    8 x 8 -> 4 x 4 tokens of 24 codes",
        "network   adaln, 2 blocks",
        "classes   3, 'cat' to 'owl'",
        f"decoding  {decoding}",
        "ignored   iter, global_epoch, optimizer_state_dict",
        f"next: maskgit sample {out} --classes 0,2",
    ):
        assert text in said
    transformer = load_transformer(out / "transformer")
    parameters = sum(parameter.numel() for parameter in transformer.network.parameters())
    assert f"{parameters:,} parameters" in said
    assert main(["sample", str(out), "--classes", "cat,2", "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").is_file()


def test_bad_input_is_answered_in_one_line(tokenizer, tmp_path, capsys):
    file = save_checkpoint(Halton(**SIZES), tmp_path / "a.pth")
    (tmp_path / "full" / "folder").mkdir(parents=True)
    out = tmp_path / "new"
    for words, message in (
        (words_of(file, tokenizer, tmp_path / "full"), "must be a new or empty folder, got one with content"),
        (words_of(file, tokenizer, out, "--num-heads", 0), "--num-heads must be >= 1, got 0"),
        (words_of(file, tokenizer, out), "the number of attention heads must be given"),
        (words_of(tmp_path / "nowhere.pth", tokenizer, out), "nowhere.pth: no such file"),
        (words_of(file, tmp_path / "nowhere", out), "nowhere: no config.json there"),
        (words_of(file, tokenizer, out, "--class-names", tmp_path / "none"), "class names"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("maskgit import-transformer: ")
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("content", [None, "version https://git-lfs.github.com/spec/v1", "<html></html>"])
def test_a_file_that_is_none_is_answered_without_torch(content, tmp_path):
    file = tmp_path / "a.pth"
    if content is not None:
        file.write_text(content)
    program = (
        "import sys; from maskgit_pl.cli import main\n"
        f"code = main({words_of(file, tmp_path, tmp_path / 'out')!r})\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert str(file) in done.stderr
