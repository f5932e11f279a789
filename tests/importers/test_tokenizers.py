"""Tokenizers of every layout come out as they go in: features, tokens and images are those of the original."""

import json

import pytest
import torch
from safetensors.torch import save_file

from maskgit_pl.importers.layouts import tokenizer_weights
from maskgit_pl.importers.magvit2 import MASKBIT, OPEN_MAGVIT2, OPEN_MUSE
from maskgit_pl.importers.taming import DIFFUSERS
from maskgit_pl.importers.tokenizers import import_tokenizer, tokenizer_layout_of
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.pretrained import load_tokenizer
from tests.importers.test_taming import Reference as Taming
from tests.importers.tokenizer_references import (
    DiffusersVQModel,
    Magvit2Model,
    MaskBitModel,
    OpenMuseModel,
    add_average,
    diffusers_config,
    with_random_values,
)


def images(number=3, *, seed=0, size=16):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def place_codes(network, codes, *, size=16):
    """Puts the codes near features of the encoder, so that many of them are used."""
    features = network.features(images(8, seed=1, size=size)).movedim(1, -1).flatten(0, 2)
    chosen = features[torch.randperm(max(len(features), len(codes)))[: len(codes)] % len(features)]
    codes.copy_(chosen + 0.05 * features.std() * torch.randn_like(chosen))
    return network


def center_features(network):
    """Moves the features to both sides of 0, so that all bits occur."""
    network.encoder.conv_out.bias.sub_(network.features(images(8, seed=1)).mean((0, 2, 3)))
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        signed_images=False,
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


@pytest.mark.slow
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
        ("{", "is not valid JSON"),
        ("[" * 100_000, "must be nested at most 64 levels deep"),
        ("[1]", "must hold a mapping"),
        (" " * 1_000_001, "must have at most 1 MB"),
    ],
)
def test_a_hostile_config_of_diffusers_is_refused(content, message, tmp_path):
    config = diffusers_config()
    folder = save_diffusers(DiffusersVQModel(config), config, tmp_path / "vqvae")
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        import_tokenizer(folder, tmp_path / "out", image_size=16)


# MaskBit


def maskbit_model(**sizes):
    torch.manual_seed(0)
    network = with_random_values(MaskBitModel(**sizes), 0.03)
    if hasattr(network.quantize, "embedding"):
        return place_codes(network, network.quantize.embedding.weight)
    return center_features(network)


MASKBIT_CASES = {
    "VQGAN+": {"table": 32},
    "mean": {"table": 32, "down": "mean"},
    "older weights": {"table": 32, "old": True},
    "one level": {"table": 32, "widths": (32,), "blocks": 1},
    "bits": {},
    "bits of older weights": {"dim": 5, "old": True, "blocks": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MASKBIT_CASES)
def test_a_tokenizer_of_maskbit_comes_out_as_it_goes_in(case, tmp_path):
    original = maskbit_model(**MASKBIT_CASES[case])
    torch.save(original.state_dict(), tmp_path / "tokenizer.bin")
    made = import_tokenizer(tmp_path / "tokenizer.bin", tmp_path / "out", image_size=16)
    assert made.layout == "MaskBit"
    assert made.num_parameters == sum(parameter.numel() for parameter in original.parameters())
    assert made.ignored == (() if "table" in MASKBIT_CASES[case] else ("quantize.bits_to_indices", "quantize.codebook"))
    check_same(original, made.folder)


@pytest.mark.parametrize(("dim", "table"), [(14, None), (18, None), (64, 4096)])
def test_sizes_of_the_published_tokenizers_of_maskbit_are_read_off(dim, table):
    """The sizes are those of configs/tokenizer: 14 and 18 bits, and VQGAN+ of 12 bits."""
    with torch.device("meta"):
        network = MaskBitModel(widths=(128, 128, 256, 256, 512), dim=dim, table=table)
    constants = {"quantize.bits_to_indices", "quantize.codebook"}
    tensors = {name: value for name, value in network.state_dict().items() if name not in constants}
    sizes = MASKBIT.read_config(tensors, {})
    assert (sizes.codebook_size, sizes.code_dim) == (table or 2**dim, dim)
    assert sizes.channel_multipliers == (1, 1, 2, 2, 4)
    assert sizes.downsampling == "strided-3x3"
    count = sum(weight.numel() for weight in tokenizer_weights(tensors, sizes, MASKBIT).values())
    assert count == sum(parameter.numel() for parameter in network.parameters())


REFUSED_MASKBIT = {
    "no codes": (
        lambda weights: weights.pop("quantize.embedding.weight"),
        "embedding.weight or .*bits.* must be there",
    ),
    "missing": (lambda weights: weights.pop("decoder.up.1.upsample_conv.bias"), r"decoder\.up\.1\.upsample_conv\.bias"),
    "more blocks": (
        lambda weights: weights.update({"decoder.up.0.res_blocks.2.norm1.bias": torch.zeros(64)}),
        r"not in the network: decoder\.up\.0\.res_blocks\.2\.norm1\.bias",
    ),
    "not finite": (
        lambda weights: weights["decoder.conv_out.bias"].fill_(torch.inf),
        "must hold finite numbers, got inf",
    ),
    "too many bits": (
        lambda weights: (
            weights.update(
                {"encoder.conv_out.weight": torch.zeros(70_000, 64, 1, 1), "quantize.bits_to_indices": torch.zeros(3)}
            )
            or weights.pop("quantize.embedding.weight")
        ),
        r"encoder\.conv_out\.weight must have 1 to 24 rows, one a bit, got 70000",
    ),
}


def assert_refused(model, damage, message, folder):
    """Damages the weights of a model, and checks that they are refused in one line, with nothing written."""
    weights = model.requires_grad_(False).state_dict()
    damage(weights)
    torch.save(weights, folder / "a.bin")
    with pytest.raises(ValueError, match=message) as refusal:
        import_tokenizer(folder / "a.bin", folder / "out", image_size=16)
    assert "\n" not in str(refusal.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("case", REFUSED_MASKBIT)
def test_a_tokenizer_of_maskbit_that_does_not_fit_is_refused_in_one_line(case, tmp_path):
    assert_refused(MaskBitModel(table=32), *REFUSED_MASKBIT[case], tmp_path)


# open-muse


def open_muse_model(*, size=16, **sizes):
    torch.manual_seed(0)
    network = with_random_values(OpenMuseModel(**sizes), 0.03)
    return place_codes(network, network.quantize.embedding.weight, size=size)


OPEN_MUSE_CASES = {
    "as released, smaller": {},
    "one block": {"widths": (32, 64, 64, 96), "blocks": 1},
    "one level": {"widths": (32,), "blocks": 1, "dim": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["bin", "ckpt", "safetensors"])
@pytest.mark.parametrize("case", OPEN_MUSE_CASES)
def test_the_tokenizer_of_maskgit_in_the_layout_of_open_muse_comes_out_as_it_goes_in(case, ending, tmp_path):
    original, file = open_muse_model(**OPEN_MUSE_CASES[case]), tmp_path / f"tokenizer.{ending}"
    weights = original.state_dict()
    if ending == "safetensors":
        save_file(weights, file)
    else:
        torch.save(weights if ending == "bin" else {"state_dict": weights}, file)
    made = import_tokenizer(file, tmp_path / "out", image_size=16)
    assert (made.layout, made.ignored) == ("open-muse", ())
    assert made.num_parameters == sum(parameter.numel() for parameter in original.parameters())
    check_same(original, made.folder)


RELEASED = {"widths": (128, 128, 256, 256, 512), "blocks": 2, "dim": 256, "table": 1024}


def test_the_released_tokenizer_in_the_layout_of_open_muse_has_the_sizes_of_the_released_code():
    with torch.device("meta"):
        network = OpenMuseModel(**RELEASED)
    assert OPEN_MUSE.read_config(network.state_dict(), {}) == VQGANConfig(3)  # the defaults are the released sizes
    weights = tokenizer_weights(network.state_dict(), VQGANConfig(3), OPEN_MUSE)
    assert sum(weight.numel() for weight in weights.values()) == sum(part.numel() for part in network.parameters())


@pytest.mark.slow
def test_the_largest_difference_of_a_tokenizer_of_the_released_size_is_the_documented_one(tmp_path):
    original = open_muse_model(size=64, **RELEASED)
    torch.save(original.state_dict(), tmp_path / "maskgit-vqgan-imagenet-f16-256.bin")
    made = import_tokenizer(tmp_path / "maskgit-vqgan-imagenet-f16-256.bin", tmp_path / "out", image_size=64)
    network, given = load_tokenizer(made.folder).network, images(4, size=64)
    features = original.features(given)
    tokens = original.tokens(features)
    assert len(tokens.unique()) > 8
    assert torch.equal(network.encode(given), tokens)
    decoded = original.decode(tokens, (4, 4))
    differences = [
        (network.encoder(given) - features).abs().max().item(),
        (network.decode(tokens, (4, 4)) - decoded).abs().max().item(),
    ]
    print(f"features up to {features.abs().max():.1f}: {differences[0]:.1e}")
    print(f"images up to {decoded.abs().max():.1f}: {differences[1]:.1e}")
    assert max(differences) < 1e-4


REFUSED_OPEN_MUSE = {
    "no codebook": (lambda weights: weights.pop("quantize.embedding.weight"), "it is the codebook"),
    "missing": (lambda weights: weights.pop("encoder.mid.1.conv2.weight"), r"missing: encoder\.mid\.1\.conv2\.weight"),
    "a bias": (
        lambda weights: weights.update({"encoder.conv_in.bias": torch.zeros(32)}),
        r"not in the network: encoder\.conv_in\.bias",
    ),
    "another width": (
        lambda weights: weights.update({"decoder.up.1.upsample_conv.weight": torch.zeros(32, 64, 3, 3)}),
        r"decoder\.up\.1\.upsample_conv\.weight must have shape \(32, 32, 3, 3\), got \(32, 64, 3, 3\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED_OPEN_MUSE)
def test_a_tokenizer_of_open_muse_that_does_not_fit_is_refused_in_one_line(case, tmp_path):
    assert_refused(OpenMuseModel(), *REFUSED_OPEN_MUSE[case], tmp_path)


# Open-MAGVIT2


def magvit2_model(seed=0, **sizes):
    torch.manual_seed(seed)
    return center_features(with_random_values(Magvit2Model(**sizes), 0.03))


@pytest.mark.parametrize(
    "sizes", [{}, {"widths": (64, 64, 128), "blocks": 1, "dim": 8}, {"widths": (64,), "blocks": 1, "dim": 5}]
)
def test_a_tokenizer_of_open_magvit2_comes_out_as_it_goes_in(sizes, tmp_path):
    original = magvit2_model(**sizes)
    save_file(original.state_dict(), tmp_path / "a.safetensors")
    made = import_tokenizer(tmp_path / "a.safetensors", tmp_path / "out", image_size=16)
    assert made.layout == "Open-MAGVIT2"
    assert made.num_parameters == sum(parameter.numel() for parameter in original.parameters())
    check_same(original, made.folder)


def test_the_averaged_weights_of_a_lightning_checkpoint_are_taken(tmp_path):
    last, average = magvit2_model(), magvit2_model(seed=1)
    weights = add_average(last.state_dict(), average.state_dict()) | {"loss.discriminator.main.0.bias": torch.zeros(3)}
    torch.save({"state_dict": weights, "epoch": 3, "hyper_parameters": {}}, tmp_path / "last.ckpt")
    made = import_tokenizer(tmp_path / "last.ckpt", tmp_path / "out", image_size=16)
    assert made.ignored == ("epoch", "hyper_parameters", "loss.* (1 tensors)", "the last, not averaged weights")
    check_same(average, made.folder)
    del weights["model_ema.decoderconv_inweight"]
    torch.save({"state_dict": weights}, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r"averaged tensors are missing: model_ema\.decoderconv_inweight"):
        import_tokenizer(tmp_path / "part.ckpt", tmp_path / "part", image_size=16)


def test_sizes_of_the_published_tokenizer_of_open_magvit2_are_read_off():
    """The sizes are those of ``imagenet_lfqgan_256_L.yaml``."""
    with torch.device("meta"):
        network = Magvit2Model(widths=(128, 128, 256, 256, 512), blocks=4, dim=18)
    sizes = OPEN_MAGVIT2.read_config(network.state_dict(), {})
    assert (sizes.codebook_size, sizes.code_dim, sizes.layout) == (262144, 18, "magvit2")
    assert (sizes.channel_multipliers, sizes.num_res_blocks, sizes.num_middle_blocks) == ((1, 1, 2, 2, 4), 4, 4)
    count = sum(weight.numel() for weight in tokenizer_weights(network.state_dict(), sizes, OPEN_MAGVIT2).values())
    assert count == sum(parameter.numel() for parameter in network.parameters())


def test_a_damaged_tokenizer_of_open_magvit2_is_refused(tmp_path):
    weights = magvit2_model().state_dict()
    weights["decoder.adaptive.1.beta.bias"].fill_(torch.nan)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.adaptive\.1\.beta\.bias' must hold finite numbers, got nan"):
        import_tokenizer(tmp_path / "a.safetensors", tmp_path / "out", image_size=16)
    weights.pop("decoder.adaptive.1.beta.bias")
    save_file(weights, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"missing: decoder\.adaptive\.1\.beta\.bias"):
        import_tokenizer(tmp_path / "b.safetensors", tmp_path / "out", image_size=16)
    assert not (tmp_path / "out").exists()


# IBQ, whose tensors have the names of taming-transformers


def ibq_model(seed=0):
    """A network of taming's names whose code is that of the largest inner product; images in [0, 1]."""
    torch.manual_seed(seed)
    network = with_random_values(Taming(llamagen=False), 0.05)
    network.features = lambda images: network.quant_conv(network.encoder(2 * images - 1))
    network.tokens = lambda features: torch.einsum("bdhw,kd->bhwk", features, network.codes()).argmax(-1).flatten(1)
    decode = network.decode
    network.decode = lambda tokens, grid: (decode(tokens, grid) + 1) / 2
    features = network.features(images(8, seed=1)).movedim(1, -1).flatten(0, 2)
    network.quant_conv.bias.sub_(features.mean(0))  # in all directions
    network.quantize.embedding.weight.copy_(torch.randn(32, 4))
    return network


def test_the_averaged_weights_of_ibq_are_taken_and_the_largest_inner_product(tmp_path):
    last, average = ibq_model(), ibq_model(seed=1)
    torch.save({"state_dict": add_average(last.state_dict(), average.state_dict())}, tmp_path / "last.ckpt")
    made = import_tokenizer(tmp_path / "last.ckpt", tmp_path / "out", image_size=16, layout="IBQ")
    assert made.layout == "IBQ"
    assert "quantizer ibq" in made.report(16)
    assert "--layout IBQ" not in made.report(16)
    check_same(average, made.folder)
    # The nearest codes are others.
    as_taming = import_tokenizer(tmp_path / "last.ckpt", tmp_path / "t", image_size=16, layout="taming-transformers")
    assert "choose other codes; if this is one, import with --layout IBQ" in as_taming.report(16)
    tokens = load_tokenizer(as_taming.folder).network.encode(images())
    assert not torch.equal(tokens, last.tokens(last.features(images())))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (None, "--layout must be given, taming-transformers or IBQ: the file has averaged weights"),
        ("MaskBit", "--layout must be taming-transformers or IBQ for the names of these tensors, got MaskBit"),
        ("ibq", "layout must be one of .*, got 'ibq'"),
    ],
)
def test_a_layout_that_no_name_tells_must_be_named(layout, message, tmp_path):
    weights = ibq_model().state_dict()
    torch.save({"state_dict": add_average(weights, weights)}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        import_tokenizer(tmp_path / "last.ckpt", tmp_path / "out", image_size=16, layout=layout)
    assert not (tmp_path / "out").exists()
