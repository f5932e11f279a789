"""Transformers of Halton-MaskGIT have the logits of the original, and sizes that are read from the file.

``pytest -s`` prints the largest differences of logits, which docs/released-weights.md quotes.
"""

import math

import pytest
import torch

from maskgit_pl.importers.transformers import convert_weights, import_transformer, published_decoding, read_config
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pretrained.networks import load_tokenizer, load_transformer, save_tokenizer
from tests.forked import in_own_process
from tests.importers.transformer_references import HALTON_SIZES, Halton, put, randomise, save_checkpoint

SMALL = {"codes": 24, "classes": 5, "side": 4, "size": 32, "blocks": 2, "heads": 4}
CASES = [
    {"registers": 0},
    {"size": 40, "heads": 6, "side": 3},  # heads that do not divide D
    {"classes": 1, "size": 64},
]


@pytest.fixture
def tokenizer(tmp_path):
    """Returns a function that writes a tokenizer of some codes, and returns its folder."""

    def save(*, codes=SMALL["codes"], image_size=2 * SMALL["side"]):
        config = VQGANConfig(
            3, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=codes, code_dim=4
        )
        save_tokenizer(tmp_path / "tokenizer", config, VQGAN(config).state_dict(), image_size=image_size)
        return tmp_path / "tokenizer"

    return save


def draw(network, *, batch=3, side, seed=1):
    """Returns tokens (B, N) with some masked ones, and labels (B,) with that of no class."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(network.codes + 1, (batch, side**2), generator=generator)
    tokens[0] = network.codes  # all masked, as at the first step
    labels = torch.randint(network.classes, (batch,), generator=generator)
    labels[-1] = network.classes
    return tokens, labels


def compare(network, original, *, side):
    """Returns tokens, labels and the logits of the original, whose differences from the network's are small."""
    tokens, labels = draw(original, side=side)
    expected = original(tokens, labels)
    difference = float((network(tokens, labels, vocabulary="all") - expected).abs().max())
    print(
        f"size {network.config.embed_dim}, {network.config.depth} blocks: largest difference {difference:.1e} of "
        f"logits up to {float(expected.abs().max()):.1f}"
    )
    assert expected.std() > 0.5  # a network that computes something
    assert difference < 2e-5  # at published sizes, sums of up to 2048 products
    return tokens, labels, expected


@pytest.mark.parametrize("changes", CASES)
def test_logits_are_those_of_the_original(changes, tokenizer, tmp_path):
    sizes = {**SMALL, **changes}
    original = randomise(Halton(**sizes))
    file = save_checkpoint(original, tmp_path / "a.pth")
    folder = tokenizer(image_size=2 * sizes["side"])
    imported = import_transformer(file, tmp_path / "out", tokenizer=folder, num_heads=sizes["heads"])
    network = MaskGIT.from_pretrained(tmp_path / "out").transformer.network
    assert imported.transformer.config == network.config
    tokens, labels, expected = compare(network, original, side=sizes["side"])
    positions = torch.tensor([[0, 3], [2, 1], [5, 8]])
    rows = expected.gather(1, positions[..., None].expand(-1, -1, original.codes + 1))[..., :-1]
    torch.testing.assert_close(network.forward_at(tokens, labels, positions), rows, rtol=0, atol=1e-5)


def check_published(size, tokenizer, folder):
    embed_dim, blocks, heads = size
    original = randomise(Halton(codes=16384, classes=1000, side=16, size=embed_dim, blocks=blocks, heads=heads))
    import_transformer(save_checkpoint(original, folder / "a.pth"), folder / "out", tokenizer=tokenizer)
    compare(load_transformer(folder / "out" / "transformer").network, original, side=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_logits_are_those_of_the_original_at_published_sizes(name, tokenizer, tmp_path):
    in_own_process(check_published, HALTON_SIZES[name], tokenizer(codes=16384, image_size=32), tmp_path)


def published(size, blocks, heads, **changes):
    with torch.device("meta"):
        return Halton(codes=16384, classes=1000, size=size, blocks=blocks, heads=heads, **changes)


def count(tensors):
    return sum(tensor.numel() for tensor in tensors.values())


def check_fits(config, weights):
    with torch.device("meta"):
        expected = config.create().state_dict()
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("name", "side", "millions", "scale"),
    [("tiny", 16, 23, 1.5), ("small", 16, 69, 1.0), ("base", 24, 142, 0.7), ("large", 24, 480, 0.5)],
)
def test_the_published_halton_networks_are_read_from_their_tensors(name, side, millions, scale):
    size, blocks, heads = HALTON_SIZES[name]
    original = published(size, blocks, heads, side=side)
    tensors = original.state_dict()
    del tensors["head.weight"]
    assert round(count(tensors) / 1e6) == millions  # README: 23, 69, 142, 480 million
    config = read_config(tensors)
    assert (config.codebook_size, config.num_classes, config.grid) == (16384, 1000, (side, side))
    assert (config.embed_dim, config.depth, config.num_heads, config.num_registers) == (size, blocks, heads, 1)
    assert config.mlp_dim == original.transformer.layers[0].ff.w1.out_features
    check_fits(config, convert_weights(tensors, config))
    decoding = published_decoding(config)
    assert (decoding.num_steps, decoding.token_selector) == (32, "halton")
    assert decoding.guidance == {"name": "constant", "scale": scale}
    # The sampler's count after t steps, by its description.
    num_tokens = side**2
    after = [max(t, int((1 - torch.arccos(torch.tensor(t / 32)) / (math.pi * 0.5)) * num_tokens)) for t in range(33)]
    assert [sum(decoding.tokens_per_step[:t]) for t in range(33)] == after
    assert after[-1] == num_tokens


@pytest.mark.parametrize("side", [4, 5, 6, 8])
def test_small_grids_have_steps_too(side):
    tensors = published(32, 1, 4, side=side).state_dict()
    decoding = published_decoding(read_config(tensors, 4))
    decoding.check(side**2, is_autoregressive=False)
    assert decoding.num_steps == min(32, side**2)


def test_the_image_size_follows_from_the_grid_of_the_transformer(tokenizer, tmp_path):
    file = save_checkpoint(randomise(Halton(**SMALL)), tmp_path / "a.pth")
    # The tokenizer was trained on larger images.
    import_transformer(file, tmp_path / "out", tokenizer=tokenizer(image_size=32), num_heads=4)
    assert load_tokenizer(tmp_path / "out" / "tokenizer").image_size == 8


ONES, ZERO = torch.ones(1).expand(1 << 22, 256), torch.zeros(1)
REFUSED = [  # what is done to the tensors, and the message
    (lambda weights: weights.pop("cls_emb.weight"), r"must be a transformer of Halton-MaskGIT, got something else"),
    (put("pos_emb.weight", torch.zeros(15, 32)), r"pos_emb\.weight must have shape \(9, 32\), got"),
    (put("pos_emb.weight", ONES), r"pos_emb\.weight' must be stored in full, got 4\.29 GB made of 4 bytes"),
    (put("in_proj.weight", ZERO), r"'in_proj\.weight' is not in the network"),
    (put("cls_emb.weight", torch.zeros(1, 32)), r"num_classes must be an integer in \[1, 100000\], got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), REFUSED)
def test_another_network_is_refused_in_one_line_and_nothing_is_written(damage, message, tokenizer, tmp_path):
    weights = Halton(**SMALL).state_dict()
    damage(weights)
    torch.save({"model_state_dict": weights}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message) as refusal:
        import_transformer(tmp_path / "file.pth", tmp_path / "out", tokenizer=tokenizer(), num_heads=4)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"checkpoint {tmp_path / 'file.pth'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (None, r"heads must be given for a network of 2 blocks of size 32.*add --num-heads"),
        (6, "multiple of num_heads"),
    ],
)
def test_heads_that_are_missing_or_do_not_fit_are_refused(heads, message, tokenizer, tmp_path):
    file = save_checkpoint(Halton(**SMALL), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        import_transformer(file, tmp_path / "out", tokenizer=tokenizer(), num_heads=heads)


def test_a_tokenizer_with_another_codebook_is_refused(tokenizer, tmp_path):
    file = save_checkpoint(Halton(**SMALL), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"tokenizer .* must have the 24 codes of the transformer, got 16; name"):
        import_transformer(file, tmp_path / "out", tokenizer=tokenizer(codes=16), num_heads=4)
    assert not (tmp_path / "out").exists()
