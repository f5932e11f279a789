"""Tokenizers of every layout come out as they go in: features, tokens and images are those of the original."""

import json

import pytest
import torch
from safetensors.torch import save_file

from maskgit_pl.importers.checkpoints import find_weights
from maskgit_pl.importers.tokenizers import import_tokenizer, tokenizer_layout_of
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pretrained.networks import load_tokenizer
from tests.forked import in_own_process
from tests.importers.tokenizer_references import (
    DiffusersVQModel,
    Magvit2Model,
    MaskBitModel,
    OpenMuseModel,
    TamingModel,
    add_average,
    diffusers_config,
    with_random_values,
)
from tests.importers.transformer_references import put


def images(number=3, *, seed=0, size=16):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def place_codes(network, *, size=16):
    """Puts the codes near features of the encoder, so that many of them are used."""
    codes = network.quantize.embedding.weight
    features = network.features(images(8, seed=1, size=size)).movedim(1, -1).flatten(0, 2)
    chosen = features[torch.randperm(max(len(features), len(codes)))[: len(codes)] % len(features)]
    codes.copy_(chosen + 0.05 * features.std() * torch.randn_like(chosen))
    return network


def center_features(network):
    """Moves the features to both sides of 0, so that all bits occur."""
    last = network.quant_conv if hasattr(network, "quant_conv") else network.encoder.conv_out
    last.bias.sub_(network.features(images(8, seed=1)).mean((0, 2, 3)))
    return network


def check_same(original, imported, *, least_tokens=6):
    """Checks that features, tokens and images of an imported tokenizer are those of the original."""
    tokenizer = load_tokenizer(imported.folder / "tokenizer")
    network = tokenizer.network
    assert imported.tokenizer == network.config
    features = original.features(images())
    torch.testing.assert_close(network.encoder(images()), features, rtol=0, atol=1e-5)
    expected = original.tokens(features)
    assert len(expected.unique()) > least_tokens
    assert torch.equal(network.encode(images()), expected)
    decoded = original.decode(expected, tokenizer.grid)
    torch.testing.assert_close(network.decode(expected, tokenizer.grid), decoded, rtol=0, atol=1e-5)


def attention(*levels, count):
    """Entries of ``config.json`` of diffusers for self-attention in some of its levels."""
    down = ["AttnDownEncoderBlock2D" if level in levels else "DownEncoderBlock2D" for level in range(count)]
    up = [name.replace("DownEncoder", "UpDecoder") for name in reversed(down)]
    return {"down_block_types": down, "up_block_types": up, "mid_block_add_attention": True}


SMALL = {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 12, "vq_embed_dim": 4}
TAMING_CASES = {
    "small": {**SMALL, **attention(1, count=2)},
    "no attention levels": {**SMALL, **attention(count=2)},
    "four levels": {**SMALL, "block_out_channels": [32, 32, 64, 64], "layers_per_block": 2, **attention(2, 3, count=4)},
    "one level": {**SMALL, "block_out_channels": [64], **attention(0, count=1)},
}


def taming_model(project="taming", case="small", *, seed=0):
    torch.manual_seed(seed)
    network = with_random_values(TamingModel(diffusers_config(**TAMING_CASES[case]), project))
    if project == "ibq":
        center_features(network).quantize.embedding.weight.copy_(torch.randn(32, 4))  # in all directions
        return network
    place_codes(center_features(network) if case == "one level" else network)
    if project == "llamagen":  # lengths that matter to nothing
        network.quantize.embedding.weight.mul_(torch.rand(32, 1) + 0.5)
    return network


def save_taming(network, path, **extra):
    """Writes the file that the project itself would write, with what it holds besides the network."""
    weights = network.named()
    if network.project == "llamagen":
        weights["quantize.codebook_used"] = torch.zeros(65536)
        torch.save({"model": weights, "optimizer": {"state": {}}, "steps": 7, **extra}, path)
    else:
        weights |= {"loss.discriminator.main.0.weight": torch.rand(2, 3), "loss.perceptual_loss.lin0": torch.rand(2)}
        torch.save({"state_dict": weights, "epoch": 3, "pytorch-lightning_version": "1.0.8", **extra}, path)
    return path


def import_taming(network, folder, **options):
    layout = {"layout": "IBQ"} if network.project == "ibq" else {}
    file = save_taming(network, folder / "a.ckpt")
    return import_tokenizer(file, folder / "out", **{"image_size": 16, **layout, **options})


def save_diffusers(network, folder, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(diffusers_config(**changes)))
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


def with_table(network, **options):
    """Returns a model with a table of codes near its features, or with bits."""
    network = with_random_values(network, 0.03)
    has_table = hasattr(getattr(network, "quantize", None), "embedding")
    return place_codes(network, **options) if has_table else center_features(network)


PLAIN = {  # layout and sizes: the model
    "MaskBit table": lambda: MaskBitModel(table=32),
    "MaskBit table, mean": lambda: MaskBitModel(table=32, down="mean"),
    "MaskBit table, one level": lambda: MaskBitModel(table=32, widths=(32,), blocks=1),
    "MaskBit bits": MaskBitModel,
    "MaskBit bits, old": lambda: MaskBitModel(dim=5, old=True, blocks=1),
    "open-muse": OpenMuseModel,
    "Open-MAGVIT2": Magvit2Model,
    "Open-MAGVIT2 wide": lambda: Magvit2Model(widths=(64, 64, 128), blocks=1, dim=8),
    "Open-MAGVIT2 one level": lambda: Magvit2Model(widths=(64,), blocks=1, dim=5),
}
CHANGES = [{}, attention(2, count=3), {"norm_num_groups": 16, "mid_block_add_attention": True}, {"vq_embed_dim": 4}]
LAYOUTS = {"taming": "taming-transformers", "llamagen": "LlamaGen", "ibq": "IBQ"}
PROJECTS = [*(("taming", case) for case in TAMING_CASES), ("llamagen", "four levels"), ("ibq", "no attention levels")]


@pytest.mark.parametrize(("project", "case"), PROJECTS)
def test_tokenizers_with_the_names_of_taming_are_the_original(project, case, tmp_path):
    original = taming_model(project, case)
    imported = import_taming(original, tmp_path)
    assert imported.layout == LAYOUTS[project]
    check_same(original, imported, least_tokens=2 if project == "ibq" else 6)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_tokenizer_of_diffusers_is_the_original(changes, tmp_path):
    torch.manual_seed(0)
    original = place_codes(with_random_values(DiffusersVQModel(diffusers_config(**changes))))
    folder = save_diffusers(original, tmp_path / "vqvae", **changes)
    imported = import_tokenizer(folder, tmp_path / "out", image_size=16)
    assert imported.layout == "diffusers"
    check_same(original, imported)


@pytest.mark.parametrize("case", PLAIN)
def test_tokenizers_of_other_projects_are_the_original(case, tmp_path):
    torch.manual_seed(0)
    original = with_table(PLAIN[case]())
    torch.save(original.state_dict(), tmp_path / "tokenizer.bin")
    imported = import_tokenizer(tmp_path / "tokenizer.bin", tmp_path / "out", image_size=16)
    assert imported.layout == case.split()[0]
    check_same(original, imported)


def test_the_average_of_llamagen_is_preferred_to_its_last_weights(tmp_path):
    last = TamingModel(diffusers_config(**TAMING_CASES["small"]), "llamagen").eval().requires_grad_(False)
    average = {name: value + 1 for name, value in last.named().items()}
    imported = import_tokenizer(save_taming(last, tmp_path / "a.pt", ema=average), tmp_path / "out", image_size=16)
    assert torch.equal(imported.weights["decoder.head.bias"], average["decoder.conv_out.bias"])


@pytest.mark.parametrize("form", ["safetensors", "before torch 1.6", "half", "compiled and sharded"])
def test_other_files_with_the_same_tensors_are_read(form, tmp_path):
    weights, file = TamingModel(diffusers_config(**TAMING_CASES["small"])).named(), tmp_path / "a"
    if form == "safetensors":
        save_file({name: value.detach() for name, value in weights.items()}, file)
    elif form == "half":
        torch.save({name: value.half() for name, value in weights.items()}, file)
    elif form == "compiled and sharded":
        torch.save({f"module._orig_mod.{name}": value for name, value in weights.items()}, file)
    else:
        torch.save({"model": weights}, file, _use_new_zipfile_serialization=False)
    bias = import_tokenizer(file, tmp_path / "out", image_size=16).weights["decoder.head.bias"]
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias, weights["decoder.conv_out.bias"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_ibq_has_its_averaged_weights_and_the_largest_inner_product(wrapper, tmp_path):
    last, average = taming_model("ibq"), taming_model("ibq", seed=1)
    weights = add_average(last.named(), average.named())
    torch.save({"state_dict": {f"{wrapper}{name}": value for name, value in weights.items()}}, tmp_path / "last.ckpt")
    imported = import_tokenizer(tmp_path / "last.ckpt", tmp_path / "out", image_size=16, layout="IBQ")
    check_same(average, imported, least_tokens=2)
    # The nearest codes are others.
    as_taming = import_tokenizer(tmp_path / "last.ckpt", tmp_path / "t", image_size=16, layout="taming-transformers")
    assert "choose other codes; if this is one, import with --layout IBQ" in str(as_taming)
    tokens = load_tokenizer(as_taming.folder / "tokenizer").network.encode(images())
    assert not torch.equal(tokens, last.tokens(last.features(images())))


def test_open_magvit2_has_its_averaged_weights(tmp_path):
    last, average = (with_table(Magvit2Model()) for _ in range(2))
    weights = add_average(last.state_dict(), average.state_dict()) | {"loss.discriminator.main.0.bias": torch.zeros(3)}
    torch.save({"state_dict": weights, "epoch": 3, "hyper_parameters": {}}, tmp_path / "last.ckpt")
    imported = import_tokenizer(tmp_path / "last.ckpt", tmp_path / "out", image_size=16)
    check_same(average, imported)
    del weights["model_ema.decoderconv_inweight"]
    torch.save({"state_dict": weights}, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r"averaged tensors are missing: model_ema\.decoderconv_inweight"):
        import_tokenizer(tmp_path / "part.ckpt", tmp_path / "part", image_size=16)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (None, "--layout must be given, taming-transformers or IBQ: the file has averaged weights"),
        ("MaskBit", "--layout must be taming-transformers or IBQ for the names of these tensors, got MaskBit"),
    ],
)
def test_a_layout_that_no_tensor_name_tells_must_be_given(layout, message, tmp_path):
    weights = taming_model("ibq").named()
    torch.save({"state_dict": add_average(weights, weights)}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        import_tokenizer(tmp_path / "last.ckpt", tmp_path / "out", image_size=16, layout=layout)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_a_folder_or_a_pipeline_of_diffusers_names_its_weights(name, tmp_path):
    (tmp_path / "amused" / "vqvae").mkdir(parents=True)
    file = tmp_path / "amused" / "vqvae" / name
    file.touch()
    assert {find_weights(path) for path in (file, file.parent, tmp_path / "amused")} == {file}


def differences_at_the_released_size(folder):
    torch.manual_seed(0)
    original = with_table(OpenMuseModel(widths=(128, 128, 256, 256, 512), blocks=2, dim=256, table=1024), size=64)
    torch.save(original.state_dict(), folder / "maskgit-vqgan-imagenet-f16-256.bin")
    imported = import_tokenizer(folder / "maskgit-vqgan-imagenet-f16-256.bin", folder / "out", image_size=64)
    network, pixels = load_tokenizer(imported.folder / "tokenizer").network, images(4, size=64)
    features = original.features(pixels)
    tokens = original.tokens(features)
    assert len(tokens.unique()) > 8
    assert torch.equal(network.encode(pixels), tokens)
    decoded = original.decode(tokens, (4, 4))
    return [
        (network.encoder(pixels) - features).abs().max().item(),
        (network.decode(tokens, (4, 4)) - decoded).abs().max().item(),
    ]


@pytest.mark.slow
def test_the_largest_difference_at_the_released_size_is_the_documented_one(tmp_path):
    assert max(in_own_process(differences_at_the_released_size, tmp_path)) < 1e-4


WIDTHS = (128, 128, 256, 256, 512)
PUBLISHED_TAMING = {"block_out_channels": list(WIDTHS), "latent_channels": 256, "num_vq_embeddings": 16384}
PUBLISHED_TAMING |= attention(4, count=5)
OF_AMUSED = {  # vqvae/config.json of amused/amused-256
    "block_out_channels": [128, 256, 256, 512, 768],
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
}
OURS = {"layout": "taming", "attention_levels": (4,), "latent_channels": 256, "codebook_size": 16384}
OURS_OF_AMUSED = {"channel_multipliers": (1, 2, 2, 4, 6), "middle_attention": False, "signed_images": False}
OURS_OF_AMUSED |= {"layout": "taming", "latent_channels": 64, "codebook_size": 8192, "code_dim": 64}


def gradient(commitment, codebook_weight):
    weights = {"commitment": commitment, "codebook_weight": codebook_weight, "entropy_weight": 0.0}
    return {"name": "gradient", **weights}


def of_bits(entropy_weight, bits):
    spec = {"name": "lfq", "commitment": 0.25, "entropy_weight": entropy_weight, "entropy_temperature": 0.01}
    return {"quantizer": {**spec, "diversity": 1.0}, "codebook_size": 2**bits, "code_dim": bits}


PUBLISHED = {  # layout: tensors of the project, and our sizes
    "taming-transformers": (
        lambda: TamingModel(diffusers_config(**PUBLISHED_TAMING)).named(),
        {"quantizer": gradient(1.0, 0.25), **OURS},
    ),
    "LlamaGen": (
        lambda: TamingModel(diffusers_config(**PUBLISHED_TAMING, vq_embed_dim=8), "llamagen").named(),
        {"quantizer": gradient(0.25, 1.0), **OURS, "code_dim": 8},
    ),
    "diffusers": (
        lambda: DiffusersVQModel(diffusers_config(**OF_AMUSED)).state_dict(),
        {"quantizer": gradient(1.0, 0.25), **OURS_OF_AMUSED},
    ),
    "MaskBit": (  # configs/tokenizer: 18 bits
        lambda: MaskBitModel(widths=WIDTHS, dim=18).state_dict(),
        {**of_bits(0.02, 18), "downsampling": "strided-3x3"},
    ),
    "Open-MAGVIT2": (  # imagenet_lfqgan_256_L.yaml
        lambda: Magvit2Model(widths=WIDTHS, blocks=4, dim=18).state_dict(),
        {**of_bits(0.1, 18), "num_res_blocks": 4, "num_middle_blocks": 4, "layout": "magvit2"},
    ),
    "open-muse": (lambda: OpenMuseModel(widths=WIDTHS, blocks=2, dim=256, table=1024).state_dict(), {}),
}
NUM_PARAMETERS = {"taming-transformers": 71_879_555 + 256 * 16384, "LlamaGen": 71_883_403}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_of_a_published_tokenizer_are_read_from_its_tensors(name):
    build, sizes = PUBLISHED[name]
    with torch.device("meta"):
        contents = build()
    layout, config = tokenizer_layout_of(contents), VQGANConfig(3, **sizes)
    assert layout.name == name
    tensors = layout.prepare({name: value for name, value in contents.items() if name not in layout.others})
    assert layout.read_config(tensors) == config
    converted = sum(weight.numel() for weight in layout.convert(tensors, config).values())
    assert converted == NUM_PARAMETERS.get(name, sum(tensor.numel() for tensor in tensors.values()))


def rename(old, new):
    return lambda weights: weights.update({new: weights.pop(old)})


ZERO = torch.zeros(1)
MODELS = {
    "taming": lambda: TamingModel(diffusers_config(**TAMING_CASES["small"])).named(),
    "diffusers": lambda: DiffusersVQModel(diffusers_config(**attention(2, count=3))).state_dict(),
    "maskbit": lambda: MaskBitModel(table=32).state_dict(),
    "bits": lambda: MaskBitModel().state_dict(),
    "nothing": dict,
}
CODEBOOK = "quantize.embedding.weight"
REFUSED = [  # a network, what is done to its tensors, and the message
    ("nothing", put("transformer.tok_emb.weight", ZERO), r"got something else \(transformer\.tok_emb\.weight\);"),
    ("taming", rename(CODEBOOK, "quantize.embed.weight"), r"tensors are missing: quantize\.embedding\.weight, which"),
    ("taming", put(CODEBOOK, torch.ones(1).expand(1 << 22, 256)), r"must be stored in full, got 4\.29 GB made of 4 by"),
    ("taming", put("quantize.codebook_used2", ZERO), r"'quantize\.codebook_used2' is not in the network"),
    ("taming", put("quantize.note", 1.0), r"entry quantize\.note must be a tensor, got float"),
    ("taming", put(CODEBOOK, torch.full((32, 4), torch.nan)), "must hold finite numbers, got nan"),
    ("taming", put(CODEBOOK, torch.zeros(32, 4, dtype=torch.int64)), r"must be floating point .*, got torch\.int64"),
    ("taming", put("encoder.conv_in.weight", torch.zeros(24, 3, 3, 3)), r"first convolution's 24, got \[32, 64\]"),
    ("bits", put("encoder.conv_out.weight", torch.zeros(70_000, 64, 1, 1)), "codebook_size must be an integer in"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "damage", "message"), REFUSED)
def test_another_network_is_refused_in_one_line_and_nothing_is_written(kind, damage, message, tmp_path):
    weights = {name: value.detach() for name, value in MODELS[kind]().items()}
    damage(weights)
    torch.save(weights, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=message) as refusal:
        import_tokenizer(tmp_path / "a.bin", tmp_path / "out", image_size=16)
    assert str(refusal.value).startswith(f"checkpoint {tmp_path / 'a.bin'}: ")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_size_that_does_not_fit_is_refused(tmp_path):
    file = save_taming(TamingModel(diffusers_config(**TAMING_CASES["small"])), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="image size must be a positive multiple of the downsampling factor 2, got 15"):
        import_tokenizer(file, tmp_path / "out", image_size=15)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name of config.json must be 'VQModel', got 'Auto"),
        ({"norm_type": "spatial"}, "norm_type of config.json must be 'group', got 'spatial'"),
        ({"norm_num_groups": "32"}, "num_groups must be an integer"),
        ('{"sample_size": NaN}', "numbers must be finite, got NaN"),
        ("[" * 100_000, "config.json must be nested at most 64 levels deep"),
        (" " * 1_000_001, "config.json must have at most 1 MB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_of_diffusers_that_does_not_fit_is_refused(settings, message, tmp_path):
    config = diffusers_config()
    folder = save_diffusers(DiffusersVQModel(config), tmp_path / "vqvae")
    (folder / "config.json").write_text(json.dumps(config | settings) if isinstance(settings, dict) else settings)
    with pytest.raises(ValueError, match=message) as refusal:
        import_tokenizer(folder, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
