import json
import logging
import math
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import AutoregressiveDecoding, DecodingConfig
from maskgit_pl.files import write_tensors
from maskgit_pl.networks.transformer import AutoregressiveTransformer, MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weights import read_tensors
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer, images_at_once
from maskgit_pl.pipeline.pretrained import (
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
from tests.conftest import tiny_tokenizer

VQGAN_CONFIG = VQGANConfig(
    1,
    base_channels=8,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    num_groups=2,
    codebook_size=16,
    code_dim=4,
    quantizer="ema",
)
TRANSFORMER_CONFIG = TransformerConfig(16, 2, (4, 4), 16, 1, 2, 32)
DECODING = DecodingConfig(3, {"name": "confidence", "choice_temperature": 2.0}, "linear", 0.5)
LOADERS = {"tokenizer": load_tokenizer, "transformer": load_transformer}


def vqgan(seed: int = 0) -> VQGAN:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQGAN(VQGAN_CONFIG)


def save_both(folder: Path) -> Path:
    save_tokenizer(folder / "tokenizer", VQGAN_CONFIG, vqgan().state_dict(), image_size=8)
    save_transformer(
        folder / "transformer",
        TRANSFORMER_CONFIG,
        MaskedTransformer(TRANSFORMER_CONFIG).state_dict(),
        mask_schedule={"name": "pow", "exponent": 2.5},
        decoding=DECODING,
        class_names=("cat", "dog"),
        tokenizer_fingerprint="abc",
    )
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_both(tmp_path / "pretrained")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def bounded_memory(count: int) -> Iterator[None]:
    """Refuses to give the process more than ``count`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_tokenizer_comes_back_as_it_was_saved(saved):
    made = load_tokenizer(saved / "tokenizer")
    assert made.network.config == VQGAN_CONFIG
    assert equal(made.network.state_dict(), vqgan().state_dict())
    assert made.image_size == 8
    assert made.grid == (4, 4)
    assert made.fingerprint == fingerprint(saved / "tokenizer")


def test_a_transformer_comes_back_as_it_was_saved(tmp_path):
    network = MaskedTransformer(TRANSFORMER_CONFIG)
    save_transformer(
        tmp_path / "deep" / "folder",
        TRANSFORMER_CONFIG,
        network.state_dict(),
        mask_schedule={"name": "pow", "exponent": 2.5},
        decoding=DECODING,
        class_names=("cat", "dog"),
        tokenizer_fingerprint="abc",
    )
    made = load_transformer(str(tmp_path / "deep" / "folder"))
    assert made.network.config == TRANSFORMER_CONFIG
    assert equal(made.network.state_dict(), network.state_dict())
    assert made.mask_schedule == Pow(2.5)
    assert made.decoding == DECODING
    assert made.class_names == ("cat", "dog")
    assert made.tokenizer_fingerprint == "abc"


def test_a_causal_transformer_comes_back_as_it_was_saved(tiny_autoregressive):
    made = load_transformer(tiny_autoregressive / "transformer")
    assert type(made.network) is AutoregressiveTransformer
    assert made.mask_schedule is None
    assert made.decoding == AutoregressiveDecoding({"name": "linear", "scale": 1.0}).to_config(16)
    with pytest.raises(ValueError, match=r"tune requires a model with bidirectional attention, .* choose another run"):
        made.schedule_for("tune")


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_loaded_networks_are_frozen_and_in_evaluation_mode(saved, kind):
    network = LOADERS[kind](saved / kind).network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_folder_of_the_other_kind_is_refused_by_its_file(saved, kind):
    other = "transformer" if kind == "tokenizer" else "tokenizer"
    with pytest.raises(ValueError, match=rf"{other}/config\.json: format must be 'maskgit_pl\.{kind}', got"):
        LOADERS[kind](saved / other)


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_missing_folder_is_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=rf"{kind} .*nowhere: no config\.json there"):
        LOADERS[kind](tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_missing_weights_are_named(saved, kind):
    (saved / kind / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"weights .*{kind}/model\.safetensors: no such file"):
        LOADERS[kind](saved / kind)


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_truncated_weights_are_refused_by_their_file(saved, kind, kept):
    file = saved / kind / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"weights .*{kind}/model\.safetensors must be a complete safetensors file"):
        LOADERS[kind](saved / kind)


def test_weights_of_another_size_are_refused_by_their_file(saved):
    config = read_config(saved / "transformer", "transformer")["network"]
    edit(saved / "transformer", network={**config, "codebook_size": 17})
    fault = r"do not fit the network's sizes: .*token_embedding\.weight must have shape \(21, 16\), got \(20, 16\)"
    with pytest.raises(ValueError, match=rf"weights .*/transformer/model\.safetensors {fault}"):
        load_transformer(saved / "transformer")
    edit(saved / "transformer", network={**config, "num_classes": 3})
    with pytest.raises(ValueError, match=r"config\.json: class_names must be a list of 3 strings"):
        load_transformer(saved / "transformer")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("tokenizer", {"version": 2}, "version must be 1, got 2; update maskgit_pl"),
        ("tokenizer", {"network": {"colour": "red"}}, "network: unknown key 'colour'"),
        ("tokenizer", {"image_size": 7.5}, "image_size must be an integer in"),
        ("transformer", {"network": {"colour": "red"}}, "network: .*unknown key 'colour'"),
        ("transformer", {"decoding": {"colour": "red"}}, "decoding: unknown key 'colour'"),
        ("transformer", {"mask_schedule": "cosin"}, "unknown mask schedule 'cosin': did you mean 'cosine'"),
        ("transformer", {"mask_schedule": None}, "mask_schedule must be .*, got None for bidirectional"),
        ("transformer", {"tokenizer_fingerprint": 3}, "tokenizer_fingerprint must be a string, got 3"),
        ("transformer", {"class_names": ["cat"]}, "class_names must be a list of 2 strings"),
    ],
)
def test_a_wrong_value_is_refused_by_its_file(saved, kind, changes, message):
    old = read_config(saved / kind, kind)
    edit(
        saved / kind, **{name: {**old[name], **new} if isinstance(new, dict) else new for name, new in changes.items()}
    )
    with pytest.raises(ValueError, match=rf"{kind}/config\.json: .*{message}"):
        LOADERS[kind](saved / kind)


@pytest.mark.parametrize("text", ["{", "", "[]", '"text"'])
def test_a_broken_config_is_refused_by_its_file(saved, text):
    (saved / "tokenizer" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer/config\.json (is not valid JSON|must hold a mapping)"):
        load_tokenizer(saved / "tokenizer")


def test_the_fingerprint_changes_with_the_weights_and_with_nothing_else(tmp_path):
    first, same, other, configured = (tmp_path / name for name in ("first", "same", "other", "configured"))
    save_tokenizer(first, VQGAN_CONFIG, vqgan().state_dict(), image_size=8)
    save_tokenizer(same, VQGAN_CONFIG, vqgan().state_dict(), image_size=8)
    save_tokenizer(configured, VQGAN_CONFIG, vqgan().state_dict(), image_size=16)
    changed = {name: tensor.clone() for name, tensor in vqgan().state_dict().items()}
    next(iter(changed.values())).view(-1)[0] += 1e-3
    save_tokenizer(other, VQGAN_CONFIG, changed, image_size=8)
    assert fingerprint(first) == fingerprint(same) == fingerprint(configured)
    assert fingerprint(first) != fingerprint(other)
    assert len(fingerprint(first)) == 64


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


def edit_weights(folder: Path, name: str, tensor: Tensor) -> None:
    file = folder / "model.safetensors"
    write_tensors(file, {**read_tensors(file), name: tensor})


@pytest.mark.parametrize(("kind", "name"), [("tokenizer", "quantizer.counts"), ("transformer", "blocks.0.fc1.bias")])
def test_weights_that_are_not_finite_floating_point_numbers_are_refused_by_file_and_tensor(saved, kind, name):
    where = rf"weights .*{kind}/model\.safetensors: tensor '{name}' must"
    for dtype, bad in ((torch.float32, math.nan), (torch.float16, math.inf), (torch.float64, 1e300)):
        edit_weights(saved / kind, name, torch.full((32 if kind == "transformer" else 16,), bad, dtype=dtype))
        with pytest.raises(ValueError, match=rf"{where} hold finite numbers, got"):
            LOADERS[kind](saved / kind)
    edit_weights(saved / kind, name, torch.ones(32 if kind == "transformer" else 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{where} be floating point, got torch.int64"):
        LOADERS[kind](saved / kind)


def test_weights_that_are_not_finite_are_not_exported_and_the_older_folder_stays(saved):
    weights = vqgan(seed=1).state_dict()
    weights["encoder.head.weight"][0] = math.nan
    with pytest.raises(ValueError, match=r"tokenizer .* is not written: tensor 'encoder\.head\.weight' .* diverged"):
        save_tokenizer(saved / "tokenizer", VQGAN_CONFIG, weights, image_size=8)
    assert equal(load_tokenizer(saved / "tokenizer").network.state_dict(), vqgan().state_dict())
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer", "transformer"]


@pytest.mark.parametrize(
    ("kind", "sizes", "rule"),
    [
        ("transformer", {"depth": 1000}, "network of 1000 blocks must fit model.safetensors, which holds 21 tensors"),
        (
            "transformer",
            {"embed_dim": 2**16, "mlp_dim": 2**20},
            "token_embedding.weight must have shape .20, 65536., got .20, 16.",
        ),
        ("tokenizer", {"num_res_blocks": 64, "num_middle_blocks": 64}, "network of 192 blocks must fit"),
        (
            "tokenizer",
            {"base_channels": 16384, "num_groups": 1},
            "encoder.stem.weight must have shape .16384, 1, 3, 3., got",
        ),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_a_network_has_memory(saved, kind, sizes, rule):
    edit(saved / kind, network={**read_config(saved / kind, kind)["network"], **sizes})
    with bounded_memory(200_000_000), pytest.raises(ValueError, match=rf"{saved / kind}/.*{rule}"):
        LOADERS[kind](saved / kind)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_exports_have_the_permissions_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_both(tmp_path / "pretrained")
        save_decoding(tmp_path / "pretrained", DECODING)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "pretrained").rglob("*")}
    assert len(modes) == 7
    assert all(mode == (0o777 if path.is_dir() else 0o666) & ~mask for path, mode in modes.items())


RECIPE = DecodingConfig(
    5,
    {"name": "remdm", "strategy": "loop"},
    {"name": "linear", "scale": 0.5},
    sampling_temperature=(1.2, 0.7),
    top_p=0.9,
    tokens_per_step=(1, 2, 3, 4, 6),
    mask_schedule={"name": "pow", "exponent": 3.0},
)


def edit_decoding(folder: Path, **changes: object) -> None:
    file = folder / "decoding.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_recipe_comes_back_as_it_was_saved_and_an_older_one_is_kept(saved: Path, caplog) -> None:
    assert save_decoding(saved, RECIPE, tuned={"metric": "fid"}) is None
    assert read_decoding(saved) == RECIPE
    assert not caplog.records
    assert json.loads((saved / "decoding.json").read_text())["tuned"] == {"metric": "fid"}
    old = save_decoding(saved, DECODING)
    assert old == saved / "decoding.json.old"
    assert json.loads(old.read_text())["tuned"] == {"metric": "fid"}
    assert read_decoding(saved) == DECODING
    assert sorted(path.name for path in saved.iterdir()) == [
        "decoding.json", "decoding.json.old", "tokenizer", "transformer",
    ]  # fmt: skip


def test_a_recipe_for_other_weights_is_used_with_a_warning(saved: Path, caplog) -> None:
    save_decoding(saved, DECODING)
    edit_decoding(saved, transformer="0" * 64)
    with caplog.at_level(logging.WARNING, logger="maskgit_pl"):
        assert read_decoding(saved) == DECODING
    assert "tuned for a transformer with fingerprint 000000000000" in caplog.text


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "other"}, "format must be 'maskgit_pl.decoding', version 1, got 'other'"),
        ({"version": 2}, "got 'maskgit_pl.decoding', version 2"),
        ({"decoding": {"steps": 8}}, "unknown key 'steps'"),
        ({"decoding": [8]}, "decoding must be a mapping, got "),
        ({"decoding": {"token_selector": "confidnce"}}, "did you mean 'confidence'"),
        ({"decoding": {"guidance": {"name": "linear", "power": 2}}}, "power"),
        ({"decoding": {"num_steps": 0}}, "num_steps must be an integer in"),
        ({"decoding": {"num_steps": "8"}}, "delete the file"),
        ({"decoding": {"top_p": 1.5}}, "top_p"),
        (
            {"decoding": {"token_selector": None, "mask_schedule": "cosine"}},
            "mask_schedule must not be set for an autoregressive model",
        ),
    ],
)
def test_a_recipe_that_is_none_is_refused_by_name(saved: Path, changes: dict[str, object], match: str) -> None:
    save_decoding(saved, DECODING)
    edit_decoding(saved, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        read_decoding(saved)
    assert str(saved / "decoding.json") in str(caught.value)


# Pixels and tokens


def test_decoded_images_are_cut_to_the_image_size_and_clipped() -> None:
    tokenizer = tiny_tokenizer()  # 14 px need a grid of 4 x 4, which covers 16 px
    tokens = torch.arange(16).remainder(8).expand(3, 16)
    images = tokenizer.decode(tokens)
    assert images.shape == (3, 1, 14, 14)
    with torch.no_grad():
        exact = tokenizer.network.decode(tokens, (4, 4))[..., :14, :14].clamp(0, 1) * 255
    assert (images - exact).abs().max() <= 0.5


@pytest.mark.parametrize(("size", "count"), [((256, 256), 16), ((512, 512), 4), ((28, 28), 1337), ((4096, 4096), 1)])
def test_the_pixels_that_are_decoded_at_once_are_bounded(size, count):
    assert images_at_once(*size) == count


def test_decoding_in_parts_gives_the_same_pictures(monkeypatch):
    config = VQGANConfig(
        1, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=4
    )
    tokenizer = PretrainedTokenizer(VQGAN(config).eval(), 8, "")
    tokens = torch.randint(0, 16, (7, 16), generator=torch.Generator().manual_seed(0))
    whole, parts, decode = tokenizer.decode(tokens), [], tokenizer.network.decode
    monkeypatch.setattr("maskgit_pl.pipeline.fine_tuning._MAX_PIXELS", 3 * 8 * 8)
    monkeypatch.setattr(tokenizer.network, "decode", lambda part, grid: parts.append(len(part)) or decode(part, grid))
    made = tokenizer.decode(tokens)
    assert parts == [3, 3, 1]
    assert (made.int() - whole.int()).abs().max() <= 1  # rounding to bytes
    assert tokenizer.decode(tokens[:, :8], grid=(2, 4)).shape == (7, 1, 4, 8)
    assert parts[3:] == [6, 1]


def test_encoding_in_parts_gives_the_same_tokens():
    tokenizer = tiny_tokenizer()
    images = torch.randint(0, 256, (5, 1, 14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = tokenizer.network.encode(images / 255)
    assert torch.equal(tokenizer.encode(images), exact)
    assert torch.equal(tokenizer.encode(images, batch_size=2), exact)
