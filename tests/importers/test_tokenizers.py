"""Tokenizers of every layout come out as they go in: features, tokens and images are those of the original."""

import json

import pytest
import torch
from safetensors.torch import save_file

from maskgit_pl.importers.taming import DIFFUSERS
from maskgit_pl.importers.tokenizer_layout import tokenizer_weights
from maskgit_pl.importers.tokenizers import import_tokenizer, tokenizer_layout_of
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pretrained import load_tokenizer
from tests.importers.tokenizer_references import DiffusersVQModel, diffusers_config, with_random_values


def images(number=3, *, seed=0, size=16):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def place_codes(network, codes):
    """Puts the codes near features of the encoder, so that many of them are used."""
    features = network.features(images(8, seed=1)).movedim(1, -1).flatten(0, 2)
    chosen = features[torch.randperm(len(features))[: len(codes)]]
    codes.copy_(chosen + 0.05 * features.std() * torch.randn_like(chosen))
    return network


def check_same(original, folder, *, least_tokens=8):
    """Checks that features, tokens and images of an imported tokenizer are those of the original."""
    tokenizer = load_tokenizer(folder)
    network = tokenizer.network
    features = original.features(images())
    torch.testing.assert_close(network.encoder(images()), features, rtol=0, atol=1e-5)
    expected = original.tokens(features)
    assert len(expected.unique()) > least_tokens
    assert torch.equal(network.encode(images()), expected)
    decoded = original.decode(expected, tokenizer.grid)
    torch.testing.assert_close(network.decode(expected, tokenizer.grid), decoded, rtol=0, atol=1e-5)


# diffusers


def diffusers_model(config):
    torch.manual_seed(0)
    network = with_random_values(DiffusersVQModel(config))
    return place_codes(network, network.quantize.embedding.weight)


def save_diffusers(network, config, folder, name="diffusion_pytorch_model.safetensors"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (save_file if name.endswith("safetensors") else torch.save)(network.state_dict(), folder / name)
    return folder


ATTENTION = {
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
    "mid_block_add_attention": True,
}
DIFFUSERS_CASES = {
    "as aMUSEd": {},
    "self-attention": ATTENTION,
    "other groups": {"norm_num_groups": 16, "mid_block_add_attention": True},
    "codes of another size": {"vq_embed_dim": 4},
    "one level": {
        "block_out_channels": [32],
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    },
}


@pytest.mark.parametrize("case", DIFFUSERS_CASES)
def test_a_tokenizer_of_diffusers_comes_out_as_it_goes_in(case, tmp_path):
    config = diffusers_config(**DIFFUSERS_CASES[case])
    original = diffusers_model(config)
    folder = save_diffusers(original, config, tmp_path / "vqvae")
    made = import_tokenizer(folder, tmp_path / "out", image_size=16)
    assert made.layout == "diffusers"
    assert made.num_parameters == sum(parameter.numel() for parameter in original.parameters())
    assert ("self-attention" in made.report(16)) == config["mid_block_add_attention"]
    check_same(original, made.folder)


@pytest.mark.parametrize("where", ["file", "pipeline", "bin"])
def test_a_file_or_a_pipeline_of_diffusers_is_named(where, tmp_path):
    config = diffusers_config()
    original = diffusers_model(config)
    folder = save_diffusers(
        original,
        config,
        tmp_path / "amused" / "vqvae",
        f"diffusion_pytorch_model.{'bin' if where == 'bin' else 'safetensors'}",
    )
    named = {"file": folder / "diffusion_pytorch_model.safetensors", "pipeline": folder.parent, "bin": folder}[where]
    check_same(original, import_tokenizer(named, tmp_path / "out", image_size=16).folder)


def test_old_names_of_the_self_attention_of_diffusers_are_read(tmp_path):
    config = diffusers_config(**ATTENTION)
    original = diffusers_model(config)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, value in original.state_dict().items():
        for new, before in old.items():
            name = name.replace(new, before)
        weights[name] = value
    assert any(".query." in name for name in weights)
    save_file(weights, tmp_path / "a.safetensors")
    check_same(original, import_tokenizer(tmp_path / "a.safetensors", tmp_path / "out", image_size=16).folder)


def test_sizes_of_the_published_tokenizer_of_amused_are_read_off():
    """The sizes are those of ``vqvae/config.json`` of amused/amused-256."""
    config = diffusers_config(
        block_out_channels=[128, 256, 256, 512, 768],
        down_block_types=["DownEncoderBlock2D"] * 5,
        up_block_types=["UpDecoderBlock2D"] * 5,
        latent_channels=64,
        num_vq_embeddings=8192,
    )
    with torch.device("meta"):
        network = DiffusersVQModel(config)
    tensors = DIFFUSERS.prepare(network.state_dict())
    sizes = DIFFUSERS.read_config(tensors, config)
    assert tokenizer_layout_of(tensors) is DIFFUSERS
    assert sizes == VQGANConfig(
        3,
        channel_multipliers=(1, 2, 2, 4, 6),
        codebook_size=8192,
        code_dim=64,
        layout="taming",
        middle_attention=False,
        latent_channels=64,
        quantizer={"name": "gradient", "commitment": 1.0, "codebook_weight": 0.25, "entropy_weight": 0.0},
    )
    count = sum(weight.numel() for weight in tokenizer_weights(tensors, sizes, DIFFUSERS).values())
    assert count == sum(parameter.numel() for parameter in network.parameters())


def spatial(weights):
    weights["decoder.conv_norm_out.conv_y.weight"] = torch.zeros(32, 8, 1, 1)


def renamed_twice(weights):
    weights["encoder.mid_block.attentions.0.query.weight"] = weights["encoder.mid_block.attentions.0.to_q.weight"]


def wide_attention(weights):
    weights["encoder.mid_block.attentions.0.to_q.weight"] = torch.zeros(96, 48)


REFUSED_DIFFUSERS = {
    "another class": (
        {"_class_name": "AutoencoderKL"},
        None,
        "_class_name of config.json must be 'VQModel', got 'Auto",
    ),
    "another activation": ({"act_fn": "relu"}, None, "act_fn of config.json must be 'silu', got 'relu'"),
    "spatial norm": ({"norm_type": "spatial"}, None, "norm_type of config.json must be 'group', got 'spatial'"),
    "spatial norm in tensors": ({}, spatial, r"norm_type must be 'group', got spatial norms \(MOVQ\)"),
    "groups": ({"norm_num_groups": 5}, None, r"network num_groups must divide the channels"),
    "groups of words": ({"norm_num_groups": "many"}, None, r"network num_groups must be an integer"),
    "twice": (ATTENTION, renamed_twice, "to_q.weight must be there once, got it by its old name too"),
    "shape": (ATTENTION, wide_attention, r"to_q\.weight must have shape \(96, 96, 1, 1\), got \(96, 48, 1, 1\)"),
    "missing": (
        {},
        lambda weights: weights.pop("decoder.up_blocks.2.resnets.2.conv2.bias"),
        r"missing: decoder\.up_blocks\.2\.resnets\.2\.conv2\.bias",
    ),
    "not finite": (
        {},
        lambda weights: weights["quant_conv.bias"].fill_(torch.nan),
        r"quant_conv\.bias' must hold finite numbers, got nan",
    ),
}


@pytest.mark.parametrize("case", REFUSED_DIFFUSERS)
def test_a_tokenizer_of_diffusers_that_does_not_fit_is_refused_in_one_line(case, tmp_path):
    changes, damage, message = REFUSED_DIFFUSERS[case]
    sizes = diffusers_config(**{key: value for key, value in changes.items() if key in ATTENTION})
    network = DiffusersVQModel(sizes).requires_grad_(False)
    weights = network.state_dict()
    if damage is not None:
        damage(weights)
    folder = tmp_path / "vqvae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**sizes, **changes}))
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=message) as refusal:
        import_tokenizer(folder, tmp_path / "out", image_size=16)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"checkpoint {folder}/diffusion_pytorch_model.bin: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[1]", "must be a JSON object"),
        (" " * 1_000_001, "must have at most 1 MB"),
    ],
)
def test_a_hostile_config_of_diffusers_is_refused(content, message, tmp_path):
    config = diffusers_config()
    folder = save_diffusers(DiffusersVQModel(config), config, tmp_path / "vqvae")
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        import_tokenizer(folder, tmp_path / "out", image_size=16)
