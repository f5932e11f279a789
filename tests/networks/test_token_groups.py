"""Token groups: digits and codes, embeddings and logits by hand, and networks whose tokens are divided into groups."""

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskgit_pl.decoding import AutoregressiveDecoding, DecodingConfig
from maskgit_pl.evaluation.likelihood import bind_conditions, negative_elbo
from maskgit_pl.losses import token_cross_entropy
from maskgit_pl.networks.backbone import (
    LARGEST_COMPOSED,
    Backbone,
    BackboneConfig,
    TokenEmbedding,
    compose_logits,
    join_digits,
    likeliest_tokens,
    split_tokens,
)
from maskgit_pl.networks.quantizers import quantizers
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import load_tokenizer, save_tokenizer
from maskgit_pl.training.checkpoints import newest_checkpoint
from maskgit_pl.training.optimizers import LearningRate
from tests.modules import autoregressive_model, masked_model
from tests.networks.backbone_cases import create, inputs, small_config
from tests.short_runs import data, fit

GROUPS = [(1, 7), (3, 3), (4, 2), (2, 5)]


def group_logits(num_groups: int, size: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, num_groups * size, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(("num_groups", "size"), GROUPS)
def test_digits_are_those_of_a_number_in_base_k_and_join_to_it(num_groups, size):
    tokens = torch.arange(size**num_groups)
    digits = split_tokens(tokens, num_groups=num_groups, group_size=size)
    assert digits.tolist() == [list(each) for each in product(range(size), repeat=num_groups)]
    assert torch.equal(join_digits(digits, group_size=size), tokens)


@pytest.mark.parametrize("num_groups", [2, 3])
@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_the_first_group_of_binary_codes_holds_the_last_channels(name, num_groups):
    bits, tokens = 6 // num_groups, torch.arange(64)
    signs = quantizers.build(name).create(codebook_size=64, code_dim=6).lookup(tokens) > 0  # (64, 6)
    digits = split_tokens(tokens, num_groups=num_groups, group_size=2**bits)
    for group in range(num_groups):
        first = 6 - (group + 1) * bits
        own = signs[:, first : first + bits].long() * 2 ** torch.arange(bits)
        assert torch.equal(own.sum(1), digits[:, group])


def test_the_groups_of_a_product_are_its_digits_from_last_to_first():
    spec = quantizers.build({"name": "product", "num_groups": 3, "quantizer": "lfq"})
    quantizer, tokens = spec.create(codebook_size=64, code_dim=6), torch.arange(64)
    digits = split_tokens(tokens, num_groups=3, group_size=4)
    codes = [quantizer.groups[2 - group].lookup(digits[:, group]) for group in range(3)]
    assert torch.equal(torch.cat(codes[::-1], dim=1), quantizer.lookup(tokens))


@pytest.mark.parametrize(("num_groups", "size"), GROUPS)
def test_the_probability_of_a_code_is_the_product_of_those_of_its_digits(num_groups, size):
    logits = group_logits(num_groups, size)
    probabilities = [each.softmax(-1) for each in logits.chunk(num_groups, dim=1)]
    composed = compose_logits(logits, num_groups=num_groups).softmax(-1)
    assert composed.shape == (6, size**num_groups)
    for code, digits in enumerate(product(range(size), repeat=num_groups)):
        expected = torch.stack([probabilities[group][:, digit] for group, digit in enumerate(digits)]).prod(0)
        torch.testing.assert_close(composed[:, code], expected)
        losses, nll = token_cross_entropy(logits, torch.full((6,), code), num_token_groups=num_groups)
        torch.testing.assert_close(nll, -expected.log())
        assert torch.equal(losses, nll)
    assert torch.equal(likeliest_tokens(logits, num_groups=num_groups), composed.argmax(-1))


def test_label_smoothing_smooths_each_group():
    logits, targets = group_logits(2, 4), torch.tensor([0, 3, 7, 9, 12, 15])
    losses, _ = token_cross_entropy(logits, targets, label_smoothing=0.2, num_token_groups=2)
    expected = sum(
        nn.functional.cross_entropy(group, digits, label_smoothing=0.2, reduction="none")
        for group, digits in zip(logits.chunk(2, dim=1), (targets // 4, targets % 4), strict=True)
    )
    torch.testing.assert_close(losses, expected)


def test_one_group_is_bit_equal_to_the_embedding_of_torch():
    config = TransformerConfig(16, 3, (3, 4), 32, 1, 4, 48)
    torch.manual_seed(0)
    ours = TokenEmbedding(config, 32)
    torch.manual_seed(0)
    plain = nn.Embedding(config.vocabulary_size, 32)
    ids = torch.arange(config.vocabulary_size).view(3, -1)
    assert torch.equal(ours.weight, plain.weight)
    assert torch.equal(ours(ids), plain(ids))


def test_a_code_is_the_sum_of_its_rows_and_every_other_id_has_its_own():
    config = TransformerConfig(16, 3, (3, 4), 32, 1, 4, 48, num_token_groups=2)
    embedding = TokenEmbedding(config, 32)
    rows = embedding.weight
    assert rows.shape == (4 + 4 + 5, 32)  # two groups; three classes, the null class and the mask token
    for token in range(16):
        torch.testing.assert_close(embedding(torch.tensor(token)), rows[token // 4] + rows[4 + token % 4])
    assert torch.equal(embedding(torch.arange(16, 21)), rows[8:])
    embedding(torch.tensor([[5, config.mask_token_id]])).sum().backward()
    assert rows.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 4 + 1, 12]


@pytest.mark.parametrize("name", ["bert", "adaln"])
def test_a_network_computes_the_logits_of_codes_from_those_of_groups(name):
    config = small_config(name, num_token_groups=2)
    network = create(config)
    tokens, labels, mask, _ = inputs(config)
    groups = network.forward_masked(tokens, labels, mask, vocabulary="groups")
    assert groups.shape == (int(mask.sum()), 2 * 4)
    expected = compose_logits(groups, num_groups=2)
    for vocabulary in ("codes", "all"):
        torch.testing.assert_close(network.forward_masked(tokens, labels, mask, vocabulary=vocabulary), expected)


def test_groups_shrink_embedding_and_head_of_large_codebooks():
    config = TransformerConfig(2**18, 1000, (16, 16), num_token_groups=2)
    assert (config.group_size, config.num_code_rows, config.num_rows) == (512, 1024, 1024 + 1002)
    with torch.device("meta"):
        few = sum(each.numel() for each in config.create().parameters())
        many = sum(each.numel() for each in replace(config, num_token_groups=1).create().parameters())
    assert many - few == (2**18 - 1024) * (768 + 1)  # a row of the table and a bias each


@pytest.mark.parametrize(
    ("size", "groups", "message"),
    [
        (1000, 2, r"codebook_size = k\^G, got 2 for 1000 codes; 1024 = 32\^2 codes fit"),
        (2, 24, r"got 24 for 2 codes; 16777216 = 2\^24 codes fit"),
        (16, 0, r"num_token_groups must be an integer in \[1, 24\], got 0"),
        (4 * LARGEST_COMPOSED, 2, "codebook_size must be at most 262144 with num_token_groups above 1, because"),
    ],
)
def test_codebooks_that_cannot_be_divided_are_refused(size, groups, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(size, 3, (3, 4), num_token_groups=groups)


@dataclass(frozen=True)
class OtherConfig(BackboneConfig):
    """A backbone that knows nothing of groups."""

    backbone: str = "other"

    def create(self) -> Backbone:
        raise NotImplementedError


def test_backbones_without_groups_refuse_them():
    with pytest.raises(ValueError, match="num_token_groups must be 1 for the backbone 'other', got 2"):
        OtherConfig(16, 3, (3, 4), num_token_groups=2)


# Whole runs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of 64 binary codes: 8 px images, 4 x 4 tokens."""
    folder = tmp_path_factory.mktemp("binary") / "tokenizer"
    sizes = {"base_channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "num_groups": 2}
    config = VQGANConfig(1, **sizes, codebook_size=64, code_dim=6, quantizer="lfq")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_tokenizer(folder, config, VQGAN(config).state_dict(), image_size=8)
    return folder


def of_64_codes(name: str, num_groups: int, **options: Any) -> BackboneConfig:
    return small_config(name, codebook_size=64, num_token_groups=num_groups, grid=[4, 4], **options)


def bits_per_token(pipe: MaskGIT, tokens: Tensor) -> float:
    """Computes the order-agnostic bound, in bits per token."""
    network = pipe.transformer.network
    predictor, index = bind_conditions(network, torch.zeros(len(tokens), dtype=torch.int64), None)
    nats = negative_elbo(predictor, tokens, index, mask_token_id=network.config.mask_token_id, draws=16)
    return float(nats.mean()) / (math.log(2) * tokens.shape[1])


@pytest.mark.trainings
@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "num_groups"), [("bert", 2), ("adaln", 3)])
def test_a_model_of_groups_trains_resumes_generates_edits_and_is_measured(
    backbone, num_groups, tokenizer, tiny_shards, tmp_path
):
    def create_model():
        torch.manual_seed(0)
        decoding = DecodingConfig(num_steps=4, guidance={"name": "linear", "scale": 1.0}, top_k=20)
        config = of_64_codes(backbone, num_groups)
        return masked_model(config, tokenizer, decoding=decoding, rate=LearningRate(1e-2), ema_decay=0.9)

    model = create_model()
    straight = fit(model, data(tiny_shards), steps=40, folder=tmp_path / "a")
    first = fit(create_model(), data(tiny_shards), steps=3, folder=tmp_path / "b")
    resume = newest_checkpoint(tmp_path / "b")
    second = fit(create_model(), data(tiny_shards), steps=40, folder=tmp_path / "b", resume=resume)
    assert first.losses + second.losses == straight.losses
    losses = [float.fromhex(loss) for loss in straight.losses]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    model.export(tmp_path, class_names=("a", "b", "c"))
    pipe = MaskGIT.from_pretrained(tmp_path)
    images = pipe.generate([0, 1, 2], seed=0)
    assert [image.size for image in images] == [(8, 8)] * 3
    left_half = torch.arange(64).reshape(8, 8) % 8 < 4
    (edited,) = pipe.inpaint(images[0], left_half, classes=[1], seed=0, num_steps=2)
    assert edited.size == (8, 8)
    if backbone == "bert":
        assert len(pipe.generate([0, 1], seed=0, token_selector="p2")) == 2
    pixels = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = load_tokenizer(tokenizer).network.encode(pixels)
    assert 0 < bits_per_token(pipe, tokens) < 3 * math.log2(64)


def test_the_autoregressive_baseline_of_groups_trains_and_generates(tokenizer, tiny_shards, tmp_path):
    config = of_64_codes("bert", 2, attention="causal")
    model = autoregressive_model(config, tokenizer, decoding=AutoregressiveDecoding("constant"))
    fit(model, data(tiny_shards), steps=2, folder=tmp_path / "checkpoints")
    model.export(tmp_path, class_names=("a", "b", "c"))
    images = MaskGIT.from_pretrained(tmp_path).generate([0, 1], seed=0)
    assert [image.size for image in images] == [(8, 8)] * 2
