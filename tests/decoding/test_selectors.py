"""The contract that every registered token selector holds, then the rule of each."""

from dataclasses import dataclass
from inspect import cleandoc
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import ParallelDecoder, selectors
from maskgit_pl.decoding.selectors import Candidates, TokenSelector, check_token_selector, token_selectors
from maskgit_pl.registry import Registry
from maskgit_pl.schedules import halton_order, mask_schedules
from tests.decoding.fakes import (
    ALL_MASKED,
    GRID,
    MASK,
    MIXED,
    NUM_CODES,
    NUM_TOKENS,
    count_masked,
    decoder_of,
    fake_predictor,
    partly_known,
    run,
)

EVERY = [
    *token_selectors.names(),
    {"name": "confidence", "choice_temperature": 0.0},
]
every_selector = pytest.mark.parametrize("spec", EVERY, ids=str)


def impossible_and_certain() -> Candidates:
    """Returns candidates of one row whose codes are impossible or certain."""
    logits = torch.full((1, 3, 3), -torch.inf)
    logits[:, 0, :2] = 0  # one code is impossible
    logits[:, 1:, 0] = 0  # one code is certain
    tokens, log_probs = torch.zeros(1, 3, dtype=torch.int64), logits.log_softmax(-1)
    decided = torch.tensor([[0, 1, -1]])
    return Candidates(log_probs, tokens, torch.arange(3)[None], torch.zeros(1, 3), 0.5, (1, 3), log_probs, decided)


@every_selector
def test_contract_scores_are_finite_for_impossible_and_for_certain_codes(spec):
    assert token_selectors.build(spec)(impossible_and_certain()).isfinite().all()


def test_the_example_at_the_head_of_the_file_holds_the_contract():
    example = cleandoc((selectors.__doc__ or "").split("::\n")[1])
    names = {**vars(selectors), "Tensor": Tensor, "token_selectors": Registry("token selector", "none")}
    exec(example, names)  # into a registry of its own
    selector = names["EntropyOrder"]()
    check_token_selector("entropy_order", selector)
    assert selector(impossible_and_certain()).isfinite().all()


@pytest.mark.parametrize("num_steps", [1, 2, 16])
@every_selector
def test_contract_all_tokens_are_known_at_the_end_and_given_ones_stay(spec, num_steps):
    tokens = partly_known(MIXED)
    is_given = tokens != MASK
    steps = run(tokens, decoder_of(spec, num_steps))
    for step in steps:
        assert torch.equal(step.tokens[is_given], tokens[is_given])
        assert not ((step.was_masked | step.still_masked) & is_given).any()
        assert 0 <= step.tokens.min() <= step.tokens.max() < NUM_CODES
    assert not steps[-1].still_masked.any()
    assert len(steps) <= num_steps


@pytest.mark.parametrize("first_step", [0, 2])
@pytest.mark.parametrize("spec", [spec for spec in EVERY if not token_selectors.build(spec).counts_in_loop], ids=str)
def test_contract_the_number_of_masked_tokens_follows_the_schedule(spec, first_step):
    decoder = decoder_of(spec)
    steps = run(partly_known(MIXED), decoder, first_step=first_step)
    num_masked = [step.still_masked.sum(1).tolist() for step in steps]
    planned = count_masked(decoder, MIXED, first_step=first_step)
    assert [step.was_masked.sum(1).tolist() for step in steps] == planned[:-1]
    assert num_masked == planned[1:]
    for earlier, later in pairwise(num_masked):
        assert all(map(int.__le__, later, earlier))
    assert [step.step for step in steps] == list(range(first_step, first_step + len(steps)))


@every_selector
def test_contract_an_image_depends_on_its_seed_and_not_on_its_batch(spec):
    tokens, decoder = partly_known(MIXED), decoder_of(spec)
    together = run(tokens, decoder)[-1].tokens
    for row in range(len(MIXED)):
        steps = run(tokens[row : row + 1], decoder, seeds=[row])
        assert torch.equal(steps[-1].tokens[0] if steps else tokens[row], together[row]), MIXED[row]
    first, second = run(ALL_MASKED, decoder)[-1].tokens
    assert not torch.equal(first, second)


@pytest.mark.parametrize("spec", [spec for spec in EVERY if not token_selectors.build(spec).sees_decided], ids=str)
def test_contract_decided_tokens_and_their_confidence_stay_until_redrawn(spec):
    decoder, tokens, still_masked = decoder_of(spec), partly_known(MIXED), None
    confidence = torch.ones(tokens.shape)
    for step in run(tokens, decoder):
        if still_masked is not None:
            assert torch.equal(step.was_masked, still_masked)
            assert torch.equal(step.tokens[~still_masked], tokens[~still_masked])
        probabilities = fake_predictor(tokens, torch.arange(NUM_TOKENS).expand_as(tokens)).softmax(-1)
        drawn = probabilities.gather(-1, step.tokens.unsqueeze(-1)).squeeze(-1)
        confidence = drawn.where(step.tokens != tokens, confidence)
        torch.testing.assert_close(step.confidence, confidence)
        still_masked, tokens = step.still_masked, step.tokens.masked_fill(step.still_masked, MASK)


def test_halton_keeps_tokens_in_its_order():
    steps = run(ALL_MASKED, decoder_of("halton", NUM_TOKENS))
    kept = [(step.was_masked & ~step.still_masked).nonzero()[:, 1].tolist() for step in steps]
    assert kept == [[position] * 2 for position in halton_order(GRID)]


def test_moment_scores_and_sharpens_with_the_same_exponent():
    log_probs, gumbel = torch.randn(2, 5, 7).log_softmax(-1), torch.randn(2, 5)
    tokens, positions = torch.zeros(2, 5, dtype=torch.int64), torch.arange(5).repeat(2, 1)
    drawn = Candidates(log_probs, tokens, positions, gumbel, 0.5, (1, 5))  # temperature 4 (1 - 0.5) = 2: exponent 1.5
    selector = token_selectors.build({"name": "moment", "choice_temperature": 4.0})
    expected = drawn.log_probs.exp().pow(1.5).sum(-1).log() + drawn.gumbel
    torch.testing.assert_close(selector(drawn), expected)
    assert selector.sharpness(0.5) == 1.5


@pytest.mark.parametrize(("progress", "expected"), [(0.25, [-0.559438, -1.974353]), (0.75, [-1.259438, -0.774353])])
def test_margin_by_hand(progress, expected):
    log_probs = torch.tensor([[[0.5, 0.2, 0.3], [0.04, 0.06, 0.9]]]).log()
    gumbel = torch.tensor([[0.7, -1.2]])
    drawn = Candidates(log_probs, torch.tensor([[1, 0]]), torch.tensor([[0, 1]]), gumbel, progress, (1, 2))
    scores = token_selectors.build({"name": "margin", "choice_temperature": 2.0})(drawn)
    torch.testing.assert_close(scores, torch.tensor([expected]), atol=1e-5, rtol=0)  # log(0.2) and log(0.84), noise


def test_remdm_by_hand():
    selector = token_selectors.build({"name": "remdm", "eta": 0.3})
    assert selector.num_remasked(decided=10, planned=6) == 2  # 0.3 * 0.6 * 10, rounded
    assert selector.num_remasked(decided=10, planned=2) == 1
    assert selector.num_remasked(decided=0, planned=6) == 0


def test_a_selector_may_choose_the_tokens_that_are_masked_again():
    """The decided tokens with the highest remasking scores are masked: here the last ones in raster order."""
    last = selector_with(
        num_remasked=lambda self, *, decided, planned: min(decided, 2),
        remasking_scores=lambda self, decided: torch.arange(NUM_TOKENS).expand(decided.confidence.shape).float(),
    )
    steps = run(ALL_MASKED, ParallelDecoder(mask_schedules.build("linear"), last, num_steps=4))
    remasked = [(~step.was_masked & step.still_masked)[0].nonzero().flatten().tolist() for step in steps]
    assert remasked[0] == remasked[-1] == []
    for step, positions in zip(steps[1:-1], remasked[1:-1], strict=True):
        assert positions == (~step.was_masked[0]).nonzero().flatten().tolist()[-2:]


@dataclass(frozen=True)
class Constant(TokenSelector):
    """A selector that returns equal scores, unless a subclass has other methods."""

    def __call__(self, candidates: Candidates) -> Tensor:
        return torch.zeros(candidates.tokens.shape)


def selector_with(**methods: object) -> TokenSelector:
    """Returns a selector with other methods or attributes."""
    return dataclass(frozen=True)(type("Mine", (Constant,), methods))()


def test_one_method_is_enough_for_a_selector():
    tokens, own = partly_known(MIXED), selector_with(__call__=lambda self, candidates: candidates.gumbel)
    decoder = ParallelDecoder(mask_schedules.build("cosine"), own, num_steps=6)
    assert torch.equal(run(tokens, decoder)[-1].tokens, run(tokens, decoder_of("random"))[-1].tokens)


def test_a_selector_may_set_the_number_of_tokens_of_each_step():
    """Three a step: a row ends when none is masked, and the decoding with its last row."""
    three = selector_with(num_kept=lambda self, candidates, scores, planned: torch.full_like(planned, 3))
    assert three.counts_in_loop
    steps = run(partly_known(MIXED), ParallelDecoder(mask_schedules.build("cosine"), three, num_steps=16))
    masked = [step.still_masked.sum(1).tolist() for step in steps]
    expected = [[max(0, start - 3 * (step + 1)) for start in MIXED] for step in range(6)]
    assert masked == expected
    late = ParallelDecoder(mask_schedules.build("cosine"), three, num_steps=3)
    assert not run(ALL_MASKED, late)[-1].still_masked.any()  # the last step decides all


def test_a_number_of_tokens_that_is_that_of_the_plan_changes_no_token():
    planned = selector_with(
        __call__=lambda self, candidates: candidates.drawn_log_probs,
        num_kept=lambda self, candidates, scores, planned: planned,
    )
    tokens, same = partly_known(MIXED), {"name": "confidence", "choice_temperature": 0.0}
    decoder = ParallelDecoder(mask_schedules.build("cosine"), planned, num_steps=6)
    for mine, other in zip(run(tokens, decoder), run(tokens, decoder_of(same)), strict=True):
        assert torch.equal(mine.tokens, other.tokens)
        assert torch.equal(mine.still_masked, other.still_masked)


def test_a_selector_may_see_the_distributions_of_the_step_before():
    seen = []

    def score(self, candidates):
        seen.append((candidates.positions, candidates.log_probs, candidates.previous))
        return candidates.gumbel

    sees = selector_with(__call__=score, sees_previous=True)
    run(ALL_MASKED, ParallelDecoder(mask_schedules.build("cosine"), sees, num_steps=6))
    assert len(seen) == 6
    assert seen[0][2] is None
    for (before, log_probs, _), (positions, _, previous) in pairwise(seen):
        for row in range(2):
            columns = [before[row].tolist().index(position) for position in positions[row].tolist()]
            assert torch.equal(previous[row], log_probs[row, columns])


def test_a_selector_may_see_and_change_and_mask_decided_tokens():
    """Codes that are decided become 0, and the first tokens of the image have the lowest scores: they end the mask."""

    def score(self, candidates):
        assert candidates.positions.tolist() == ALL_MASKED.new_tensor(range(NUM_TOKENS)).expand(2, -1).tolist()
        return candidates.positions.float()

    def revise(self, candidates):
        return candidates.tokens.where(candidates.decided < 0, 0)

    sees = selector_with(__call__=score, revise=revise, sees_decided=True)
    *steps, last = run(ALL_MASKED, ParallelDecoder(mask_schedules.build("linear"), sees, num_steps=4))
    assert [step.still_masked.sum(1).tolist() for step in steps] == [[12, 12], [8, 8], [4, 4]]
    assert all(bool(step.still_masked[:, :4].all()) for step in steps)
    assert not last.tokens[:, 4:].any()  # decided before the last step
    assert not last.still_masked.any()


@pytest.mark.parametrize("more", [{"sees_decided": True}, {"num_kept": lambda self, c, scores, planned: planned}])
def test_a_selector_that_scores_decided_tokens_or_counts_remasks_no_others(more):
    selector = selector_with(num_remasked=lambda self, *, decided, planned: 2, **more)
    plan = ParallelDecoder(mask_schedules.build("linear"), selector, num_steps=4).plan([16], 16)
    assert [step.remasked for step in plan] == [[0]] * 4
    assert [step.after for step in plan] == [[12], [8], [4], [0]]


def test_steps_go_on_for_a_selector_that_sees_decided_tokens_when_none_is_masked():
    """All are kept at once, and the steps that are left change them: here to the number of the step."""
    number = iter(range(4))
    sees = selector_with(
        revise=lambda self, candidates: torch.full_like(candidates.tokens, next(number)),
        num_kept=lambda self, candidates, scores, planned: torch.full_like(planned, NUM_TOKENS),
        sees_decided=True,
    )
    steps = run(ALL_MASKED, ParallelDecoder(mask_schedules.build("linear"), sees, num_steps=4))
    assert [step.tokens.unique().tolist() for step in steps] == [[0], [1], [2], [3]]
    assert not any(bool(step.still_masked.any()) for step in steps)


def test_decided_tokens_are_seen_in_their_own_rows_only():
    """Tokens that were given never change, and a row without masked tokens stays as it is."""
    tokens, steps = partly_known(MIXED), run(partly_known(MIXED), decoder_of({"name": "p2", "eta": 2.0}))
    assert torch.equal(steps[-1].tokens.where(tokens != MASK, MASK), tokens)
    alone = run(tokens[1:2], decoder_of({"name": "p2", "eta": 2.0}), seeds=[1])
    assert torch.equal(alone[-1].tokens[0], steps[-1].tokens[1])


NAN = float("nan")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"__call__": lambda self, c: c.drawn_log_probs * NAN}, "scores must be a finite float tensor"),
        ({"__call__": lambda self, c: c.drawn_log_probs[:1]}, r"scores must be .* of shape \(2, 4\)"),
        ({"sharpness": lambda self, progress: NAN}, "sharpness must be a number"),
        ({"num_kept": lambda self, c, scores, planned: planned / 2}, "num_kept must be an integer tensor"),
    ],
)
def test_a_selector_that_breaks_the_contract_is_refused(methods, message):
    with pytest.raises(ValueError, match=f"token selector 'mine' at progress 0.125: {message}"):
        check_token_selector("mine", selector_with(**methods))
