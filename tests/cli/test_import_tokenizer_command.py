"""``maskgit import-tokenizer`` makes a folder that works, says what it did, and answers bad input at once."""

import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from maskgit_pl.cli import main
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import load_tokenizer

CONFIG = VQGANConfig(
    3,
    base_channels=32,
    channel_multipliers=(1,),
    num_res_blocks=1,
    codebook_size=8,
    code_dim=4,
    layout="taming",
    latent_channels=6,
)
NAMES = {  # ours -> taming's, of a network of one level with one block
    "encoder.stem": "encoder.conv_in",
    "encoder.blocks.0": "encoder.down.0.block.0",
    "encoder.blocks.1": "encoder.mid.block_1",
    "encoder.blocks.2": "encoder.mid.attn_1",
    "encoder.blocks.3": "encoder.mid.block_2",
    "encoder.norm": "encoder.norm_out",
    "encoder.head": "encoder.conv_out",
    "encoder.projection": "quant_conv",
    "quantizer.codebook": "quantize.embedding.weight",
    "decoder.projection": "post_quant_conv",
    "decoder.stem": "decoder.conv_in",
    "decoder.blocks.0": "decoder.mid.block_1",
    "decoder.blocks.1": "decoder.mid.attn_1",
    "decoder.blocks.2": "decoder.mid.block_2",
    "decoder.blocks.3": "decoder.up.0.block.0",
    "decoder.blocks.4": "decoder.up.0.block.1",
    "decoder.norm": "decoder.norm_out",
    "decoder.head": "decoder.conv_out",
    ".query.": ".q.",
    ".key.": ".k.",
    ".value.": ".v.",
    ".output.": ".proj_out.",
}


def renamed(name):
    for ours, theirs in NAMES.items():
        if name.startswith(ours) or ours.startswith("."):
            name = name.replace(ours, theirs)
    return name


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    weights = VQGAN(CONFIG).state_dict()
    file = tmp_path / "last.ckpt"
    tensors = {renamed(name): value for name, value in weights.items()} | {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": tensors, "epoch": 1}, file)
    return file, weights


def test_the_folder_holds_the_weights_and_the_report_what_they_are(checkpoint, tmp_path, capsys):
    file, weights = checkpoint
    out = tmp_path / "pretrained"
    assert main(["import-tokenizer", str(file), "--out", str(out), "--image-size", "16"]) == 0
    tokenizer = load_tokenizer(out / "tokenizer")
    assert tokenizer.image_size == 16
    got = tokenizer.network.state_dict()
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name]) for name in weights)
    said = capsys.readouterr().out
    for words in (
        f"taming-transformers layout, {sum(weight.numel() for weight in weights.values()):,} parameters",
        "3 x 16 x 16 -> 16 x 16 tokens",
        "8 codes of size 4",
        "channels 32, 1 blocks a level, self-attention in the middle",
        "ignored   epoch, loss.* (1 tensors)",
        f"next: maskgit tokenize --dataset NAME --recipe paper-256 --tokenizer {out}/tokenizer",
        "--model.network.codebook_size 8\nthen: maskgit train transformer --dataset NAME --recipe paper-256",
    ):
        assert words in said


@pytest.mark.slow
@pytest.mark.parametrize("codes", [8, 1024])
def test_the_next_commands_make_tokens_and_fit_the_tokenizer(codes, tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / "tiny").symlink_to(tiny_shards)
    torch.manual_seed(0)
    weights = VQGAN(replace(CONFIG, codebook_size=codes)).state_dict()
    torch.save({renamed(name): value for name, value in weights.items()}, "a.ckpt")
    assert main(["import-tokenizer", "a.ckpt", "--out", "with space", "--image-size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line[:14] for line in lines] == ["next: maskgit ", "then: maskgit "]
    for line, more in zip(lines, (["--device", "cpu"], ["--dry-run", "--trainer.accelerator", "cpu"]), strict=True):
        words = shlex.split(line[14:].replace("NAME", "tiny"))
        # The recipe is for ImageNet, and its network is large.
        sizes = ["--model.network.num_classes", "3", "--model.network.depth", "1", "--data.views", "1"]
        assert main([*words, *more, *sizes]) == 0


def test_bad_input_is_answered_in_one_line(checkpoint, tmp_path, capsys):
    file, _ = checkpoint
    folder = tmp_path / "there" / "tokenizer"
    folder.mkdir(parents=True)
    for words, message in (
        (
            [file, "--out", tmp_path / "there"],
            "there must be a new or empty folder, got one with content",
        ),
        ([file, "--out", tmp_path / "new", "--image-size", 0], "--image-size must be >= 1, got 0"),
        ([tmp_path / "nowhere.pt", "--out", tmp_path / "new"], "nowhere.pt: no such file"),
    ):
        assert main(["import-tokenizer", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("maskgit import-tokenizer: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", [None, "version https://git-lfs.github.com/spec/v1", "<html></html>"])
def test_a_file_that_is_none_is_answered_without_torch(content, tmp_path):
    file = tmp_path / "last.ckpt"
    if content is not None:
        file.write_text(content)
    program = (
        "import sys; from maskgit_pl.cli import main\n"
        f"code = main(['import-tokenizer', {str(file)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert str(file) in done.stderr
