import dataclasses

import pytest
import torch
from torch import Tensor

from maskgit_pl.networks.transformer import AutoregressiveTransformer, MaskedTransformer, TransformerConfig
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
