"""``maskgit import-tokenizer`` makes a folder that works, says what it did, and answers bad input at once.

``maskgit import-transformer`` makes a folder to sample from, says what it did, and answers bad input at once.
"""

import pickle
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import load_tokenizer, load_transformer, save_tokenizer
from tests.importers.transformer_references import Halton, MaskGIL, randomise, save_checkpoint

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


GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER, TRANSFORMER = GOLDEN / "vqvae_checkpoint.msgpack", GOLDEN / "transformer_n16_checkpoint.msgpack"


def call(*words: object) -> int:
    return main(["import-jax", *map(str, words)])


def test_an_import_says_what_it_made_and_what_to_do_next_and_that_works(tmp_path, capsys):
    out = tmp_path / "new" / "small"
    assert call("--tokenizer", TOKENIZER, "--transformer", TRANSFORMER, "--out", out, "--image-size", 8) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tokenizer: 390,435 parameters; 64 codes; images of 8 x 8 px are 4 x 4 tokens"
    assert lines[1] == "transformer: 77,323 parameters; 2 blocks of size 64; 10 classes, '0' to '9'"
    written, _, following = lines[2].partition(": written; next: maskgit ")
    assert written == str(out)
    assert (
        main([*following.split(), "--per-class", "2", "--out", str(tmp_path / "samples.png"), "--device", "cpu"]) == 0
    )
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.mode == "RGB"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # the second has a byte order mark
def test_class_names_stand_in_a_file_one_a_line(encoding, tmp_path):
    names = [f"Käse {number}" for number in range(10)]
    (tmp_path / "names.txt").write_text("".join(f"{name} \n" for name in names), encoding=encoding)
    words = ["--tokenizer", TOKENIZER, "--transformer", TRANSFORMER, "--class-names", tmp_path / "names.txt"]
    assert call(*words, "--out", tmp_path / "out") == 0
    assert MaskGIT.from_pretrained(tmp_path / "out").class_names == tuple(names)


def test_a_tokenizer_alone_has_the_size_that_is_asked_for(tmp_path):
    assert call("--tokenizer", TOKENIZER, "--image-size", 512, "--out", tmp_path / "out") == 0
    assert load_tokenizer(tmp_path / "out" / "tokenizer").image_size == 512


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "cut").write_bytes(TRANSFORMER.read_bytes()[:100_000])
    (folder / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (folder / "page").write_text("<!doctype html>")
    (folder / "nine").write_text("a\n" * 9)
    (folder / "latin").write_bytes("Käse\n".encode("latin-1"))
    (folder / "orbax").mkdir()
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tokenizer": "nowhere"}, "nowhere: no such file; download it, or name another"),
        ({"transformer": "nowhere"}, "nowhere: no such file"),
        ({"transformer": "pickle"}, "a Python pickle"),
        ({"transformer": "page"}, "a web page"),
        ({"transformer": "orbax"}, "got a folder; name the file itself"),
        ({"transformer": "cut"}, "the file of 100,000 bytes is cut off; download it again"),
        ({"tokenizer": TRANSFORMER}, "name that file with --transformer"),
        ({"image-size": "256"}, "--image-size must be 8, for 4 x 4 tokens of this transformer, got 256; "),
        ({"class-names": "nine"}, "must be 10, one for each class of the transformer, got 9"),
        ({"class-names": "latin"}, "a text in UTF-8"),
        ({"class-names": "nowhere"}, "no such file; name a text file with one name per line"),
        ({"out": "."}, "must be a new or empty folder, got one with content"),
        ({"out": "cut"}, "must be a new or empty folder, got one with content"),
        ({"out": "cut/out"}, "must lie in a folder, got the file"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_written(flags, message, files, tmp_path, capsys):
    given = {"tokenizer": TOKENIZER, "transformer": TRANSFORMER, "out": "out"} | flags
    words = [
        word
        for name, value in given.items()
        for word in (f"--{name}", value if name == "image-size" else files / value)
    ]
    before = sorted(tmp_path.rglob("*"))
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskgit import-jax: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_another_kind_is_answered_without_torch(files, tmp_path):
    code = "import sys; from maskgit_pl.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    for name in ("nowhere", "pickle", "page"):
        words = ["import-jax", "--tokenizer", str(files / name), "--out", str(tmp_path / "out")]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        assert done.stdout == "2 False\n"
        assert name in done.stderr


@pytest.mark.slow
def test_the_console_script_imports(tmp_path):
    script = Path(sys.executable).with_name("maskgit")
    words = [
        "import-jax",
        "--tokenizer",
        str(TOKENIZER),
        "--transformer",
        str(TRANSFORMER),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([script, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 3
    assert MaskGIT.from_pretrained(tmp_path / "out").generate([1])[0].size == (8, 8)


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


def test_bad_input_of_a_transformer_is_answered_in_one_line(tokenizer, tmp_path, capsys):
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
def test_a_file_of_a_transformer_that_is_none_is_answered_without_torch(content, tmp_path):
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
