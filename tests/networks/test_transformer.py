import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig

SMALL = TransformerConfig(16, 3, (3, 4), embed_dim=32, depth=3, num_heads=4, mlp_dim=64)


def network(config: TransformerConfig = SMALL, *, seed: int = 0) -> MaskedTransformer:
    """Returns a network in evaluation mode, with weights large enough for mistakes to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = MaskedTransformer(config).eval()
        for parameter in made.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def inputs(rows: int = 4) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(16, (rows, 12), generator=chance)
    hidden = torch.rand(rows, 12, generator=chance) < 0.5
    return tokens.masked_fill(hidden, SMALL.mask_token_id), torch.randint(3, (rows,), generator=chance)


@pytest.mark.parametrize(("grid", "parameters"), [((16, 16), 172_457_193), ((32, 32), 173_047_017)])
def test_the_defaults_have_as_many_parameters_as_the_released_models(grid, parameters):
    with torch.device("meta"):
        made = MaskedTransformer(TransformerConfig(1024, 1000, grid, class_dropout=0.0))
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters
    assert made.token_embedding.weight.shape == (2025, 768)
    assert made.position_embedding.weight.shape == (grid[0] * grid[1] + 1, 768)
    assert not list(made.buffers())


def test_vocabulary_rows_are_codes_classes_null_class_and_the_mask_token_last():
    assert SMALL.null_label == 3
    assert SMALL.vocabulary_size == 16 + 3 + 1 + 1
    assert SMALL.mask_token_id == 20
    without = dataclasses.replace(SMALL, class_dropout=0.0)
    assert without.null_label is None
    assert without.vocabulary_size == 16 + 3 + 1
    assert without.mask_token_id == 19


@pytest.mark.parametrize("label", [0, 2, 3], ids=["first class", "last class", "null class"])
def test_a_forward_reads_the_word_rows_of_its_codes_its_class_and_the_mask(label):
    made = network()
    tokens = torch.tensor([[0, 5, SMALL.mask_token_id, 15] * 3])
    embedded = made.token_embedding(tokens).detach()
    seen: list[Tensor] = []
    made.embedding_norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    made(tokens, torch.tensor([label]))
    words = seen[0] - made.position_embedding.weight.detach()
    torch.testing.assert_close(words[0, 0], made.token_embedding.weight.detach()[16 + label])
    torch.testing.assert_close(words[:, 1:], embedded)
    torch.testing.assert_close(words[0, 3], made.token_embedding.weight.detach()[-1])


@contextmanager
def rows_seen(block: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the positions that the output projection and the MLP of a block compute."""
    seen: dict[str, int] = {}
    hooks = [
        block.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: seen.update({name: output.shape[1]})
        )
        for name in ("proj", "fc2")
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_the_last_block_computes_queries_and_what_follows_where_it_is_asked_alone():
    made = network()
    positions = torch.tensor([[0, 11, 5], [3, 2, 1], [7, 7, 0], [10, 4, 9]])
    parts = {}
    last = made.blocks[-1].qkv
    whole = last.part
    last.part = lambda x, *rows: parts.update({rows: x.shape}) or whole(x, *rows)
    with rows_seen(made.blocks[-1]) as seen, rows_seen(made.blocks[0]) as before:
        made.forward_at(*inputs(), positions)
    assert parts == {(0, 32): (4, 3, 32), (32, 96): (4, 13, 32)}  # queries, keys and values
    assert set(seen.values()) == {3}
    assert set(before.values()) == {13}


def test_the_word_table_gets_gradient_through_both_of_its_uses():
    made = network()
    tokens, labels = torch.full((2, 12), SMALL.mask_token_id), torch.tensor([1, 1])
    made(tokens, labels, vocabulary="all").square().sum().backward()
    gradient = made.token_embedding.weight.grad
    assert gradient is not None
    assert (gradient[0].abs().sum() > 0).item()  # code 0 is nowhere in the input: the head's use
    made.zero_grad()
    made(tokens, labels, vocabulary="codes").square().sum().backward()
    gradient = made.token_embedding.weight.grad
    assert gradient is not None
    used = gradient.abs().sum(1) > 0
    assert used.tolist() == [True] * 16 + [False, True, False, False, True]  # head: codes; input: class 1 and the mask


def test_every_layer_norm_has_the_released_epsilon():
    norms = [module for module in MaskedTransformer(SMALL).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 1 + 2 * SMALL.depth + 1
    assert {norm.eps for norm in norms} == {1e-12}


def test_weights_start_from_a_normal_truncated_at_two_deviations_and_biases_from_0():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MaskedTransformer(dataclasses.replace(SMALL, embed_dim=128, mlp_dim=256))
    for name, parameter in made.named_parameters():
        if "norm" in name:
            assert set(parameter.unique().tolist()) == {1.0 if name.endswith("weight") else 0.0}, name
        elif name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        else:
            assert parameter.abs().max() <= 0.04, name
            if parameter.numel() > 4000:
                assert 0.0168 < parameter.std() < 0.0184, name  # 0.02 * 0.880, the truncated normal's; released code


def test_a_block_is_post_norm_with_the_tanh_gelu():
    block = network().blocks[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    query, key, value = (
        part.view(2, 5, 4, 8).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1)
    )  # packed as query, key, value; heads are the major index of each
    attention = (query @ key.transpose(2, 3) / 8**0.5).softmax(-1) @ value
    x = block.attention_norm(x + block.proj(attention.transpose(1, 2).reshape(2, 5, 32)))
    hidden = nn.functional.gelu(nn.functional.linear(x, block.fc1.weight, block.fc1.bias), approximate="tanh")
    expected = block.mlp_norm(x + block.fc2(hidden))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_alone():
    made = network(dataclasses.replace(SMALL, dropout=0.5))
    torch.testing.assert_close(made(*inputs()), made(*inputs()), rtol=0, atol=0)
    made.train()
    assert not torch.allclose(made(*inputs()), made(*inputs()))
    without = network(dataclasses.replace(SMALL, dropout=0.0)).train()
    torch.testing.assert_close(without(*inputs()), without(*inputs()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 0}, r"transformer codebook_size must be an integer in \[1, 16777216\], got 0"),
        ({"num_classes": 0}, "transformer num_classes must be an integer in"),
        ({"depth": 0}, "transformer depth must be an integer in"),
        ({"depth": 10**7}, r"transformer depth must be an integer in \[1, 1024\], got 10000000"),
        ({"depth": 2.0}, "transformer depth must be an integer in .* got 2.0"),
        ({"embed_dim": 2**40}, "transformer embed_dim must be an integer in .* got 1099511627776"),
        ({"mlp_dim": -1}, "transformer mlp_dim must be an integer in .* got -1"),
        ({"num_heads": 5}, "transformer embed_dim must be a multiple of num_heads 5, got 32"),
        ({"grid": (3, 0)}, r"transformer grid must be an integer in \[1, 256\], got 0"),
        ({"grid": (3, 3, 3)}, "transformer grid must be two numbers"),
        ({"dropout": 1.0}, r"transformer dropout must be a number in \[0, 1\), got 1.0"),
        ({"class_dropout": -0.1}, r"transformer class_dropout must be a number in \[0, 1\)"),
    ],
    ids=str,
)
def test_sizes_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_grid_from_json_is_a_tuple_and_counts_its_tokens():
    config = dataclasses.replace(SMALL, grid=[3, 4])
    assert config == SMALL
    assert config.num_tokens == 12
