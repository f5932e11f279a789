import dataclasses

import pytest
import torch
from torch import Tensor

from maskgit_pl.networks.int8 import quantize
from maskgit_pl.networks.transformer import AutoregressiveTransformer, MaskedTransformer, TransformerConfig
from maskgit_pl.networks.transformer_block import KVCache
from tests.conftest import random_transformer

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=32, depth=2, num_heads=4, mlp_dim=64, attention="causal")
N, K = CONFIG.num_tokens, CONFIG.codebook_size


@pytest.fixture(scope="module")
def network() -> AutoregressiveTransformer:
    return random_transformer(CONFIG)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(K, (3, N), generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 2, 3])  # the last is the null class


def test_it_has_the_weights_of_the_bidirectional_one_by_name_and_number(network):
    masked = dataclasses.replace(CONFIG, attention="bidirectional").create()
    assert type(masked) is MaskedTransformer
    assert type(CONFIG.create()) is AutoregressiveTransformer
    shapes = [{name: w.shape for name, w in made.state_dict().items()} for made in (masked, network)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("place", [0, 7, N - 2, N - 1])
def test_a_token_changes_the_logits_of_later_tokens_and_of_no_others(network, tokens, place):
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % K
    before, after = network(tokens, LABELS), network(changed, LABELS)
    differs = (before != after).any(-1).any(0)
    assert differs.tolist() == [other > place for other in range(N)]


def test_the_class_changes_all_logits(network, tokens):
    assert ((network(tokens, LABELS) != network(tokens, LABELS.roll(1))).any(-1)).all()


def test_logits_of_some_tokens_are_those_of_the_full_forward(network, tokens):
    mask = torch.rand(3, N, generator=torch.Generator().manual_seed(2)) < 0.5
    full = network(tokens, LABELS, vocabulary="all")
    assert full.shape == (3, N, CONFIG.vocabulary_size)
    torch.testing.assert_close(network.forward_masked(tokens, LABELS, mask, vocabulary="all"), full[mask])
    torch.testing.assert_close(network(tokens, LABELS), full[..., :K])


def test_the_next_token_is_predicted_as_in_the_full_forward_with_and_without_a_cache(network, tokens):
    full, cache = network(tokens, LABELS), network.create_cache()
    for place in range(N):
        with_cache = network.forward_next(tokens[:, :place], LABELS, cache=cache)
        torch.testing.assert_close(with_cache, full[:, place])
        torch.testing.assert_close(network.forward_next(tokens[:, :place], LABELS), full[:, place])
    assert [layer.num_rows for layer in cache] == [N, N]


def test_a_cache_may_begin_with_several_tokens_and_goes_on_with_one_each(network, tokens):
    cache = network.create_cache()
    network.forward_next(tokens[:, :5], LABELS, cache=cache)
    torch.testing.assert_close(network.forward_next(tokens[:, :6], LABELS, cache=cache), network(tokens, LABELS)[:, 6])
    with pytest.raises(AssertionError):
        network.forward_next(tokens[:, :9], LABELS, cache=cache)


def test_keys_and_values_are_kept_in_place():
    rows = torch.randn(2, 3, 4, 5, 8)
    kept = KVCache(5)
    first = kept.extend(rows[:, :, :, :2])
    whole = kept.extend(rows[:, :, :, 2:])
    assert torch.equal(whole, rows)
    assert first.data_ptr() == whole.data_ptr()


def test_in_8_bits_logits_are_close_with_a_cache_too(network, tokens):
    rounded = quantize(network)
    assert type(rounded) is AutoregressiveTransformer
    exact, cache = network(tokens, LABELS), rounded.create_cache()
    for place in range(N):
        made = rounded.forward_next(tokens[:, :place], LABELS, cache=cache)
        assert (made - exact[:, place]).norm() < 0.1 * exact[:, place].norm()


def test_dropout_is_of_training_alone(network, tokens):
    made = AutoregressiveTransformer(dataclasses.replace(CONFIG, dropout=0.5))
    assert not torch.equal(made(tokens, LABELS), made(tokens, LABELS))
    made.eval()
    assert torch.equal(made(tokens, LABELS), made(tokens, LABELS))


def test_another_attention_is_refused_by_name():
    with pytest.raises(ValueError, match=r"attention must be one of .*, got 'casual'; did you mean 'causal'\?"):
        dataclasses.replace(CONFIG, attention="casual")
