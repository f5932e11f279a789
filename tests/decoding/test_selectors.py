"""The contract that every registered token selector holds, then what makes each different."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, DecodingStep, ParallelDecoder, SeededNoise
from maskgit_pl.decoding.selectors import (
    Candidates,
    Decided,
    TokenSelector,
    check_token_selector,
    token_selectors,
)
from maskgit_pl.schedules import halton_order, mask_schedules
from tests.decoding.fakes import count_masked

NUM_CODES, MASK, GRID = 7, 7, (3, 8)
NUM_TOKENS = math.prod(GRID)
LOGITS = torch.randn(64, NUM_CODES, generator=torch.Generator().manual_seed(0)) * 2
MIXED = [24, 13, 5, 1, 0]  # unknown tokens of the rows
EVERY = [
    *token_selectors.names(),
    *({"name": "remdm", "strategy": strategy} for strategy in ("cap", "confidence", "loop")),
    {"name": "halton", "seed": 5},
    {"name": "entropy", "gamma": 0.0},
    {"name": "confidence", "choice_temperature": 0.0},
    {"name": "moment", "choice_temperature": 0.0},
    {"name": "p2", "choice_temperature": 0.0, "penalty": 2.0},
    {"name": "edit", "threshold": 0.5},
]
every_selector = pytest.mark.parametrize("spec", EVERY, ids=str)


def candidates(progress: float = 0.25) -> Candidates:
    chance = torch.Generator().manual_seed(0)
    return Candidates(
        log_probs=torch.randn(2, 5, 7, generator=chance).log_softmax(-1),
        tokens=torch.randint(7, (2, 5), generator=chance),
        positions=torch.arange(5).repeat(2, 1),
        gumbel=torch.randn(2, 5, generator=chance),
        progress=progress,
        grid=(1, 5),
    )


def fake_predictor(tokens: Tensor, positions: Tensor) -> Tensor:
    """Returns logits that depend on the position and on the number of known tokens of the row."""
    known = (tokens != MASK).sum(1, keepdim=True)
    return LOGITS[(positions + known) % 64]


def partly_known(unknown: list[int]) -> Tensor:
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(NUM_CODES, (len(unknown), NUM_TOKENS), generator=chance)
    for row, count in enumerate(unknown):
        tokens[row, torch.randperm(NUM_TOKENS, generator=chance)[:count]] = MASK
    return tokens


def decoder(spec: str | dict, num_steps: int = 8, **options: object) -> ParallelDecoder:
    return DecodingConfig(num_steps, spec, **options).build_decoder(mask_schedules.build("cosine"))


def run(
    tokens: Tensor, made: ParallelDecoder, *, seeds: list[int] | None = None, **options: object
) -> list[DecodingStep]:
    noise = SeededNoise(torch.tensor(seeds or range(len(tokens))), NUM_TOKENS)
    return list(made.steps(fake_predictor, tokens, noise, mask_token_id=MASK, grid=GRID, **options))


# The contract


@every_selector
def test_contract_every_candidate_gets_a_finite_score_without_hidden_chance(spec):
    given = candidates()
    scores = token_selectors.build(spec)(given)
    assert scores.shape == (2, 5)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(token_selectors.build(spec)(candidates()), scores)


@every_selector
def test_contract_scores_are_finite_where_codes_are_impossible_or_certain(spec):
    logits = torch.full((1, 2, 3), -torch.inf)
    logits[:, 0, :2] = 0  # one code is impossible
    logits[:, 1, 0] = 0  # one code is certain
    log_probs = logits.log_softmax(-1)
    given = Candidates(log_probs, torch.zeros(1, 2).long(), torch.arange(2)[None], torch.zeros(1, 2), 0.5, (1, 2))
    assert token_selectors.build(spec)(given).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 2, 8, 24])
@every_selector
def test_contract_every_position_ends_known_and_known_ones_never_change(spec, num_steps):
    tokens = partly_known(MIXED)
    given = tokens != MASK
    steps = run(tokens, decoder(spec, num_steps))
    for step in steps:
        assert torch.equal(step.tokens[given], tokens[given])
        assert not (step.was_masked & given).any()
        assert not (step.still_masked & given).any()
        assert 0 <= step.tokens.min() <= step.tokens.max() < NUM_CODES
    assert not steps[-1].still_masked.any()
    assert len(steps) <= num_steps


@every_selector
def test_contract_the_number_masked_follows_the_schedule_where_it_is_promised(spec):
    made = decoder(spec)
    counts = count_masked(made, MIXED, NUM_TOKENS)
    steps = run(partly_known(MIXED), made)
    masked = [step.still_masked.sum(1).tolist() for step in steps]
    if made.token_selector.follows_schedule:
        assert masked == counts[1:]
        assert [step.was_masked.sum(1).tolist() for step in steps] == counts[:-1]
    for earlier, later in pairwise(masked):
        assert all(map(int.__le__, later, earlier))


@pytest.mark.slow
@every_selector
def test_contract_rows_are_independent(spec):
    tokens = partly_known(MIXED)
    together = run(tokens, decoder(spec))[-1].tokens
    for row, count in enumerate(MIXED):
        steps = run(tokens[row : row + 1], decoder(spec), seeds=[row])
        assert torch.equal(steps[-1].tokens[0] if steps else tokens[row], together[row]), f"{count} unknown tokens"


@every_selector
def test_contract_the_same_seeds_give_the_same_tokens_and_others_others(spec):
    tokens = torch.full((2, NUM_TOKENS), MASK)
    first = run(tokens, decoder(spec), seeds=[3, 4])
    assert torch.equal(first[-1].tokens, run(tokens, decoder(spec), seeds=[3, 4])[-1].tokens)
    assert not torch.equal(first[-1].tokens[0], first[-1].tokens[1])


@every_selector
def test_contract_what_stays_decided_stays_as_it_is(spec):
    before, made = None, decoder(spec)
    for step in run(partly_known(MIXED), made):
        if before is not None:
            assert torch.equal(step.was_masked, before.still_masked)
            stays = torch.equal(step.tokens[~before.still_masked], before.tokens[~before.still_masked])
            assert stays or made.token_selector.replaces_decided
        before = step


@every_selector
def test_contract_the_confidence_is_that_of_the_last_draw(spec):
    tokens = partly_known(MIXED)
    expected = torch.ones(tokens.shape)
    state = tokens
    for step in run(tokens, decoder(spec)):
        everywhere = torch.arange(NUM_TOKENS).expand_as(state)
        probabilities = fake_predictor(state, everywhere).softmax(-1)
        drawn = probabilities.gather(-1, step.tokens.unsqueeze(-1)).squeeze(-1)
        expected = drawn.where(step.tokens != state, expected)
        torch.testing.assert_close(step.confidence, expected)
        state = step.tokens.masked_fill(step.still_masked, MASK)


@every_selector
def test_contract_a_late_start_leaves_the_first_steps_out(spec):
    steps = run(partly_known(MIXED), decoder(spec), first_step=2)
    assert steps[0].step == 2
    assert not steps[-1].still_masked.any()


def test_every_selector_says_where_it_comes_from():
    for name in token_selectors.names():
        text = type(token_selectors.build(name)).__doc__
        assert name == "random" or "Source:" in text, name


# Each on its own


def test_drawn_log_probs_are_those_of_the_codes_drawn():
    given = candidates()
    expected = [[given.log_probs[b, m, given.tokens[b, m]].item() for m in range(5)] for b in range(2)]
    assert given.drawn_log_probs.tolist() == expected


def test_entropies_are_those_of_torch_distributions():
    given = candidates()
    torch.testing.assert_close(given.entropies, torch.distributions.Categorical(logits=given.log_probs).entropy())


@pytest.mark.parametrize(("progress", "noise_scale"), [(0.25, 3.375), (0.5, 2.25), (1.0, 0.0)])
def test_confidence_adds_noise_that_fades_with_progress(progress, noise_scale):
    given = candidates(progress)
    expected = given.drawn_log_probs + noise_scale * given.gumbel
    torch.testing.assert_close(token_selectors.build("confidence")(given), expected)


def test_random_does_not_look_at_the_probabilities():
    given = candidates()
    other = replace(given, log_probs=given.log_probs * 3)
    select = token_selectors.build("random")
    assert torch.equal(select(given), select(other))
    assert select(given).unique().numel() == 10  # and tells all candidates apart


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (4, 4), (3, 8), (16, 16), (7, 5)])
def test_halton_visits_each_place_of_any_grid_once(grid):
    assert sorted(halton_order(grid)) == list(range(math.prod(grid)))


def test_halton_begins_with_the_radical_inverses_of_2_and_3():
    # (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9) of an 8 x 9 grid
    assert halton_order((8, 9))[:4] == [4 * 9 + 3, 2 * 9 + 6, 6 * 9 + 1, 1 * 9 + 4]


def test_halton_keeps_places_in_its_order_whatever_is_drawn_and_a_seed_begins_elsewhere():
    tokens = torch.full((2, NUM_TOKENS), MASK)
    orders = {}
    for seed in (None, 1, 2):
        steps = run(tokens, decoder({"name": "halton", "seed": seed}, NUM_TOKENS))
        kept = [(step.was_masked & ~step.still_masked).nonzero()[:, 1].tolist() for step in steps]
        assert all(first == second for first, second in kept)
        orders[seed] = [first for first, _ in kept]
    assert orders[None] == halton_order(GRID)
    assert len({tuple(order) for order in orders.values()}) == 3
    start = orders[None].index(orders[1][0])
    assert orders[None][start:] + orders[None][:start] == orders[1]


def test_entropy_keeps_the_most_tokens_whose_sum_without_the_largest_is_within_the_budget():
    probabilities = torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4, [1, 0, 0, 0], [0.5, 0.25, 0.25, 0]])
    log_probs = probabilities.log()[None]  # entropies: 1, 2, 0 and 1.5 bits
    given = Candidates(log_probs, torch.zeros(1, 4).long(), torch.arange(4)[None], torch.zeros(1, 4), 0.5)
    valid = torch.ones(1, 4, dtype=torch.bool)
    for bits, kept in ((0.0, 2), (0.99, 2), (1.01, 3), (2.49, 3), (2.51, 4)):
        selector = token_selectors.build({"name": "entropy", "gamma": bits * math.log(2)})
        assert selector.num_kept(given, selector(given), valid).tolist() == [kept], bits
    selector = token_selectors.build({"name": "entropy", "gamma": 100.0})
    assert selector.num_kept(given, selector(given), valid & (torch.arange(4) < 3)).tolist() == [3]  # padding is none


def test_entropy_with_a_large_budget_is_done_in_one_step_and_with_none_takes_them_all():
    tokens = torch.full((2, NUM_TOKENS), MASK)
    assert len(run(tokens, decoder({"name": "entropy", "gamma": 1e6}))) == 1
    assert len(run(tokens, decoder({"name": "entropy", "gamma": 0.0}, NUM_TOKENS))) == NUM_TOKENS


def test_moment_scores_and_sharpens_with_the_same_exponent():
    given = candidates(0.5)  # choice temperature 4 (1 - 0.5) = 2: exponent 1.5
    selector = token_selectors.build({"name": "moment", "choice_temperature": 4.0})
    expected = given.log_probs.exp().pow(1.5).sum(-1).log() + given.gumbel
    torch.testing.assert_close(selector(given), expected)
    assert selector.sharpness(0.5) == 1.5
    assert selector.sharpness(1.0) == 1.0


@pytest.mark.slow
def test_moment_is_what_confidence_tends_to():
    """Compares how often each (position, code) is kept, over many images."""
    images, temperature = 20_000, 1.0
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.4, 0.0]]).repeat(20, 1)  # 40 places: one of many is kept
    kept = {}
    for name in ("confidence", "moment"):
        spec = {"name": name, "choice_temperature": temperature / 0.5}
        made = DecodingConfig(2, spec, tokens_per_step=(1, 39)).build_decoder(mask_schedules.build("cosine"))
        noise = SeededNoise(torch.arange(images), 40, steps_at_once=1)
        predictor = lambda tokens, positions: logits[positions]  # noqa: E731
        steps = made.steps(predictor, torch.full((images, 40), 9), noise, mask_token_id=9)
        step = next(iter(steps))
        chosen = (step.was_masked & ~step.still_masked).nonzero()
        codes = step.tokens[~step.still_masked]
        kept[name] = torch.bincount((chosen[:, 1] % 2) * 3 + codes, minlength=6) / images
    moments = logits[:2].softmax(-1) ** 2  # exponent 1 + 1 / temperature
    torch.testing.assert_close(kept["moment"], (moments / moments.sum()).flatten(), atol=0.01, rtol=0)
    torch.testing.assert_close(kept["confidence"], kept["moment"], atol=0.02, rtol=0)


@pytest.mark.parametrize(("progress", "expected"), [(0.25, [-0.559438, -1.974353]), (0.75, [-1.259438, -0.774353])])
def test_margin_by_hand(progress, expected):
    log_probs = torch.tensor([[[0.5, 0.2, 0.3], [0.04, 0.06, 0.9]]]).log()
    gumbel = torch.tensor([[0.7, -1.2]])
    given = Candidates(log_probs, torch.tensor([[1, 0]]), torch.tensor([[0, 1]]), gumbel, progress)
    scores = token_selectors.build({"name": "margin", "choice_temperature": 2.0})(given)
    torch.testing.assert_close(scores, torch.tensor([expected]), atol=1e-5, rtol=0)  # log(0.2) and log(0.84), noise


@pytest.mark.parametrize(
    ("strategy", "early", "late"),  # of 10 decided tokens, with 6 and with 2 to be masked: sigma_max 0.6 and 0.2
    [("cap", 3, 2), ("rescale", 2, 1), ("confidence", 2, 1), ("loop", 3, 0)],
)
def test_remdm_by_hand(strategy, early, late):
    selector = token_selectors.build({"name": "remdm", "strategy": strategy, "eta": 0.3})
    assert selector.num_remasked(decided=10, planned=6, progress=0.45) == early
    assert selector.num_remasked(decided=10, planned=2, progress=0.95) == late
    assert selector.num_remasked(decided=0, planned=6, progress=0.5) == 0
    progress = torch.tensor([0.225, 0.45, 0.5, 0.95, 0.975, 1.0])
    looped = torch.tensor([0.45, 0.9, 0.9, 0.9, 0.95, 1.0])
    torch.testing.assert_close(selector.schedule_progress(progress), looped if strategy == "loop" else progress)


def test_remdm_masks_decided_tokens_again_as_many_as_its_strategy_says():
    def again(spec: dict) -> list[int]:
        steps = run(torch.full((1, NUM_TOKENS), MASK), decoder({"name": "remdm", **spec}))
        before, counts = None, []
        for step in steps:
            if before is not None:
                counts.append(int((step.still_masked & ~before.still_masked).sum()))
            before = step
        return counts

    masked = count_masked(decoder("confidence"), [24], NUM_TOKENS)
    decided = [24 - row[0] for row in masked[1:-1]]
    planned = [row[0] for row in masked[2:]]
    most = [min(1, after / done) for after, done in zip(planned, decided, strict=True)]
    assert again({"strategy": "cap", "eta": 0.3}) == [
        round(min(0.3, share) * done) for share, done in zip(most, decided, strict=True)
    ]
    rescaled = [round(0.5 * share * done) for share, done in zip(most, decided, strict=True)]
    assert again({"strategy": "rescale", "eta": 0.5}) == rescaled
    assert again({"strategy": "confidence", "eta": 0.5}) == rescaled
    assert again({"eta": 0.0}) == [0] * 7
    assert sum(rescaled) > 0


def test_remdm_without_masking_again_is_confidence():
    tokens = partly_known(MIXED)
    plain = run(tokens, decoder("confidence"))
    for step, expected in zip(run(tokens, decoder({"name": "remdm", "eta": 0.0})), plain, strict=True):
        assert torch.equal(step.tokens, expected.tokens)


def test_remdm_stands_still_in_its_loop_and_changes_tokens_there():
    spec = {"name": "remdm", "strategy": "loop", "eta": 0.3, "start": 0.3, "stop": 0.9, "hold": 0.7}
    made = decoder(spec, 20)
    counts = [row[0] for row in count_masked(made, [NUM_TOKENS], NUM_TOKENS)]
    held = int(NUM_TOKENS * math.cos(math.pi / 2 * 0.7))
    assert counts[6:18] == [held] * 12
    assert counts[-1] == 0
    steps = run(torch.full((1, NUM_TOKENS), MASK), made)
    assert not torch.equal(steps[6].still_masked, steps[10].still_masked)


def test_remdm_by_confidence_doubts_codes_that_were_unlikely_more():
    selector = token_selectors.build({"name": "remdm", "strategy": "confidence"})
    gumbel = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))
    confidence = torch.tensor([0.05, 0.95]).repeat(10_000)[None]
    order = selector.remasking_scores(Decided(confidence, gumbel, 0.5)).argsort(descending=True)[0, :2000]
    unlikely = int((order % 2 == 0).sum())
    assert unlikely > 1200
    other = token_selectors.build({"name": "remdm", "strategy": "cap"})
    assert torch.equal(other.remasking_scores(Decided(confidence, gumbel, 0.5)), gumbel)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "confidence", "choice_temperature": -0.1},
            r"'confidence': choice_temperature must be a number in \[0,",
        ),
        ({"name": "confidence", "choice_temperature": float("nan")}, "'confidence': choice_temperature .* finite"),
        ({"name": "margin", "choice_temperature": -1.0}, r"'margin': choice_temperature must be a number in \[0,"),
        ({"name": "moment", "choice_temperature": float("inf")}, "'moment': choice_temperature must be a finite"),
        ({"name": "entropy", "gamma": -1.0}, r"'entropy': gamma must be a number in \[0, 1000000\], got -1.0"),
        ({"name": "halton", "seed": -1}, r"'halton': seed must be an integer in \[0, 2\*\*32\), got -1"),
        ({"name": "remdm", "strategy": "lop"}, "'remdm'.strategy must be 'cap', .* got 'lop'; did you mean 'loop'"),
        ({"name": "remdm", "eta": 1.5}, r"'remdm': eta must be a number in \[0, 1\], got 1.5"),
        ({"name": "remdm", "start": 0.9, "stop": 0.5}, r"'remdm': stop must be a number in \(0.9, 1\), got 0.5"),
    ],
)
def test_numbers_out_of_range_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        token_selectors.build(spec)


def test_a_selector_of_ones_own_needs_one_method():
    class Own(TokenSelector):
        def __call__(self, candidates: Candidates) -> Tensor:
            return candidates.gumbel

    own = ParallelDecoder(mask_schedules.build("cosine"), Own(), num_steps=4)
    plain = ParallelDecoder(mask_schedules.build("cosine"), token_selectors.build("random"), num_steps=4)
    tokens = partly_known(MIXED)
    assert torch.equal(run(tokens, own)[-1].tokens, run(tokens, plain)[-1].tokens)


@dataclass(frozen=True)
class Greedy(TokenSelector):
    """A selector that keeps random tokens, records its noise, and masks all decided tokens again, and more."""

    noises: list[Tensor] = field(default_factory=list)

    def __call__(self, candidates: Candidates) -> Tensor:
        self.noises.append(candidates.gumbel)
        return candidates.gumbel

    def num_remasked(self, *, decided: int, planned: int, progress: float) -> int:
        return 10**6

    def remasking_scores(self, decided: Decided) -> Tensor:
        self.noises.append(decided.gumbel)
        return decided.gumbel


def test_every_step_has_noise_of_its_own_for_what_is_kept_and_what_is_doubted():
    selector, noise = Greedy(), SeededNoise(torch.arange(1), NUM_TOKENS)
    run(torch.full((1, NUM_TOKENS), MASK), ParallelDecoder(mask_schedules.build("cosine"), selector, num_steps=4))
    everywhere = torch.arange(NUM_TOKENS)[None]
    kept, (doubted, *_) = selector.noises[:2], selector.noises[2:]
    assert torch.equal(kept[0], noise.gumbel(everywhere, 0))
    assert torch.isin(kept[1], noise.gumbel(everywhere, 1)).all()
    assert torch.equal(doubted, noise.gumbel(everywhere, 1))


def test_a_selector_that_would_keep_none_keeps_one():
    @dataclass(frozen=True)
    class Reluctant(TokenSelector):
        follows_schedule: ClassVar[bool] = False

        def __call__(self, candidates: Candidates) -> Tensor:
            return candidates.gumbel

        def num_kept(self, candidates: Candidates, scores: Tensor, valid: Tensor) -> Tensor:
            return torch.zeros(len(scores), dtype=torch.int64)

    made = ParallelDecoder(mask_schedules.build("cosine"), Reluctant(), num_steps=5)
    counts = [int(step.still_masked.sum()) for step in run(torch.full((1, NUM_TOKENS), MASK), made)]
    assert counts == [23, 22, 21, 20, 0]


# Selectors that break the contract


NAN = float("nan")
CORRECTING = {"needs_decided_logits": True, "replaces_decided": True}
REMASKING = {"num_remasked": lambda self, **counts: 2}
OWN_COUNT = {"follows_schedule": False}
BROKEN = [
    ({"__call__": lambda self, c: c.drawn_log_probs * NAN}, "scores must be finite, got"),
    ({"__call__": lambda self, c: c.drawn_log_probs[:1]}, r"scores must be a float tensor of shape \(2, 4\)"),
    ({"__call__": lambda self, c: c.tokens}, "scores must be a float tensor"),
    ({"sharpness": lambda self, progress: NAN}, "sharpness at progress .* must be a finite number"),
    ({"schedule_progress": lambda self, p: 1 - p}, r"schedule_progress must lie in \(0, 1\] and never fall"),
    ({"schedule_progress": lambda self, p: p * 2}, r"schedule_progress must lie in \(0, 1\]"),
    ({"schedule_progress": lambda self, p: p[:1]}, "schedule_progress must be a float tensor"),
    ({"schedule_progress": lambda self, p: p * NAN}, "schedule_progress must be finite"),
    ({"num_remasked": lambda self, **counts: 2.5}, "num_remasked at progress .* must be an integer .* got 2.5"),
    (REMASKING | {"remasking_scores": lambda self, d: d.confidence[0]}, "remasking_scores must be a float tensor"),
    (REMASKING | {"remasking_scores": lambda self, d: d.confidence * NAN}, "remasking_scores must be finite"),
    (OWN_COUNT | {"num_kept": lambda self, c, s, v: 3}, r"num_kept must be an int64 tensor of shape \(2,\), got 3"),
    (OWN_COUNT | {"num_kept": lambda self, c, s, v: v.sum(1) / 2}, "num_kept must be an int64 tensor"),
    (CORRECTING | {"replacements": lambda self, c: c.tokens + 7}, r"replacements must be codes in \[0, "),
    (CORRECTING | {"replacements": lambda self, c: c.tokens.float()}, "replacements must be an int64 tensor"),
    (OWN_COUNT | CORRECTING, "follows_schedule must be True with needs_decided_logits"),
    ({"replaces_decided": True}, "needs_decided_logits must be True with replaces_decided"),
]


@dataclass(frozen=True)
class Given(TokenSelector):
    """A selector that returns scores of equal height, unless a subclass says otherwise."""

    def __call__(self, candidates):
        return torch.zeros(candidates.tokens.shape)


def selector(**methods: object) -> TokenSelector:
    """Returns a selector with other methods or attributes."""
    return dataclass(frozen=True)(type("Mine", (Given,), methods))()


@pytest.mark.parametrize(("methods", "message"), BROKEN)
def test_a_broken_result_is_refused_when_the_selector_is_built(methods, message):
    with pytest.raises(ValueError, match=f"token selector 'mine': {message}"):
        check_token_selector("mine", selector(**methods))


@pytest.mark.parametrize("methods", [REMASKING, OWN_COUNT, CORRECTING])
def test_a_missing_method_is_found_when_the_selector_is_built(methods):
    with pytest.raises(TypeError, match="Mine must define "):
        check_token_selector("mine", selector(**methods))


def test_scores_of_half_precision_are_accepted():
    check_token_selector("mine", selector(__call__=lambda self, c: c.drawn_log_probs.half()))
