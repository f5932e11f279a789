"""``maskgit import-jax``, ``import-tokenizer`` and ``import-transformer``: what they print, and what they refuse."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import load_tokenizer, load_transformer, save_tokenizer
from tests.cli.commands import refused
from tests.importers.tokenizer_references import DiffusersVQModel, diffusers_config
from tests.importers.transformer_references import Halton, randomise, save_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
JAX_TOKENIZER, JAX_TRANSFORMER = GOLDEN / "vqvae_checkpoint.msgpack", GOLDEN / "transformer_n16_checkpoint.msgpack"


def save_released_tokenizer(folder: Path, codes: int = 8) -> Path:
    """Saves a small tokenizer without downsampling as diffusers does."""
    folder.mkdir()
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    config = diffusers_config(block_out_channels=[32], layers_per_block=1, num_vq_embeddings=codes, **blocks)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(DiffusersVQModel(config).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    torch.manual_seed(0)
    config = VQGANConfig(
        3, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=24, code_dim=4
    )
    save_tokenizer(tmp_path / "pretrained" / "tokenizer", config, VQGAN(config).state_dict(), image_size=8)
    return tmp_path / "pretrained"


def save_released_transformer(file: Path) -> Path:
    return save_checkpoint(randomise(Halton(codes=24, classes=3, side=4, size=32, blocks=2, heads=4)), file)


def test_an_import_of_jax_says_what_it_made_and_what_to_do_next_and_that_works(maskgit, tmp_path):
    out = tmp_path / "new" / "small"
    words = ["--tokenizer", JAX_TOKENIZER, "--transformer", JAX_TRANSFORMER, "--out", out, "--image-size", 8]
    lines = maskgit("import-jax", *words).out.splitlines()
    assert lines[0] == f"{out}: google-research/maskgit layout, 77,323 parameters"
    assert lines[1] == "  images    3 x 8 x 8 -> 4 x 4 tokens"
    following = lines[-1].removeprefix("next: maskgit ").split()
    assert maskgit(*following, "--per-class", 2, "--out", tmp_path / "samples.png", "--device", "cpu").code == 0
    assert (tmp_path / "samples.png").is_file()


def test_the_report_of_a_tokenizer_says_what_it_is_and_what_to_do_next(maskgit, tmp_path):
    file, out = save_released_tokenizer(tmp_path / "vqvae"), tmp_path / "pretrained"
    said = maskgit("import-tokenizer", file, "--out", out, "--image-size", 16, "--no-signed-images").out
    tokenizer = load_tokenizer(out / "tokenizer")
    assert tokenizer.image_size == 16
    assert not tokenizer.network.config.signed_images
    for words in (
        f"diffusers layout, {sum(each.numel() for each in tokenizer.network.parameters()):,} parameters",
        "3 x 16 x 16 -> 16 x 16 tokens, in [0, 1] inside",
        "8 codes of size 8",
        "channels 32, 1 blocks a level",
        f"next: maskgit tokenize --dataset NAME --recipe paper-256 --tokenizer {out}/tokenizer",
        "--model.network.codebook_size 8\nthen: maskgit train transformer --dataset NAME --recipe paper-256",
    ):
        assert words in said


@pytest.mark.slow
@pytest.mark.parametrize("codes", [8, 1024])
def test_the_next_commands_make_tokens_and_fit_the_tokenizer(codes, maskgit, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / "tiny").symlink_to(tiny_shards)
    save_released_tokenizer(tmp_path / "vqvae", codes)
    answer = maskgit("import-tokenizer", "vqvae", "--out", "with space", "--image-size", 8)
    lines = answer.out.splitlines()[-2:]
    assert [line[:14] for line in lines] == ["next: maskgit ", "then: maskgit "]
    for line, more in zip(lines, (["--device", "cpu"], ["--dry-run", "--trainer.accelerator", "cpu"]), strict=True):
        words = shlex.split(line[14:].replace("NAME", "tiny"))
        # The recipe is for ImageNet, and its network is large.
        sizes = ["--model.network.num_classes", "3", "--model.network.depth", "1", "--data.views", "1"]
        assert maskgit(*words, *more, *sizes).code == 0


def test_an_imported_transformer_can_be_sampled_and_the_report_says_what_it_is(maskgit, tokenizer, tmp_path):
    file, out = save_released_transformer(tmp_path / "a.pth"), tmp_path / "out"
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    more = ["--num-heads", 4, "--class-names", tmp_path / "names.txt"]
    said = maskgit("import-transformer", file, "--tokenizer", tokenizer, "--out", out, *more).out
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


JAX = f"import-jax --tokenizer {JAX_TOKENIZER} --transformer {JAX_TRANSFORMER} --out out"
TORCH = "import-transformer a.pth --tokenizer pretrained --num-heads 4 --out new"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{JAX} --tokenizer nowhere", "nowhere: no such file; download it, or name another"),
        (f"{JAX} --transformer cut", "cut off, or not a tree of arrays as flax writes it"),
        (f"{JAX} --out full", "must be a new or empty folder, got one with content"),
        (f"{JAX} --out cut/out", "--out must be in a writable folder"),
        ("import-tokenizer vqvae --out full", "full must be a new or empty folder, got one with content"),
        ("import-tokenizer vqvae --out new --layout x", "--layout must be one of taming-transformers, LlamaGen"),
        ("import-tokenizer lfs --out new", "fetch the weights with `git lfs pull`"),
        (f"{TORCH} --out full", "must be a new or empty folder, got one with content"),
        (f"{TORCH} --tokenizer nowhere", "nowhere: no config.json there"),
        (f"{TORCH} --class-names none", "class names"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_nothing_is_written(
    words, message, maskgit, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_released_tokenizer(tmp_path / "vqvae")
    save_released_transformer(tmp_path / "a.pth")
    (tmp_path / "full" / "tokenizer").mkdir(parents=True)
    (tmp_path / "cut").write_bytes(JAX_TRANSFORMER.read_bytes()[:100_000])
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1")
    before = sorted(tmp_path.rglob("*"))
    refused(maskgit(*words.split()), message)
    assert sorted(tmp_path.rglob("*")) == before
