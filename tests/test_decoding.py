import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import (
    ClassPredictor,
    CodeSampling,
    ConditionalModel,
    DecodingConfig,
    DecodingStep,
    FirstStepLogits,
    FirstStepPredictor,
    GuidedPredictor,
    ParallelDecoder,
    SeededNoise,
    class_predictor,
    decode_classes,
)
from maskgit_pl.decoding.predictors import guided
from maskgit_pl.decoding.selectors import Candidates, Confidence, Random, TokenSelector
from maskgit_pl.schedules import mask_schedules

NUM_CODES, MASK = 7, 7
CPU = torch.device("cpu")
LOGITS = torch.randn(64, NUM_CODES, generator=torch.Generator().manual_seed(0))


def fake_predictor(tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
    """Logits that depend on the position and on how many tokens are known."""
    known = (tokens != MASK).sum(1, keepdim=True)
    return LOGITS[(positions + known) % 64]


def decoder(num_steps: int = 5, *, schedule: str = "cosine", **options: object) -> ParallelDecoder:
    return ParallelDecoder(mask_schedules.build(schedule), Confidence(), num_steps=num_steps, **options)


def partly_known(unknown: list[int], num_tokens: int = 16) -> Tensor:
    """One row a number: so many unknown tokens, spread about."""
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(NUM_CODES, (len(unknown), num_tokens), generator=chance)
    for row, count in enumerate(unknown):
        tokens[row, torch.randperm(num_tokens, generator=chance)[:count]] = MASK
    return tokens


def run(
    tokens: Tensor, made: ParallelDecoder, predictor: object = fake_predictor, **options: int
) -> list[DecodingStep]:
    noise = SeededNoise(torch.arange(len(tokens)), tokens.shape[1])
    return list(made.steps(predictor, tokens, noise, mask_token_id=MASK, **options))


MIXED = [16, 9, 3, 1, 0]  # unknown tokens of the rows


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 16])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "log", "exp"])
def test_every_unknown_position_is_uncovered_exactly_once(schedule, num_steps):
    tokens = partly_known(MIXED)
    uncovered = sum(
        (step.was_masked & ~step.still_masked).int() for step in run(tokens, decoder(num_steps, schedule=schedule))
    )
    assert torch.equal(uncovered, (tokens == MASK).int())


def test_known_tokens_never_change_and_nothing_stays_masked():
    tokens = partly_known(MIXED)
    known = tokens != MASK
    for step in run(tokens, decoder()):
        assert torch.equal(step.tokens[known], tokens[known])
        assert not (step.was_masked & known).any()
        assert 0 <= step.tokens.min() <= step.tokens.max() < NUM_CODES
    assert not step.still_masked.any()


def test_a_token_that_was_kept_never_changes_again():
    before = None
    for step in run(partly_known(MIXED), decoder(8)):
        if before is not None:
            kept = ~before.still_masked
            assert torch.equal(step.tokens[kept], before.tokens[kept])
            assert torch.equal(step.was_masked, before.still_masked)
        before = step


def test_counts_follow_the_schedule_of_each_row_between_one_and_one_less_than_before():
    made = decoder(4, schedule="linear").masked_counts([16, 9, 3, 1, 0], 16)
    assert [list(column) for column in zip(*made, strict=True)] == [
        [16, 12, 8, 4, 0],
        [9, 6, 4, 2, 0],
        [3, 2, 1, 1, 0],  # floor gives 0 at the third step: at least 1
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    made = decoder(8, schedule="exp").masked_counts([16], 16)  # exp wants 14, 14, 13, 12: at most one less
    assert [row[0] for row in made] == [16, 14, 13, 12, 11, 10, 8, 4, 0]


def test_counts_of_a_late_start_follow_the_later_part_of_the_schedule():
    made = decoder(4, schedule="linear").masked_counts([8], 16, first_step=2)
    assert made == [[8], [2], [0]]  # 8 * (1 - 3 / 4)


@pytest.mark.parametrize("first_step", [0, 2])
def test_the_steps_mask_as_many_tokens_as_planned(first_step):
    tokens = partly_known(MIXED)
    made = decoder(6)
    steps = run(tokens, made, first_step=first_step)
    planned = made.masked_counts(MIXED, 16, first_step=first_step)
    assert [step.was_masked.sum(1).tolist() for step in steps] == planned[:-1]
    assert [step.still_masked.sum(1).tolist() for step in steps] == planned[1:]
    assert [step.step for step in steps] == list(range(first_step, 6))


def test_the_least_sure_are_masked_again():
    for step in run(partly_known(MIXED), decoder(6)):
        assert torch.equal(step.scores.isfinite(), step.was_masked)
        for row in range(len(MIXED)):
            kept = step.scores[row][~step.still_masked[row]]
            again = step.scores[row][step.still_masked[row]]
            assert again.numel() == 0 or again.max() <= kept.min()


def test_the_predictor_is_asked_at_masked_positions_alone_and_told_what_became_known():
    calls = []

    def spy(tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        calls.append((tokens, positions, newly_known))
        return fake_predictor(tokens, positions, newly_known)

    tokens = partly_known(MIXED)
    steps = run(tokens, decoder(6), spy)
    assert len(calls) == len(steps) == 6
    for (seen, positions, newly_known), step, last in zip(calls, steps, [None, *steps[:-1]], strict=True):
        assert torch.equal(seen == MASK, step.was_masked)
        assert positions.shape[1] == max(step.was_masked.sum(1).tolist())
        for row, masked in enumerate(step.was_masked):
            wanted = masked.nonzero().flatten().tolist()
            assert len(set(positions[row].tolist())) == positions.shape[1]  # no position twice
            assert sorted(positions[row][: len(wanted)].tolist()) == wanted  # padding is known
            if last is None:
                assert newly_known.shape == (len(MIXED), 0)
            else:
                decided = (last.was_masked & ~last.still_masked)[row].nonzero().flatten().tolist()
                told = set(newly_known[row].tolist())
                assert set(decided) <= told
                assert (seen[row][newly_known[row]] != MASK).all()


def test_logits_of_padding_are_ignored():
    def poisoned(tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        known = tokens.gather(1, positions) != MASK
        return fake_predictor(tokens, positions, newly_known).masked_fill(known.unsqueeze(-1), torch.nan)

    tokens = partly_known(MIXED)
    for clean, dirty in zip(run(tokens, decoder()), run(tokens, decoder(), poisoned), strict=True):
        assert torch.equal(clean.tokens, dirty.tokens)
        assert torch.equal(clean.scores, dirty.scores)


def test_rows_do_not_disturb_one_another():
    tokens = partly_known(MIXED)
    together = run(tokens, decoder())[-1].tokens
    for row, count in enumerate(MIXED):
        noise = SeededNoise(torch.tensor([row]), 16)
        alone = decoder().decode(fake_predictor, tokens[row : row + 1], noise, mask_token_id=MASK)
        assert torch.equal(alone[0], together[row]), f"row with {count} unknown tokens"


def test_decode_is_the_last_steps_draw():
    tokens = partly_known(MIXED)
    noise = SeededNoise(torch.arange(len(MIXED)), 16)
    made = decoder().decode(fake_predictor, tokens, noise, mask_token_id=MASK)
    assert torch.equal(made, run(tokens, decoder())[-1].tokens)


def test_nothing_is_predicted_where_nothing_is_masked():
    tokens = partly_known([0, 0])

    def refuse(*given: Tensor) -> Tensor:
        raise AssertionError("the predictor was called")

    assert run(tokens, decoder(), refuse) == []
    noise = SeededNoise(torch.arange(2), 16)
    assert torch.equal(decoder().decode(refuse, tokens, noise, mask_token_id=MASK), tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decoder(0), "num_steps: at least 1 is needed, got 0"),
        (lambda: decoder(sampling=CodeSampling(-1.0)), "sampling_temperature: a number of at least 0.* got -1.0"),
        (
            lambda: decoder(sampling=CodeSampling(float("nan"))),
            "sampling_temperature: a number of at least 0.* got nan",
        ),
        (lambda: run(partly_known([16]), decoder(17)), "num_steps: at most the 16 tokens of an image, got 17"),
        (lambda: run(partly_known([16]), decoder(4), first_step=4), r"first_step: a step in \[0, 4\) is needed, got 4"),
        (lambda: run(partly_known([16]), decoder(4), first_step=-1), r"first_step: a step in \[0, 4\) is needed"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_sampling_temperature_0_takes_the_most_probable_code():
    def keep_all(tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        return LOGITS[positions]

    made = run(partly_known([16, 5]), decoder(3, sampling=CodeSampling(0.0)), keep_all)
    for step in made:
        assert torch.equal(step.tokens[step.was_masked], LOGITS[:16].argmax(-1).repeat(2, 1)[step.was_masked])


def test_sampling_temperature_divides_the_drawn_logits_but_not_the_confidence():
    seen: dict[str, Tensor] = {}

    class Noise(SeededNoise):
        def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
            seen["drawn from"] = logits
            return super().draw(logits, positions, step)

    class Spy(TokenSelector):
        def __call__(self, candidates: Candidates) -> Tensor:
            seen["judged by"] = candidates.log_probs
            return candidates.drawn_log_probs

    made = ParallelDecoder(mask_schedules.build("cosine"), Spy(), num_steps=1, sampling=CodeSampling(0.5))
    made.decode(fake_predictor, partly_known([16]), Noise(torch.arange(1), 16), mask_token_id=MASK)
    torch.testing.assert_close(seen["drawn from"], 2 * LOGITS[:16].unsqueeze(0))
    torch.testing.assert_close(seen["judged by"], LOGITS[:16].log_softmax(-1).unsqueeze(0))


def test_a_list_says_how_many_tokens_each_step_decides():
    made = ParallelDecoder(mask_schedules.build("cosine"), Confidence(), num_steps=3, tokens_per_step=(1, 5, 10))
    steps = run(partly_known([16, 8, 3]), made)
    decided = [(step.was_masked & ~step.still_masked).sum(1).tolist() for step in steps]
    assert [row[0] for row in decided] == [1, 5, 10]
    assert [row[1] for row in decided] == [1, 2, 5]  # in proportion: 8 * 15 // 16 and 8 * 10 // 16 stay masked
    assert [row[2] for row in decided] == [1, 1, 1]  # at least one a step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_steps": 3, "tokens_per_step": (8, 8)},
            "tokens_per_step: a number for each of the 3 steps .* set num_steps to 2",
        ),
        ({"num_steps": 2, "tokens_per_step": (16, 0)}, "tokens_per_step: 2 numbers of at least 1 are needed"),
        (
            {"num_steps": 2, "tokens_per_step": (8, 9)},
            "numbers that sum to the 16 tokens of an image are needed, got 17",
        ),
        (
            {"num_steps": 2, "tokens_per_step": (8, 8), "token_selector": "entropy"},
            "tokens_per_step: token selector EntropyBounded decides itself how many to keep",
        ),
        ({"top_k": 0}, "top_k: at least 1 code is needed, got 0"),
        ({"top_p": 0.0}, r"top_p: a number in \(0, 1\] is needed, got 0.0"),
        ({"sampling_temperature": (1.0, -1.0)}, "sampling_temperature: .* two of them for the first and the last step"),
        ({"sampling_temperature": [1.0, 2.0, 3.0]}, "sampling_temperature: .* two of them"),
    ],
)
def test_a_configuration_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(partly_known([16]), DecodingConfig(**options).decoder(mask_schedules.build("cosine")))


# Sampling of codes


def test_the_temperature_goes_from_the_first_to_the_last_step():
    sampling = CodeSampling((2.0, 0.5))
    assert [sampling.temperature_at(step / 3) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert CodeSampling(0.7).temperature_at(0.3) == 0.7


def test_a_temperature_that_falls_to_0_takes_the_likeliest_code_at_the_last_step():
    made = decoder(3, sampling=CodeSampling((1.0, 0.0)))
    *_, last = run(partly_known([16]), made, lambda tokens, positions, newly_known: LOGITS[positions])
    assert torch.equal(last.tokens[last.was_masked], LOGITS[:16].argmax(-1)[last.was_masked[0]])


def test_top_k_leaves_the_likeliest_codes_alone():
    made = CodeSampling(top_k=2).truncated(LOGITS)
    assert torch.equal(made.isfinite().sum(-1), torch.full((64,), 2))
    assert torch.equal(made.argmax(-1), LOGITS.argmax(-1))
    assert torch.equal(CodeSampling(top_k=99).truncated(LOGITS), LOGITS)


def test_top_p_leaves_the_fewest_codes_that_reach_the_probability():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]).log()
    for top_p, kept in ((0.4, [1, 1]), (0.6, [2, 1]), (0.8, [3, 1]), (0.985, [4, 3]), (1.0, [4, 4])):
        made = CodeSampling(top_p=top_p).truncated(logits)
        assert made.isfinite().sum(-1).tolist() == kept, top_p
        assert torch.equal(made.where(made.isfinite(), logits), logits)


def test_top_k_and_top_p_are_taken_one_after_the_other():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()  # of the two likeliest the first alone has 2 / 3
    assert CodeSampling(top_k=2, top_p=0.6).truncated(logits).isfinite().tolist() == [[False, True, False, False]]


def test_only_codes_that_are_left_are_drawn():
    made = decoder(4, sampling=CodeSampling(top_k=1))
    for step in run(partly_known([16, 5]), made, lambda tokens, positions, newly_known: LOGITS[positions]):
        assert torch.equal(step.tokens[step.was_masked], LOGITS[:16].argmax(-1).repeat(2, 1)[step.was_masked])


# Seeded noise


def test_noise_is_the_same_however_many_steps_are_made_at_once():
    positions = torch.arange(16).repeat(2, 1)
    logits = LOGITS[:16].expand(2, -1, -1)
    one, many = (SeededNoise(torch.tensor([4, 5]), 16, steps_at_once=count) for count in (1, 8))
    for step in (0, 7, 8, 3, 20):
        assert torch.equal(one.gumbel(positions, step), many.gumbel(positions, step))
        assert torch.equal(one.draw(logits, positions, step), many.draw(logits, positions, step))


def test_draws_follow_the_softmax():
    images, logits = 20_000, torch.tensor([0.0, 1.0, -2.0, 3.0, 2.5])
    noise = SeededNoise(torch.arange(images), 3)
    drawn = noise.draw(logits.expand(images, 3, -1), torch.arange(3).expand(images, -1), step=0)
    expected = images * logits.softmax(-1)
    for position in range(3):
        counts = torch.bincount(drawn[:, position], minlength=5)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 25  # 4 degrees of freedom: one in 20,000


def test_an_impossible_code_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(5000, 1, -1)
    drawn = SeededNoise(torch.arange(5000), 1).draw(logits, torch.zeros(5000, 1, dtype=torch.int64), step=0)
    assert drawn.unique().tolist() == [1, 3]


def test_noise_belongs_to_image_step_and_position():
    noise = SeededNoise(torch.tensor([4, 5]), 16)
    every = noise.gumbel(torch.arange(16).repeat(2, 1), step=3)
    asked = torch.tensor([[9, 2], [2, 15]])
    assert torch.equal(noise.gumbel(asked, step=3), every.gather(1, asked))  # whatever else is asked
    assert torch.equal(SeededNoise(torch.tensor([5]), 16).gumbel(asked[1:], step=3), every[1:].gather(1, asked[1:]))
    logits = LOGITS[:16].expand(2, -1, -1)
    codes = noise.draw(logits, torch.arange(16).repeat(2, 1), step=3)
    assert torch.equal(noise.draw(logits[0][asked], asked, step=3), codes.gather(1, asked))
    assert every.unique().numel() == 32
    assert not torch.isin(noise.gumbel(torch.arange(16).repeat(2, 1), step=4), every).any()


def test_codes_and_choices_have_noise_of_their_own():
    noise = SeededNoise(torch.arange(2000), 1)
    zeros = torch.zeros(2000, 1, dtype=torch.int64)
    drawn = noise.draw(torch.zeros(2000, 1, 100), zeros, step=0).flatten().float()
    correlation = torch.corrcoef(torch.stack([drawn, noise.gumbel(zeros, step=0).flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.1


# Predictors that ask a network


@dataclass
class Network:
    """Exact in any batch: gathers and sums alone. Label 3 is the null class. Remembers the labels of each call."""

    labels: list[list[int]] = field(default_factory=list)

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        self.labels.append(labels.tolist())
        known = (tokens.sum(1, keepdim=True) * 5) % 64
        return LOGITS[(positions + known) % 64] + 2 * LOGITS[labels + 50].unsqueeze(1)


ONE = (torch.full((2, 4), MASK), torch.tensor([[0, 3], [1, 2]]), torch.empty(2, 0, dtype=torch.int64))


def test_guided_logits_are_the_formula_worked_out_by_hand():
    network = Network()
    conditional = network.forward_at(ONE[0], torch.tensor([0, 2]), ONE[1])
    unconditional = network.forward_at(ONE[0], torch.tensor([3, 3]), ONE[1])
    guided = GuidedPredictor(network, torch.tensor([0, 2]), negative_labels=torch.tensor([3, 3]), scales=[1.5])(*ONE)
    torch.testing.assert_close(guided, 2.5 * conditional - 1.5 * unconditional)
    assert network.labels[2:] == [[0, 2, 3, 3]]  # one batched forward


def test_guidance_of_scale_0_makes_one_conditional_forward():
    network = Network()
    predictor = GuidedPredictor(
        network, torch.tensor([0, 2]), negative_labels=torch.tensor([3, 3]), scales=[0.0, 2.0, 0.0]
    )
    made = [predictor(*ONE) for _ in range(3)]
    assert network.labels == [[0, 2], [0, 2, 3, 3], [0, 2]]
    assert torch.equal(made[0], network.forward_at(ONE[0], torch.tensor([0, 2]), ONE[1]))
    assert not torch.equal(made[1], made[0])


def test_the_plain_predictor_makes_one_forward_with_the_classes():
    network = Network()
    assert torch.equal(
        ClassPredictor(network, torch.tensor([1, 0]))(*ONE), network.forward_at(ONE[0], torch.tensor([1, 0]), ONE[1])
    )
    assert network.labels == [[1, 0]] * 2


def model(network: Network, *, null_label: int | None = 3, **options: object) -> ConditionalModel:
    return ConditionalModel(network, (4, 4), MASK, null_label, CPU, **options)


def decoded(
    labels: list[int],
    seeds: list[int],
    *,
    scales: tuple[float, ...] = (0.0,) * 5,
    network: Network | None = None,
    kept: FirstStepLogits | None = None,
    **options: object,
):
    return [
        step.tokens
        for step in decode_classes(
            model(network or Network(), first_step_logits=kept),
            labels,
            seeds,
            decoder=decoder(len(scales)),
            scales=scales,
            **options,
        )
    ]


@pytest.mark.parametrize(
    "scales",
    [(0.0,) * 5, (2.0,) * 5, (0.0, 1.0, 2.0, 3.0, 4.0), (4.0, 3.0, 2.0, 1.0, 0.0)],
    ids=["none", "all", "rising", "falling"],
)
def test_sharing_the_first_step_changes_no_token_and_saves_rows(scales):
    labels, seeds = [2, 0, 2, 2, 0], [5, 6, 7, 8, 9]
    network = Network()
    shared = decoded(labels, seeds, scales=scales, network=network)
    everything = class_predictor(model(Network()), labels, scales=scales)
    assert not isinstance(everything, FirstStepPredictor)
    tokens = torch.full((5, 16), MASK)
    plain = decoder(5).steps(everything, tokens, SeededNoise(torch.tensor(seeds), 16), mask_token_id=MASK)
    for step, expected in zip(shared, plain, strict=True):
        assert torch.equal(step, expected.tokens)
    assert network.labels[0] == ([0, 2, 3] if scales[0] > 0 else [0, 2])  # each class once, the null class too
    assert network.labels[1] == labels + [3] * 5 * (scales[1] > 0)
    assert len(network.labels) == 5


def test_the_first_step_of_a_class_is_computed_once_for_all_runs_until_it_is_cleared():
    network = Network()
    kept = FirstStepLogits(network, num_tokens=16, mask_token_id=MASK, max_labels=2)
    alone = decoded([2, 0], [5, 6])
    for _ in range(2):
        assert all(map(torch.equal, decoded([2, 0], [5, 6], network=network, kept=kept), alone))
    assert network.labels.count([0, 2]) == 1
    kept([1], device=CPU)  # the third class takes the place of the one that was asked for longest ago
    assert torch.equal(
        kept([0], device=CPU),
        Network().forward_at(torch.full((1, 16), MASK), torch.tensor([0]), torch.arange(16)[None]),
    )
    assert network.labels[-1] == [1]
    kept([2], device=CPU)
    assert network.labels[-1] == [2]
    kept.clear()
    kept([2], device=CPU)
    assert network.labels[-2:] == [[2], [2]]


def test_known_tokens_at_the_start_leave_the_first_step_alone():
    network = Network()
    decoded([0, 0], [1, 2], network=network, tokens=partly_known([16, 9]))
    assert network.labels[0] == [0, 0]


def test_a_late_start_takes_the_later_scales_and_steps():
    scales, tokens = (4.0, 3.0, 2.0, 1.0, 0.5), partly_known([9, 5])
    late = decoded([2, 0], [5, 6], scales=scales, tokens=tokens, first_step=2)
    predictor = class_predictor(model(Network()), [2, 0], scales=scales[2:])
    noise = SeededNoise(torch.tensor([5, 6]), 16)
    expected = list(decoder(5).steps(predictor, tokens, noise, mask_token_id=MASK, first_step=2))
    assert len(late) == len(expected) == 3
    assert all(torch.equal(step, wanted.tokens) for step, wanted in zip(late, expected, strict=True))


def test_named_negative_classes_take_the_place_of_the_null_class():
    network = Network()
    decoded([2, 0], [5, 6], scales=(1.0,) * 5, network=network, negative_labels=[1, 2])
    assert network.labels == [[0, 1, 2], *[[2, 0, 1, 2]] * 4]


def test_selectors_are_told_the_grid_and_a_context_cache_needs_a_network_that_caches():
    @dataclass(frozen=True)
    class Spy(TokenSelector):
        grids: list[tuple[int, int] | None] = field(default_factory=list)

        def __call__(self, candidates: Candidates) -> Tensor:
            self.grids.append(candidates.grid)
            return candidates.gumbel

    spy = Spy()
    oblong = replace(model(Network()), grid=(2, 8))
    made = ParallelDecoder(mask_schedules.build("cosine"), spy, num_steps=2)
    list(decode_classes(oblong, [0], [1], decoder=made, scales=(0.0,) * 2))
    assert spy.grids == [(2, 8)] * 2
    with pytest.raises(TypeError, match="context_cache above 1 must have a network that keeps keys and values"):
        list(decode_classes(replace(oblong, context_cache=2), [0], [1], decoder=made, scales=(0.0,) * 2))


def test_a_batch_of_four_is_four_batches_of_one():
    labels, seeds = [2, 0, 2, 1], [7, 8, 9, 7]
    together = decoded(labels, seeds, scales=(0.0, 1.0, 2.0))[-1]
    alone = [decoded([label], [seed], scales=(0.0, 1.0, 2.0))[-1] for label, seed in zip(labels, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_the_same_seed_gives_the_same_image_and_another_seed_another():
    first, second = decoded([1, 1, 1], [7, 8, 7])[-1], decoded([1, 1, 1], [7, 8, 7])[-1]
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])


def test_guidance_without_a_null_class_is_refused_and_scale_0_is_not():
    with pytest.raises(ValueError, match="guidance: this model has no null class"):
        class_predictor(model(Network(), null_label=None), [0], scales=[0.0, 1.0])
    assert isinstance(class_predictor(model(Network(), null_label=None), [0], scales=[0.0, 0.0]), ClassPredictor)


def test_guidance_may_push_away_from_another_class_without_a_null_class():
    network = Network()
    made = class_predictor(model(network, null_label=None), [0, 2], negative_labels=[1, 1], scales=[1.5])(*ONE)
    conditional, other = (Network().forward_at(ONE[0], torch.tensor(labels), ONE[1]) for labels in ([0, 2], [1, 1]))
    torch.testing.assert_close(made, 2.5 * conditional - 1.5 * other)
    assert network.labels == [[0, 2, 1, 1]]


def test_the_guided_distribution_is_normalised_at_each_position():
    conditional, unconditional = LOGITS[:8].softmax(-1), LOGITS[8:16].softmax(-1)
    expected = conditional**2.5 * unconditional**-1.5
    made = guided(LOGITS[:8], LOGITS[8:16], 1.5).softmax(-1)
    torch.testing.assert_close(made, expected / expected.sum(-1, keepdim=True))


def test_a_config_makes_the_decoder_around_the_schedule_object_it_is_given():
    config = DecodingConfig(
        num_steps=3, token_selector="random", guidance={"name": "linear", "scale": 4.0}, sampling_temperature=0.9
    )
    gamma = mask_schedules.build("square")
    made = config.decoder(gamma)
    assert made.mask_schedule is gamma
    assert made == ParallelDecoder(gamma, Random(), num_steps=3, sampling=CodeSampling(0.9))
    assert config.scales() == (0.0, 2.0, 4.0)
    own = DecodingConfig(mask_schedule={"name": "pow", "exponent": 3.0}).decoder(gamma)
    assert own.mask_schedule == mask_schedules.build({"name": "pow", "exponent": 3.0})


def test_a_config_comes_back_from_json_equal():
    config = DecodingConfig(3, sampling_temperature=(1.0, 0.5), tokens_per_step=(1, 5, 10), top_k=3)
    assert DecodingConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_a_config_with_an_unknown_selector_or_guidance_is_refused():
    with pytest.raises(ValueError, match="unknown token selector 'confident': did you mean 'confidence'"):
        DecodingConfig(token_selector="confident").decoder(mask_schedules.build("cosine"))
    with pytest.raises(ValueError, match="unknown guidance schedule 'line'"):
        DecodingConfig(guidance="line").scales()
