"""The ``bert`` backbone has the released sizes and initial weights, and its causal form predicts the next token."""

import dataclasses

import pytest
import torch

from maskgit_pl.networks.transformer import AutoregressiveTransformer, MaskedTransformer, TransformerConfig
from tests.conftest import random_transformer
from tests.networks.backbone_cases import create

SMALL = TransformerConfig(16, 3, (3, 4), embed_dim=32, depth=3, num_heads=4, mlp_dim=64)


@pytest.mark.parametrize(("grid", "parameters"), [((16, 16), 172_457_193), ((32, 32), 173_047_017)])
def test_the_defaults_have_as_many_parameters_as_the_released_models(grid, parameters):
    with torch.device("meta"):
        network = MaskedTransformer(TransformerConfig(1024, 1000, grid, class_dropout=0.0))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.token_embedding.weight.shape == (2025, 768)
    assert network.position_embedding.weight.shape == (grid[0] * grid[1] + 1, 768)
    assert not list(network.buffers())


def test_the_vocabulary_is_codes_classes_null_class_and_mask_token():
    assert (SMALL.null_label, SMALL.mask_token_id, SMALL.vocabulary_size) == (3, 20, 21)
    without = dataclasses.replace(SMALL, class_dropout=0.0)
    assert (without.null_label, without.mask_token_id, without.vocabulary_size) == (None, 19, 20)


def test_the_token_table_gets_gradient_through_both_of_its_uses():
    network = create(SMALL)
    tokens, labels = torch.full((2, 12), SMALL.mask_token_id), torch.tensor([1, 1])
    network(tokens, labels, vocabulary="codes").square().sum().backward()
    rows = network.token_embedding.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [True] * 16 + [False, True, False, False, True]  # head: codes; input: class 1 and the mask


def test_weights_start_from_the_released_truncated_normal_and_biases_from_0():
    torch.manual_seed(0)
    network = MaskedTransformer(dataclasses.replace(SMALL, embed_dim=128, mlp_dim=256))
    for name, parameter in network.named_parameters():
        if "norm" in name:
            assert set(parameter.unique().tolist()) == {1.0 if name.endswith("weight") else 0.0}, name
        elif name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        else:
            assert parameter.abs().max() <= 0.04, name
            if parameter.numel() > 4000:
                assert 0.0168 < parameter.std() < 0.0184, name  # 0.02 * 0.880, the truncated normal's; released code


def test_embeddings_have_dropout_of_their_own():
    network = create(dataclasses.replace(SMALL, dropout=0.5)).train()
    for block in network.blocks:
        block.dropout = 0.0
    tokens, labels = torch.zeros(2, 12, dtype=torch.int64), torch.tensor([0, 1])
    assert not torch.allclose(*(network(tokens, labels) for _ in range(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 0}, r"transformer codebook_size must be an integer in \[1, 16777216\], got 0"),
        ({"depth": 10**7}, r"transformer depth must be an integer in \[1, 1024\], got 10000000"),
        ({"embed_dim": 2**40}, "transformer embed_dim must be an integer in .* got 1099511627776"),
        ({"num_heads": 5}, "transformer embed_dim must be a multiple of num_heads 5, got 32"),
        ({"grid": (3, 0)}, r"transformer grid must be an integer in \[1, 65536\], got 0"),
        ({"grid": ()}, r"transformer grid must have 1 to 3 axes and at most 65536 tokens, got \(\)"),
        ({"grid": (2, 2, 2, 2)}, r"transformer grid must have 1 to 3 axes .* got \(2, 2, 2, 2\)"),
        ({"grid": (41, 40, 40)}, r"transformer grid must have .* at most 65536 tokens, got \(41, 40, 40\)"),
        ({"dropout": 1.0}, r"transformer dropout must be a number in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_sizes_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=32, depth=2, num_heads=4, mlp_dim=64, attention="causal")
N, LABELS = CONFIG.num_tokens, torch.tensor([0, 2, 3])  # the last label is the null class


@pytest.fixture(scope="module")
def network() -> AutoregressiveTransformer:
    return random_transformer(CONFIG)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(16, (3, N), generator=torch.Generator().manual_seed(1))


def test_both_forms_have_weights_of_the_same_names_and_shapes(network):
    masked = dataclasses.replace(CONFIG, attention="bidirectional").create()
    shapes = [{name: w.shape for name, w in form.state_dict().items()} for form in (masked, network)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("position", [0, 7, N - 2, N - 1])
def test_a_token_changes_the_logits_of_later_tokens_only(network, tokens, position):
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 16
    before, after = network(tokens, LABELS), network(changed, LABELS)
    assert (before != after).any(-1).any(0).tolist() == [later > position for later in range(N)]


@pytest.mark.parametrize("first", [0, 5])
def test_the_next_token_is_predicted_as_in_the_full_forward(network, tokens, first):
    full, cache = network(tokens, LABELS), network.create_cache()
    for position in range(first, N):
        with_cache = network.forward_next(tokens[:, :position], LABELS, cache=cache)
        torch.testing.assert_close(with_cache, full[:, position])
        torch.testing.assert_close(network.forward_next(tokens[:, :position], LABELS), full[:, position])
    assert [layer.num_rows for layer in cache] == [N, N]
