"""Folders of tokenizers and transformers: saved and loaded, and refused when they are damaged or hostile."""

import json
import logging
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.config import AutoregressiveDecoding
from maskgit_pl.files import write_tensors
from maskgit_pl.networks.transformer import AutoregressiveTransformer, MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weights import read_tensors
from maskgit_pl.pretrained.networks import (
    fingerprint,
    load_tokenizer,
    load_transformer,
    read_config,
    read_decoding,
    save_decoding,
    save_tokenizer,
    save_transformer,
)
from maskgit_pl.schedules import Pow

VQGAN_CONFIG = VQGANConfig(
    1,
    base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=4,
    quantizer="ema",
)  # fmt: skip
TRANSFORMER_CONFIG = TransformerConfig(16, 2, (4, 4), 16, 1, 2, 32)
DECODING = DecodingConfig(3, {"name": "confidence", "choice_temperature": 2.0}, "linear", 0.5)
LOADERS = {"tokenizer": load_tokenizer, "transformer": load_transformer}


def vqgan(seed: int = 0) -> VQGAN:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQGAN(VQGAN_CONFIG)


def random_network() -> MaskedTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskedTransformer(TRANSFORMER_CONFIG)


def save_both(folder: Path, decoding: DecodingConfig = DECODING) -> Path:
    save_tokenizer(folder / "tokenizer", VQGAN_CONFIG, vqgan().state_dict(), image_size=8)
    save_transformer(
        folder / "transformer",
        TRANSFORMER_CONFIG,
        random_network().state_dict(),
        mask_schedule={"name": "pow", "exponent": 2.5},
        decoding=decoding,
        class_names=("cat", "dog"),
        tokenizer_fingerprint="abc",
    )
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_both(tmp_path / "pretrained")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@contextmanager
def bounded_memory(count: int) -> Iterator[None]:
    """Limits the memory of the process to ``count`` more bytes."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_tokenizer_is_loaded_as_it_was_saved(saved):
    loaded = load_tokenizer(saved / "tokenizer")
    assert loaded.network.config == VQGAN_CONFIG
    assert equal(loaded.network.state_dict(), vqgan().state_dict())
    assert (loaded.image_size, loaded.grid) == (8, (4, 4))
    assert loaded.fingerprint == fingerprint(saved / "tokenizer")


def test_a_transformer_is_loaded_as_it_was_saved(saved):
    loaded = load_transformer(str(saved / "transformer"))
    assert loaded.network.config == TRANSFORMER_CONFIG
    assert equal(loaded.network.state_dict(), random_network().state_dict())
    assert not any(module.training for module in loaded.network.modules())
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert loaded.mask_schedule == Pow(2.5)
    assert loaded.decoding == DECODING
    assert loaded.class_names == ("cat", "dog")
    assert loaded.tokenizer_fingerprint == "abc"


def test_a_causal_transformer_is_loaded_as_it_was_saved(tiny_autoregressive):
    loaded = load_transformer(tiny_autoregressive / "transformer")
    assert type(loaded.network) is AutoregressiveTransformer
    assert loaded.mask_schedule is None
    assert loaded.decoding == AutoregressiveDecoding({"name": "linear", "scale": 1.0}).to_config(16)
    with pytest.raises(ValueError, match=r"tune requires a model with bidirectional attention, .* choose another run"):
        loaded.schedule_for("tune")


@pytest.mark.parametrize("kind", LOADERS)
def test_missing_and_damaged_files_are_refused_by_their_path(saved, kind):
    folder = saved / kind
    with pytest.raises(FileNotFoundError, match=rf"{kind} .*nowhere: no config\.json there"):
        LOADERS[kind](saved / "nowhere")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 7, 200, -1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"weights .*{kind}/model\.safetensors must be a complete"):
            LOADERS[kind](folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"weights .*{kind}/model\.safetensors: no such file"):
        LOADERS[kind](folder)
    for text in ("{", "", "[]", '"text"'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"{kind}/config\.json (is not valid JSON|must hold a mapping)"):
            LOADERS[kind](folder)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("tokenizer", {"format": "maskgit_pl.transformer"}, r"format must be 'maskgit_pl\.tokenizer', got"),
        ("tokenizer", {"network": {"colour": "red"}}, "network: unknown key 'colour'"),
        ("transformer", {"decoding": {"colour": "red"}}, "decoding: unknown key 'colour'"),
        ("transformer", {"mask_schedule": "cosin"}, "unknown mask schedule 'cosin': did you mean 'cosine'"),
        ("transformer", {"mask_schedule": None}, "mask_schedule must be .*, got None for bidirectional"),
        ("transformer", {"tokenizer_fingerprint": 3}, "tokenizer_fingerprint must be a string or null, got 3"),
        ("transformer", {"class_names": ["cat"]}, "class_names must be a list of 2 strings"),
    ],
)
def test_a_wrong_value_is_refused_by_its_file(saved, kind, changes, message):
    old = read_config(saved / kind, kind)
    changed = {name: {**old[name], **new} if isinstance(new, dict) else new for name, new in changes.items()}
    edit(saved / kind / "config.json", **changed)
    with pytest.raises(ValueError, match=rf"{kind}/config\.json: .*{message}"):
        LOADERS[kind](saved / kind)


@pytest.mark.parametrize(
    ("kind", "sizes", "rule"),
    [
        ("transformer", {"codebook_size": 17}, r"token_embedding\.weight must have shape \(21, 16\), got \(20, 16\)"),
        ("transformer", {"depth": 1000}, "network of 1000 blocks must fit model.safetensors, which holds 21 tensors"),
        ("tokenizer", {"num_res_blocks": 64, "num_middle_blocks": 64}, "network of 192 blocks must fit"),
        ("tokenizer", {"base_channels": 16384, "num_groups": 1}, r"must have shape \(16384, 1, 3, 3\), got"),
    ],
)
def test_sizes_that_the_weights_do_not_have_take_no_memory(saved, kind, sizes, rule):
    edit(saved / kind / "config.json", network={**read_config(saved / kind, kind)["network"], **sizes})
    with bounded_memory(200_000_000), pytest.raises(ValueError, match=rf"{saved / kind}/.*{rule}"):
        LOADERS[kind](saved / kind)


def test_the_fingerprint_depends_on_the_weights_only(tmp_path):
    changed = {name: tensor.clone() for name, tensor in vqgan().state_dict().items()}
    next(iter(changed.values())).view(-1)[0] += 1e-3
    prints = []
    for weights, size in ((vqgan().state_dict(), 8), (vqgan().state_dict(), 16), (changed, 8)):
        save_tokenizer(tmp_path / "tokenizer", VQGAN_CONFIG, weights, image_size=size)
        prints.append(fingerprint(tmp_path / "tokenizer"))
    assert prints[0] == prints[1] != prints[2]


def test_an_older_folder_is_replaced_unless_it_holds_other_files(saved):
    before, stray = fingerprint(saved / "tokenizer"), saved / "tokenizer" / "stray.txt"
    stray.write_text("years of work")
    with pytest.raises(FileExistsError, match=r"got also stray\.txt; move them"):
        save_tokenizer(saved / "tokenizer", VQGAN_CONFIG, vqgan(seed=1).state_dict(), image_size=16)
    assert fingerprint(saved / "tokenizer") == before
    stray.unlink()
    save_tokenizer(saved / "tokenizer", VQGAN_CONFIG, vqgan(seed=1).state_dict(), image_size=16)
    assert equal(load_tokenizer(saved / "tokenizer").network.state_dict(), vqgan(seed=1).state_dict())
    assert load_tokenizer(saved / "tokenizer").image_size == 16
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer", "transformer"]  # nothing is left beside them


@pytest.mark.parametrize(("kind", "name"), [("tokenizer", "quantizer.counts"), ("transformer", "blocks.0.fc1.bias")])
def test_weights_that_are_not_finite_floats_are_refused_by_tensor(saved, kind, name):
    file, size = saved / kind / "model.safetensors", 32 if kind == "transformer" else 16
    for dtype, value, rule in (
        (torch.float32, math.nan, "hold finite numbers, got"),
        (torch.float64, 1e300, "hold finite numbers, got"),
        (torch.int64, 1, r"be floating point .*, got torch.int64"),
    ):
        write_tensors(file, {**read_tensors(file), name: torch.full((size,), value, dtype=dtype)})
        with pytest.raises(ValueError, match=rf"weights .*{kind}/model\.safetensors: tensor '{name}' must {rule}"):
            LOADERS[kind](saved / kind)


def test_weights_that_are_not_finite_do_not_replace_an_older_folder(saved):
    weights = vqgan(seed=1).state_dict()
    weights["encoder.head.weight"][0] = math.nan
    with pytest.raises(ValueError, match=r"tokenizer .* is not written: tensor 'encoder\.head\.weight' .* diverged"):
        save_tokenizer(saved / "tokenizer", VQGAN_CONFIG, weights, image_size=8)
    assert equal(load_tokenizer(saved / "tokenizer").network.state_dict(), vqgan().state_dict())
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer", "transformer"]


TUNED = DecodingConfig(
    5,
    {"name": "remdm", "eta": 0.4},
    {"name": "linear", "scale": 0.5},
    sampling_temperature=(1.2, 0.7),
    top_k=9,
    tokens_per_step=(1, 2, 3, 4, 6),
    mask_schedule={"name": "pow", "exponent": 3.0},
)


def test_decoding_settings_are_read_as_written(saved: Path, caplog) -> None:
    save_decoding(saved, TUNED, tuned={"metric": "fid"})
    assert read_decoding(saved) == TUNED
    assert not caplog.records
    save_decoding(saved, DECODING)
    assert read_decoding(saved) == DECODING
    assert sorted(path.name for path in saved.iterdir()) == ["decoding.json", "tokenizer", "transformer"]
    edit(saved / "decoding.json", transformer="0" * 64)
    with caplog.at_level(logging.WARNING, logger="maskgit_pl"):
        assert read_decoding(saved) == DECODING
    assert "tuned for a transformer with fingerprint 000000000000" in caplog.text
