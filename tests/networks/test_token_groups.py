"""Token groups: digits and codes, embeddings and logits by hand, and networks whose tokens are divided into groups."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from maskgit_pl.masking import true_positions
from maskgit_pl.networks.backbone import (
    LARGEST_COMPOSED,
    TokenEmbedding,
    compose_logits,
    likeliest_tokens,
    split_tokens,
)
from maskgit_pl.networks.quantizers import quantizers
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.transformer.losses import token_cross_entropy
from tests.networks.backbone_cases import create, inputs, small_config

GROUPS = [(1, 7), (3, 3), (4, 2), (2, 5)]


def group_logits(num_groups: int, size: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, num_groups * size, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(("num_groups", "size"), GROUPS)
def test_digits_are_those_of_a_number_in_base_k_and_join_to_it(num_groups, size):
    tokens = torch.arange(size**num_groups)
    digits = split_tokens(tokens, num_groups=num_groups, group_size=size)
    assert digits.tolist() == [list(each) for each in product(range(size), repeat=num_groups)]
    logits = torch.nn.functional.one_hot(digits, size).flatten(-2)
    assert torch.equal(likeliest_tokens(logits, num_groups=num_groups), tokens)


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
    groups = network.forward_selected(tokens, labels, true_positions(mask), vocabulary="groups")
    assert groups.shape == (int(mask.sum()), 2 * 4)
    expected = compose_logits(groups, num_groups=2)
    for vocabulary in ("codes", "all"):
        torch.testing.assert_close(
            network.forward_selected(tokens, labels, true_positions(mask), vocabulary=vocabulary), expected
        )


@pytest.mark.parametrize(
    ("size", "groups", "message"),
    [
        (1000, 2, r"codebook_size = k\^G, got 2 for 1000 codes; 1024 = 32\^2 codes fit"),
        (2, 24, r"got 24 for 2 codes; 16777216 = 2\^24 codes fit"),
        (4 * LARGEST_COMPOSED, 2, "codebook_size must be at most 262144 with num_token_groups above 1, because"),
    ],
)
def test_codebooks_that_cannot_be_divided_are_refused(size, groups, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(size, 3, (3, 4), num_token_groups=groups)
