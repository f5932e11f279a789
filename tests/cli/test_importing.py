"""``maskgit import-jax``, ``import-tokenizer`` and ``import-transformer``: their reports, and the next commands."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import load_tokenizer, load_transformer, save_tokenizer
from tests.importers.tokenizer_references import DiffusersVQModel, diffusers_config
from tests.importers.transformer_references import Halton, randomise, save_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


def save_released_tokenizer(folder: Path, codes: int = 8) -> Path:
    """Saves a small tokenizer without downsampling as diffusers does."""
    folder.mkdir()
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    config = diffusers_config(block_out_channels=[32], layers_per_block=1, num_vq_embeddings=codes, **blocks)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(DiffusersVQModel(config).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_an_import_of_jax_is_described_and_the_next_command_samples(maskgit, tmp_path):
    out = tmp_path / "new" / "small"
    weights = ["--tokenizer", GOLDEN / "vqvae_checkpoint.msgpack"]
    weights += ["--transformer", GOLDEN / "transformer_n16_checkpoint.msgpack"]
    lines = maskgit("import-jax", *weights, "--out", out, "--image-size", 8).out.splitlines()
    assert lines[0] == f"{out}: google-research/maskgit layout, 77,323 parameters"
    assert lines[1] == "  images    3 x 8 x 8 -> 4 x 4 tokens"
    following = lines[-1].removeprefix("next: maskgit ").split()
    assert maskgit(*following, "--per-class", 2, "--out", tmp_path / "samples.png", "--device", "cpu").code == 0
    assert (tmp_path / "samples.png").is_file()


def test_an_imported_tokenizer_is_described(maskgit, tmp_path):
    file, out = save_released_tokenizer(tmp_path / "vqvae"), tmp_path / "pretrained"
    said = maskgit("import-tokenizer", file, "--out", out, "--image-size", 16, "--no-signed-images").out
    tokenizer = load_tokenizer(out / "tokenizer")
    assert tokenizer.image_size == 16
    assert not tokenizer.network.config.signed_images
    for words in (
        f"diffusers layout, {sum(parameter.numel() for parameter in tokenizer.network.parameters()):,} parameters",
        "3 x 16 x 16 -> 16 x 16 tokens, in [0, 1] inside",
        "8 codes of size 8",
        f"next: maskgit tokenize --dataset NAME --recipe paper-256 --tokenizer {out}/tokenizer",
        "--model.network.codebook_size 8\nthen: maskgit train transformer --dataset NAME --recipe paper-256",
    ):
        assert words in said


@pytest.mark.slow
def test_the_next_commands_make_tokens_and_fit_the_tokenizer(maskgit, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / "tiny").symlink_to(tiny_shards)
    save_released_tokenizer(tmp_path / "vqvae")
    answer = maskgit("import-tokenizer", "vqvae", "--out", "with space", "--image-size", 8)
    lines = answer.out.splitlines()[-2:]
    assert [line[:14] for line in lines] == ["next: maskgit ", "then: maskgit "]
    for line, more in zip(lines, (["--device", "cpu"], ["--dry-run", "--trainer.accelerator", "cpu"]), strict=True):
        words = shlex.split(line[14:].replace("NAME", "tiny"))
        # The recipe is for ImageNet, and its network is large.
        sizes = ["--model.network.num_classes", "3", "--model.network.depth", "1", "--data.views", "1"]
        assert maskgit(*words, *more, *sizes).code == 0


def test_an_imported_transformer_is_described_and_samples(maskgit, tmp_path):
    torch.manual_seed(0)
    config = VQGANConfig(
        3, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=24, code_dim=4
    )
    save_tokenizer(tmp_path / "pretrained" / "tokenizer", config, VQGAN(config).state_dict(), image_size=8)
    halton = Halton(codes=24, classes=3, side=4, size=32, blocks=2, heads=4)
    file, out = save_checkpoint(randomise(halton), tmp_path / "a.pth"), tmp_path / "out"
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    more = ["--tokenizer", tmp_path / "pretrained", "--num-heads", 4, "--class-names", tmp_path / "names.txt"]
    said = maskgit("import-transformer", file, "--out", out, *more).out
    network = load_transformer(out / "transformer").network
    for text in (
        f"{out}: Halton-MaskGIT layout, ",
        f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters",
        "images    3 x 8 x 8 -> 4 x 4 tokens",
        "network   adaln, 2 blocks",
        "classes   3, 'cat' to 'owl'",
        "decoding  16 steps, halton, guidance constant (scale 2.0)",
        "ignored   iter, global_epoch, optimizer_state_dict",
        f"next: maskgit sample {out} --classes 0,2",
    ):
        assert text in said
    assert maskgit("sample", out, "--classes", "cat,2", "--out", tmp_path / "grid.png").code == 0
