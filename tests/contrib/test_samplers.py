"""The rules of the token selectors that set their counts or judge decided tokens, by hand."""

import pytest
import torch

from maskgit_pl.decoding.selectors import Candidates, token_selectors
from tests.decoding.fakes import ALL_MASKED, NUM_TOKENS, decoder_of, run


def candidates(probs: list[list[float]], **more: object) -> Candidates:
    """Returns candidates of one row whose drawn code is the first."""
    log_probs = torch.tensor([probs]).log()
    positions, gumbel = torch.arange(len(probs))[None], torch.zeros(1, len(probs))
    return Candidates(log_probs, torch.zeros_like(positions), positions, gumbel, 0.5, (1, 3), **more)


def test_klass_keeps_what_is_confident_and_has_not_changed():
    now = [[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]]
    before = torch.tensor([[[0.89, 0.11], [0.5, 0.5], [0.5, 0.5]]]).log()  # KL 0.0005, 0.37 and 0
    selector = token_selectors.build("klass")
    drawn, planned = candidates(now, previous=before), torch.tensor([1])
    scores = selector(drawn)
    assert scores.argmax() == 0
    assert selector.num_kept(drawn, scores, planned).tolist() == [1]
    assert selector.num_kept(drawn, scores, 2 * planned).tolist() == [2]
    settled = candidates(now, previous=drawn.log_probs)
    assert selector.num_kept(settled, selector(settled), planned).tolist() == [2]
    first = candidates(now)
    assert torch.equal(selector(first), token_selectors.build("confidence")(first))


@pytest.mark.parametrize(("bound", "kept"), [(0.0, 1), (0.34, 2), (0.9, 3), (0.8, 2)])
def test_entropy_bound_keeps_tokens_while_the_sum_without_the_largest_is_bounded(bound, kept):
    drawn = candidates([[0.5, 0.5], [0.9, 0.1], [0.8, 0.2]])  # entropies 0.693, 0.325 and 0.500
    selector = token_selectors.build({"name": "entropy_bound", "bound": bound})
    scores = selector(drawn)
    assert scores.argsort(descending=True).tolist() == [[1, 2, 0]]
    assert selector.num_kept(drawn, scores, torch.tensor([1])).tolist() == [kept]
    scores[:, 0] = -torch.inf  # padding
    assert selector.num_kept(drawn, scores, torch.tensor([0])).tolist() == [min(kept, 2)]


def test_p2_masks_a_decided_token_that_has_become_unlikely():
    drawn = candidates([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]], decided=torch.tensor([[0, 0, -1]]))
    for eta, expected in ((1.0, [[0, 2, 1]]), (0.25, [[2, 0, 1]])):  # log 0.1 and log 0.5; a quarter of log 0.1
        scores = token_selectors.build({"name": "p2", "eta": eta, "choice_temperature": 0.0})(drawn)
        assert scores.argsort().tolist() == expected


@pytest.mark.parametrize("spec", [{"name": "klass", "least_probability": 0.2, "most_divergence": 1.0}, "entropy_bound"])
def test_decoding_ends_when_no_token_is_masked(spec):
    steps = run(ALL_MASKED, decoder_of(spec, NUM_TOKENS))
    assert len(steps) < NUM_TOKENS
    assert not steps[-1].still_masked.any()


@pytest.mark.parametrize("name", ["klass", "entropy_bound"])
def test_the_batch_does_not_change_an_image(name):
    whole = run(ALL_MASKED, decoder_of(name, NUM_TOKENS), seeds=[3, 4])
    alone = run(ALL_MASKED[:1], decoder_of(name, NUM_TOKENS), seeds=[4])
    assert torch.equal(alone[-1].tokens[0], whole[-1].tokens[1])
