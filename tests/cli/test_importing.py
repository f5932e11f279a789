"""``maskgit import-jax``, ``import-tokenizer`` and ``import-transformer``: what they print, and what they refuse."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskgit_pl.cli import main
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import load_tokenizer, load_transformer, save_tokenizer
from tests.importers.tokenizer_references import DiffusersVQModel, diffusers_config
from tests.importers.transformer_references import Halton, MaskGIL, randomise, save_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
JAX_TOKENIZER, JAX_TRANSFORMER = GOLDEN / "vqvae_checkpoint.msgpack", GOLDEN / "transformer_n16_checkpoint.msgpack"
SIZES = {"codes": 24, "classes": 3, "side": 4, "size": 32, "blocks": 2, "heads": 4}


def call(command: str, *words: object) -> int:
    return main([command, *map(str, words)])


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
def files(tmp_path, monkeypatch) -> Path:
    """The working folder, with files that are no checkpoints and folders with content."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full/tokenizer").mkdir(parents=True)
    (tmp_path / "cut").write_bytes(JAX_TRANSFORMER.read_bytes()[:100_000])
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1")
    return tmp_path


@pytest.fixture
def refuses(files, capsys):
    """Checks that a command ends with one line and writes nothing."""

    def check(message: str, command: str, *words: object) -> None:
        before = sorted(files.rglob("*"))
        assert call(command, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"maskgit {command}: ")
        assert error.count("\n") == 1
        assert message in error
        assert sorted(files.rglob("*")) == before

    return check


# import-jax


def test_an_import_of_jax_says_what_it_made_and_what_to_do_next_and_that_works(tmp_path, capsys):
    out = tmp_path / "new" / "small"
    words = ["--tokenizer", JAX_TOKENIZER, "--transformer", JAX_TRANSFORMER, "--out", out, "--image-size", 8]
    assert call("import-jax", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: google-research/maskgit layout, 77,323 parameters"
    assert lines[1] == "  images    3 x 8 x 8 -> 4 x 4 tokens"
    next_words = lines[-1].removeprefix("next: maskgit ").split()
    assert call(*next_words, "--per-class", 2, "--out", tmp_path / "samples.png", "--device", "cpu") == 0
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.mode == "RGB"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tokenizer": "nowhere"}, "nowhere: no such file; download it, or name another"),
        ({"transformer": "cut"}, "the file of 100,000 bytes is cut off; download it again"),
        ({"out": "full"}, "must be a new or empty folder, got one with content"),
        ({"out": "cut/out"}, "--out must be in a writable folder"),
    ],
)
def test_import_jax_refuses(flags, message, refuses):
    given = {"tokenizer": JAX_TOKENIZER, "transformer": JAX_TRANSFORMER, "out": "out"} | flags
    refuses(message, "import-jax", *(word for name, value in given.items() for word in (f"--{name}", value)))


# import-tokenizer


def test_the_report_of_a_tokenizer_says_what_it_is_and_what_to_do_next(tmp_path, capsys):
    file, out = save_released_tokenizer(tmp_path / "vqvae"), tmp_path / "pretrained"
    assert call("import-tokenizer", file, "--out", out, "--image-size", 16, "--no-signed-images") == 0
    tokenizer = load_tokenizer(out / "tokenizer")
    assert tokenizer.image_size == 16
    assert not tokenizer.network.config.signed_images
    said = capsys.readouterr().out
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
def test_the_next_commands_make_tokens_and_fit_the_tokenizer(codes, tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / "tiny").symlink_to(tiny_shards)
    save_released_tokenizer(tmp_path / "vqvae", codes)
    assert call("import-tokenizer", "vqvae", "--out", "with space", "--image-size", 8) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line[:14] for line in lines] == ["next: maskgit ", "then: maskgit "]
    for line, more in zip(lines, (["--device", "cpu"], ["--dry-run", "--trainer.accelerator", "cpu"]), strict=True):
        words = shlex.split(line[14:].replace("NAME", "tiny"))
        # The recipe is for ImageNet, and its network is large.
        sizes = ["--model.network.num_classes", "3", "--model.network.depth", "1", "--data.views", "1"]
        assert main([*words, *more, *sizes]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vqvae", "--out=full"], "full must be a new or empty folder, got one with content"),
        (["vqvae", "--out=new", "--layout=taming"], "--layout must be one of taming-transformers, LlamaGen, diffusers"),
        (["lfs", "--out=new"], "fetch the weights with `git lfs pull`"),
    ],
)
def test_import_tokenizer_refuses(words, message, files, refuses):
    save_released_tokenizer(files / "vqvae")
    refuses(message, "import-tokenizer", *words)


# import-transformer


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    config = VQGANConfig(
        3, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=24, code_dim=4
    )
    save_tokenizer(tmp_path / "pretrained" / "tokenizer", config, VQGAN(config).state_dict(), image_size=8)
    return tmp_path / "pretrained"


@pytest.mark.parametrize(
    ("kind", "layout", "decoding"),
    [
        (Halton, "Halton-MaskGIT", "16 steps, halton, guidance constant scale 2.0"),
        (MaskGIL, "MaskGIL", "16 steps, confidence choice_temperature 4.5, guidance linear scale 4.0"),
    ],
)
def test_the_folder_can_be_sampled_and_the_report_says_what_it_is(kind, layout, decoding, tokenizer, tmp_path, capsys):
    file, out = save_checkpoint(randomise(kind(**SIZES)), tmp_path / "a.pth"), tmp_path / "out"
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    more = ["--num-heads", 4, "--class-names", tmp_path / "names.txt"]
    assert call("import-transformer", file, "--tokenizer", tokenizer, "--out", out, *more) == 0
    said = capsys.readouterr().out
    network = load_transformer(out / "transformer").network
    for text in (
        f"{out}: {layout} layout, ",
        f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters",
        "images    3 x 8 x 8 -> 4 x 4 tokens",
        "network   adaln, 2 blocks",
        "classes   3, 'cat' to 'owl'",
        f"decoding  {decoding}",
        "ignored   iter, global_epoch, optimizer_state_dict",
        f"next: maskgit sample {out} --classes 0,2",
    ):
        assert text in said
    assert call("sample", out, "--classes", "cat,2", "--out", tmp_path / "grid.png") == 0
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.pth", "--tokenizer=pretrained", "--out=full"], "must be a new or empty folder, got one with content"),
        (["a.pth", "--tokenizer=nowhere"], "nowhere: no config.json there"),
    ],
)
def test_import_transformer_refuses(words, message, files, tokenizer, refuses):
    save_checkpoint(Halton(**SIZES), files / "a.pth")
    refuses(message, "import-transformer", "--out=new", *words)
