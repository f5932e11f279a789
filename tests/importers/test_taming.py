"""Tokenizers in both layouts come out as they go in: the same tokens, the same images, every size read off the file."""

import argparse
import math
import os
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from maskgit_pl.data import Batch, ShardData, ShardDataConfig
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.files import check_torch_file
from maskgit_pl.importers.layouts import tokenizer_weights
from maskgit_pl.importers.taming import LLAMAGEN, TAMING
from maskgit_pl.importers.tokenizers import import_tokenizer, tokenizer_layout_of
from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.pretrained import fingerprint, load_tokenizer
from maskgit_pl.training.learning_rates import LearningRate
from maskgit_pl.training.optimized_model import check_tokenizer
from maskgit_pl.training.tokenizer_losses import AdversarialConfig
from tests.modules import masked_model, tokenizer_model

SMALL = {"ch": 32, "mult": (1, 2), "blocks": 1, "attention": (1,), "z": 12, "codes": 32, "width": 4}
FULL = {"ch": 128, "mult": (1, 1, 2, 2, 4), "blocks": 2, "attention": (4,), "z": 256}


# The networks of both projects, plain, with the names of their tensors.


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Res(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, 1, 1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, 1, 1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.norm1(x)
        h = self.conv1(h * h.sigmoid())
        h = self.norm2(h)
        h = self.conv2(h * h.sigmoid())
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attn(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, N)
        weights = torch.einsum("bcm,bcn->bmn", q, k).mul(x.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bmn,bcn->bcm", weights, v).view_as(x))


class Resample(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.stride, self.conv = stride, nn.Conv2d(channels, channels, 3, stride, 0)

    def forward(self, x):
        if self.stride == 1:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1) if self.stride == 2 else (1, 1, 1, 1)))


def level(before, after, blocks, *, attention, llamagen):
    made = nn.Module()
    residual = nn.ModuleList([Res(before if number == 0 else after, after) for number in range(blocks)])
    setattr(made, "res" if llamagen else "block", residual)
    made.attn = nn.ModuleList([Attn(after) for _ in range(blocks)] if attention else [])
    return made


def run_level(level, x):
    for number, block in enumerate(level.res if hasattr(level, "res") else level.block):
        x = block(x)
        if len(level.attn):
            x = level.attn[number](x)
    for name in ("downsample", "upsample"):
        if hasattr(level, name):
            x = getattr(level, name)(x)
    return x


def middle(width, *, llamagen):
    if llamagen:
        return nn.ModuleList([Res(width, width), Attn(width), Res(width, width)])
    made = nn.Module()
    made.block_1, made.attn_1, made.block_2 = Res(width, width), Attn(width), Res(width, width)
    return made


class Side(nn.Module):
    """Encoder or decoder."""

    def __init__(self, sizes, *, llamagen, encoder):
        super().__init__()
        self.encoder = encoder
        widths = [sizes["ch"] * factor for factor in sizes["mult"]]
        last = len(widths) - 1
        first = (3, widths[0] if not encoder else sizes["ch"]) if encoder else (sizes["z"], widths[-1])
        self.conv_in = nn.Conv2d(*first, 3, 1, 1)
        self.mid = middle(widths[-1], llamagen=llamagen)
        levels, width = [], first[1]
        for number in range(last + 1) if encoder else range(last, -1, -1):
            blocks = sizes["blocks"] + (not encoder)
            made = level(width, widths[number], blocks, attention=number in sizes["attention"], llamagen=llamagen)
            width = widths[number]
            if encoder and number < last:
                made.downsample = Resample(width, 2)
            if not encoder and number > 0:
                made.upsample = Resample(width, 1)
            levels.append(made)
        self.levels = range(len(levels))
        if not encoder and not llamagen:  # numbered from full resolution, run from the lowest
            levels, self.levels = levels[::-1], self.levels[::-1]
        self.where = "conv_blocks" if llamagen else "down" if encoder else "up"
        setattr(self, self.where, nn.ModuleList(levels))
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, sizes["z"] if encoder else 3, 3, 1, 1)

    def middle(self, x):
        for block in self.mid.children():
            x = block(x)
        return x

    def forward(self, x):
        x = self.conv_in(x)
        x = x if self.encoder else self.middle(x)
        for number in self.levels:
            x = run_level(getattr(self, self.where)[number], x)
        x = self.norm_out(self.middle(x) if self.encoder else x)
        return self.conv_out(x * x.sigmoid())


class Reference(nn.Module):
    """A tokenizer of taming-transformers or LlamaGen; images in [-1, 1]."""

    def __init__(self, *, llamagen, **changes):
        super().__init__()
        sizes = {**SMALL, **changes}
        self.llamagen = llamagen
        self.encoder = Side(sizes, llamagen=llamagen, encoder=True)
        self.decoder = Side(sizes, llamagen=llamagen, encoder=False)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(sizes["codes"], sizes["width"])
        self.quant_conv = nn.Conv2d(sizes["z"], sizes["width"], 1)
        self.post_quant_conv = nn.Conv2d(sizes["width"], sizes["z"], 1)

    def codes(self):
        codes = self.quantize.embedding.weight
        return codes / codes.norm(dim=1, keepdim=True) if self.llamagen else codes

    def encode(self, images):
        rows = self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)  # (B, h, w, D)
        rows = rows / rows.norm(dim=-1, keepdim=True) if self.llamagen else rows
        return (rows.unsqueeze(-2) - self.codes()).square().sum(-1).argmin(-1).flatten(1)

    def decode(self, tokens, grid):
        codes = self.codes()[tokens].unflatten(1, grid).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(codes))


def reference(layout, **changes):
    """Returns a network of random weights, biases and scales, with codes near the encoder's outputs."""
    torch.manual_seed(0)
    made = Reference(llamagen=layout == "llamagen", **changes).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    features = made.quant_conv(made.encoder(images(8, seed=1))).permute(0, 2, 3, 1).flatten(0, 2)
    codes = made.quantize.embedding.weight
    chosen = features[torch.randperm(len(features))[: len(codes)]]
    scale = torch.rand(len(codes), 1) + 0.5 if made.llamagen else 1.0
    codes.copy_(chosen * scale + 0.05 * features.std() * torch.randn_like(codes))
    return made


def images(number=3, *, seed=0, size=(16, 16)):
    return 2 * torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(seed)) - 1


def save(network, path, **extra):
    """The file that the project itself would write, with what it holds besides the network."""
    weights = network.state_dict()
    if network.llamagen:
        weights["quantize.codebook_used"] = torch.zeros(65536)
        torch.save({"model": weights, "optimizer": {"state": {}}, "steps": 7, **extra}, path)
    else:
        weights |= {"loss.discriminator.main.0.weight": torch.rand(2, 3), "loss.perceptual_loss.lin0": torch.rand(2)}
        torch.save({"state_dict": weights, "epoch": 3, "pytorch-lightning_version": "1.0.8", **extra}, path)
    return path


LAYOUTS = {"taming": "last.ckpt", "llamagen": "vq_ds16.pt"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": ()},
        {"mult": (1, 1, 2, 2), "attention": (2, 3), "blocks": 2},
        {"mult": (2,), "attention": (0,)},
        {"mult": (2, 1), "attention": (0,), "z": 8, "width": 8},
    ],
    ids=["small", "no attention levels", "four levels", "one level", "narrower below"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_and_images_are_those_of_the_original(layout, changes, tmp_path):
    original = reference(layout, **changes)
    made = import_tokenizer(save(original, tmp_path / LAYOUTS[layout]), tmp_path / "out", image_size=16)
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    network = tokenizer.network
    assert made.folder == tmp_path / "out" / "tokenizer"
    assert made.config == network.config
    assert made.num_parameters == sum(parameter.numel() for parameter in original.parameters())
    assert tokenizer.image_size == 16

    expected = original.encode(images())
    assert len(expected.unique()) > 8
    assert torch.equal(network.encode((images() + 1) / 2), expected)
    decoded = original.decode(expected, tokenizer.grid)
    torch.testing.assert_close(network.decode(expected, tokenizer.grid), (decoded + 1) / 2, rtol=0, atol=1e-5)


def test_codes_of_llamagen_are_stored_at_length_1_whatever_the_length_of_features(tmp_path):
    original = reference("llamagen")
    original.quant_conv.weight.mul_(30)
    original.quant_conv.bias.mul_(30)
    import_tokenizer(save(original, tmp_path / "vq.pt"), tmp_path / "out", image_size=16)
    network = load_tokenizer(tmp_path / "out" / "tokenizer").network
    torch.testing.assert_close(network.quantizer.codebook.norm(dim=1), torch.ones(32))
    lengths = original.quantize.embedding.weight.norm(dim=1)
    assert lengths.max() > 1.2 * lengths.min()
    assert torch.equal(network.encode((images() + 1) / 2), original.encode(images()))


@pytest.mark.parametrize("codes", [1024, 16384])
def test_sizes_of_the_published_taming_tokenizers_are_read_off(codes):
    with torch.device("meta"):
        tensors = Reference(llamagen=False, **FULL, codes=codes, width=256).state_dict()
    config = TAMING.read_config(tensors, {})
    quantizer = {"name": "gradient", "commitment": 1.0, "codebook_weight": 0.25, "entropy_weight": 0.0}
    assert config == VQGANConfig(
        3, codebook_size=codes, layout="taming", attention_levels=(4,), latent_channels=256, quantizer=quantizer
    )
    assert (
        sum(weight.numel() for weight in tokenizer_weights(tensors, config, TAMING).values())
        == 71_879_555 + 256 * codes
    )


def test_sizes_of_the_published_llamagen_tokenizer_are_read_off():
    with torch.device("meta"):
        tensors = Reference(llamagen=True, **FULL, codes=16384, width=8).state_dict()
    config = LLAMAGEN.read_config(tensors, {})
    assert tokenizer_layout_of(tensors).name == "LlamaGen"
    quantizer = {"name": "gradient", "commitment": 0.25, "codebook_weight": 1.0, "entropy_weight": 0.0}
    assert config == VQGANConfig(
        3,
        codebook_size=16384,
        code_dim=8,
        layout="taming",
        attention_levels=(4,),
        latent_channels=256,
        quantizer=quantizer,
    )
    assert sum(weight.numel() for weight in tokenizer_weights(tensors, config, LLAMAGEN).values()) == 71_883_403


def test_what_is_not_the_network_is_named(tmp_path):
    made = import_tokenizer(save(reference("taming"), tmp_path / "a.ckpt"), tmp_path / "a", image_size=16)
    assert made.layout == "taming-transformers"
    assert made.ignored == ("epoch", "pytorch-lightning_version", "loss.* (2 tensors)")
    made = import_tokenizer(save(reference("llamagen"), tmp_path / "b.pt"), tmp_path / "b", image_size=16)
    assert made.layout == "LlamaGen"
    assert made.ignored == ("optimizer", "steps", "quantize.codebook_used")


def test_the_average_of_llamagen_goes_before_its_last_weights(tmp_path):
    last, average = reference("llamagen"), reference("llamagen")
    average.decoder.conv_out.bias.add_(1)
    made = import_tokenizer(save(last, tmp_path / "a.pt", ema=average.state_dict()), tmp_path / "out", image_size=16)
    assert "model" in made.ignored
    bias = load_tokenizer(tmp_path / "out" / "tokenizer").network.decoder.head.bias
    assert torch.equal(bias, average.decoder.conv_out.bias)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "safetensors", "before torch 1.6", "half"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_files_with_the_same_tensors_are_read(form, layout, tmp_path):
    original = reference(layout)
    weights = original.state_dict()
    file = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        save_file(weights, file)
    elif form == "half":
        torch.save({name: value.half() for name, value in weights.items()}, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=form == "plain")
    import_tokenizer(file, tmp_path / "out", image_size=16)
    got = load_tokenizer(tmp_path / "out" / "tokenizer").network.state_dict()
    assert all(value.dtype == torch.float32 for value in got.values())
    torch.testing.assert_close(got["decoder.head.bias"], weights["decoder.conv_out.bias"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("old", [False, True])
def test_records_of_the_training_program_are_passed_over_without_its_classes(old, tmp_path, monkeypatch):
    """Reads records of old Lightning, callbacks' states keyed by the class, and LlamaGen's arguments."""
    imported = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    imported.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": imported.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", imported.__name__):
        monkeypatch.setitem(sys.modules, name, imported)
    records = {
        "callbacks": {imported.ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
        "args": argparse.Namespace(steps=3, inner=argparse.Namespace()),
    }
    file = tmp_path / "last.ckpt"
    content = {"state_dict": reference("taming").state_dict(), **records}
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    monkeypatch.delitem(sys.modules, imported.__name__)  # not there when it is read
    made = import_tokenizer(file, tmp_path / "out", image_size=16)
    assert {"callbacks", "args"} <= set(made.ignored)
    assert imported.__name__ not in sys.modules


@pytest.mark.parametrize("old", [False, True])
def test_a_hostile_file_runs_nothing(old, tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    file = tmp_path / "hostile.ckpt"
    content = {"state_dict": reference("taming").state_dict(), "args": argparse.Namespace(x=Hostile())}
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"got also posix\.mkdir, a Python object"):
        import_tokenizer(file, tmp_path / "out", image_size=16)
    assert not canary.exists()


# What is refused

CODEBOOK = "quantize.embedding.weight"


def damaged(change):
    """Writes a taming checkpoint after ``change`` of its tensors."""

    def write(path):
        weights = reference("taming").state_dict()
        change(weights)
        torch.save({"state_dict": weights}, path)

    return write


def renamed(weights, old, new):
    weights[new] = weights.pop(old)


def wrong_width(weights):
    weights["encoder.down.1.block.0.conv1.weight"] = torch.zeros(40, 32, 3, 3)


REFUSED = {
    "LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "web page": (
        lambda path: path.write_text("\n<!DOCTYPE html><html>Sign in</html>"),
        "web page; the download",
    ),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), "one that begins with .*PNG"),
    "cut off": (
        lambda path: path.write_bytes(save(reference("taming"), path).read_bytes()[:-100]),
        "cut off; download it again",
    ),
    "cut off safetensors": (
        lambda path: (
            save_file(reference("taming").state_dict(), path),
            path.write_bytes(path.read_bytes()[:-100]),
        ),
        "cannot be read.*download it again",
    ),
    "old and cut off": (
        lambda path: (
            torch.save(reference("taming").state_dict(), path, _use_new_zipfile_serialization=False),
            path.write_bytes(path.read_bytes()[:9000]),
        ),
        "download it again",
    ),
    "python object": (
        lambda path: save(reference("llamagen"), path, args=SimpleNamespace(steps=3)),
        r"got also types\.SimpleNamespace, a Python object; .*save only the weights: torch\.save",
    ),
    "old python object": (
        lambda path: torch.save({"a": SimpleNamespace(b=3)}, path, _use_new_zipfile_serialization=False),
        r"got also types\.SimpleNamespace, a Python object",
    ),
    "list": (lambda path: torch.save([torch.zeros(1)], path), "must hold a state dict, got list"),
    "number among tensors": (damaged(lambda weights: weights.update(scale=1.0)), "entry scale must be a tensor"),
    "transformer": (
        lambda path: torch.save({"model": {"tok_embeddings.weight": torch.zeros(4, 4)}}, path),
        r"got a transformer \(tok_embeddings\.weight\); name its tokenizer, or use maskgit import-transformer",
    ),
    "transformer of taming": (
        lambda path: torch.save({"state_dict": {"transformer.tok_emb.weight": torch.zeros(4, 4)}}, path),
        r"must be a tokenizer of .*, got a transformer \(transformer\.tok_emb\.weight\)",
    ),
    "something else": (
        lambda path: torch.save({f"fc{n}.weight": torch.zeros(1) for n in range(5)}, path),
        r"got something else \(fc0\.weight, fc1\.weight, fc2\.weight and 2 more\); name a file of one of these",
    ),
    "gumbel": (
        damaged(lambda weights: renamed(weights, "quantize.embedding.weight", "quantize.embed.weight")),
        r"got a Gumbel-softmax tokenizer \(quantize\.embed\.weight\); name another one, such as vqgan_imagenet",
    ),
    "codebook that repeats one number": (  # 4 GB in 1 MB
        damaged(lambda weights: weights.update({CODEBOOK: torch.ones(1).expand(1 << 22, 256)})),
        r"quantize\.embedding\.weight' must be stored in full, got 4\.29 GB made of 4 bytes that repeat",
    ),
    "codebook not finite": (
        damaged(lambda weights: weights[CODEBOOK][3].fill_(math.nan)),
        r"quantize\.embedding\.weight' must hold finite numbers, got nan",
    ),
    "codebook of integers": (
        damaged(lambda weights: weights.update({CODEBOOK: weights[CODEBOOK].long()})),
        r"quantize\.embedding\.weight' must be floating point .*, got torch\.int64",
    ),
    "no codebook": (
        damaged(lambda weights: weights.pop("quantize.embedding.weight")),
        r"quantize\.embedding\.weight must be there",
    ),
    "missing": (
        damaged(lambda weights: weights.pop("decoder.up.0.block.1.conv2.bias")),
        r"missing: decoder\.up\.0\.block\.1\.conv2\.bias",
    ),
    "missing size": (
        damaged(lambda weights: weights.pop("encoder.conv_out.weight")),
        r"missing: encoder\.conv_out\.weight",
    ),
    "left over": (
        damaged(lambda weights: weights.update({"decoder.up.0.attn.0.q.bias": torch.zeros(32)})),
        r"not in the network: decoder\.up\.0\.attn\.0\.q\.bias",
    ),
    "index map": (
        damaged(lambda weights: weights.update({"quantize.used": torch.zeros(9)})),
        r"not in the network: quantize\.used",
    ),
    "wrong shape": (
        damaged(lambda weights: weights.update({"post_quant_conv.weight": torch.zeros(12, 5, 1, 1)})),
        r"post_quant_conv\.weight must have shape \(12, 4, 1, 1\), got \(12, 5, 1, 1\)",
    ),
    "wrong axes": (
        damaged(lambda weights: weights.update({"encoder.conv_in.weight": torch.zeros(32, 3)})),
        r"encoder\.conv_in\.weight must have 4 axes, got shape \(32, 3\)",
    ),
    "uneven width": (damaged(wrong_width), r"multiples of the first convolution's 32, got \[32, 40\]"),
    "groups": (
        damaged(
            lambda weights: weights.update(
                {
                    "encoder.conv_in.weight": torch.zeros(24, 3, 3, 3),
                    "encoder.down.0.block.0.conv1.weight": torch.zeros(24, 24, 3, 3),
                    "encoder.down.1.block.0.conv1.weight": torch.zeros(48, 24, 3, 3),
                }
            )
        ),
        r"network num_groups must divide the channels of every level, \(24, 48\).* got 32",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_tokenizer_is_refused_in_one_line_and_nothing_is_written(case, tmp_path):
    write, message = REFUSED[case]
    file = tmp_path / "file.ckpt"
    write(file)
    with pytest.raises(ValueError, match=message) as refusal:
        import_tokenizer(file, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"checkpoint {file}")
    assert not (tmp_path / "out").exists()


def test_any_cut_is_refused(tmp_path):
    for old in (True, False):
        whole = tmp_path / "whole.pt"
        torch.save({"a": torch.rand(40), "b": torch.rand(3)}, whole, _use_new_zipfile_serialization=not old)
        content = whole.read_bytes()
        for length in range(1, len(content), 23):
            cut = tmp_path / "cut.pt"
            cut.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"checkpoint .*cut\.pt"):
                import_tokenizer(cut, tmp_path / "out")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        check_torch_file(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got a folder; name the file itself"):
        import_tokenizer(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("size", [15, 0, -16])
def test_a_size_that_the_factor_does_not_divide_is_refused(size, tmp_path):
    file = save(reference("taming"), tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=f"image size must be a positive multiple of the downsampling factor 2, got {size}"
    ):
        import_tokenizer(file, tmp_path / "out", image_size=size)
    assert not (tmp_path / "out").exists()


def test_what_was_there_is_kept(tmp_path):
    file = save(reference("taming"), tmp_path / "a.ckpt")
    made = import_tokenizer(file, tmp_path / "out", image_size=16)
    before = fingerprint(made.folder)
    with pytest.raises(FileExistsError, match="must be a new or empty folder, got one with content"):
        import_tokenizer(save(reference("llamagen"), tmp_path / "b.pt"), tmp_path / "out", image_size=16)
    assert fingerprint(made.folder) == before


def test_a_folder_that_a_file_manager_has_shown_is_empty(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    made = import_tokenizer(save(reference("taming"), tmp_path / "a.ckpt"), tmp_path / "out", image_size=16)
    assert (made.folder / "config.json").is_file()


# What an imported tokenizer is good for


def batch():
    number = torch.arange(4)
    content = ((images(4) + 1) * 127.5).to(torch.uint8)
    return Batch(content, number, number, torch.zeros_like(number), number, torch.ones(4, dtype=torch.bool))


def trainer_of_two_steps(**settings):
    return Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, **settings,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_from_an_imported_tokenizer(layout, memory_format, tmp_path):
    folder = import_tokenizer(save(reference(layout), tmp_path / "a.pt"), tmp_path / "out", image_size=16).folder
    start = load_tokenizer(folder).network
    adversarial = AdversarialConfig(
        DiscriminatorConfig(channel_multiplier=1 / 64), loss="hinge", weight_rule="adaptive", r1_weight=0
    )
    module = tokenizer_model(
        start.config, image_size=16, rate=LearningRate(1e-4), adversarial=adversarial, memory_format=memory_format,
        ema_decay=0.0,
    )  # fmt: skip
    module.network.load_state_dict(start.state_dict())
    module.ema_network.load_state_dict(start.state_dict())
    trainer = trainer_of_two_steps()
    trainer.fit(module, DataLoader([batch()] * 2, batch_size=None), DataLoader([batch()], batch_size=None))
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["val/psnr"])
    for name, weight in module.network.named_parameters():
        assert torch.isfinite(weight).all()
        if name != "quantizer.codebook":
            assert not torch.equal(weight, start.state_dict()[name]), name
    module.export(tmp_path / "tuned")
    assert load_tokenizer(tmp_path / "tuned" / "tokenizer").network.config == start.config


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage_2_trains_on_an_imported_tokenizer(layout, tiny_shards, tmp_path):
    folder = import_tokenizer(save(reference(layout), tmp_path / "a.pt"), tmp_path / "out", image_size=8).folder
    config = TransformerConfig(32, 3, (4, 4), 16, 1, 2, 32)
    check_tokenizer(config, load_tokenizer(folder))
    with pytest.raises(ValueError, match="codebook_size"):
        check_tokenizer(replace(config, codebook_size=16), load_tokenizer(folder))
    module = masked_model(config, folder, decoding=DecodingConfig(num_steps=4))
    sizes = {"image_size": 8, "global_batch": 8, "max_batch_per_device": 8, "validation_batch": 8}
    trainer = trainer_of_two_steps(use_distributed_sampler=False)
    trainer.fit(module, datamodule=ShardData(ShardDataConfig(str(tiny_shards), source="images", **sizes)))
    assert trainer.global_step == 2
    last = list(module.sample([0, 2], seeds=[0, 1]))[-1]
    assert module.tokenizer.decode(last.tokens).shape == (2, 3, 8, 8)
