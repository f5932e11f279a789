"""The decoding loop, with a predictor of three lines.

Class-conditional decoding: guidance, the shared first step, seeds.

Self-correction: decided tokens compete with new draws, or are replaced in place; plain selectors pay nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import (
    ClassPredictor,
    CodeSampling,
    ConditionalModel,
    DecodingConfig,
    FirstStepLogits,
    FirstStepPredictor,
    GuidedPredictor,
    ParallelDecoder,
    SeededNoise,
    build_class_predictor,
    decode_classes,
)
from maskgit_pl.decoding.decoder import count_after
from maskgit_pl.decoding.selectors import Candidates, Confidence, TokenSelector, token_selectors
from maskgit_pl.schedules import mask_schedules
from tests.decoding.fakes import (
    CPU,
    LOGITS,
    MASK,
    MIXED,
    NUM_CODES,
    count_masked,
    decoder,
    fake_predictor,
    partly_known,
    run,
)


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


def test_counts_follow_the_schedule_of_each_row_between_one_and_one_less_than_before():
    made = count_masked(decoder(4, schedule="linear"), [16, 9, 3, 1, 0])
    assert [list(column) for column in zip(*made, strict=True)] == [
        [16, 12, 8, 4, 0],
        [9, 6, 4, 2, 0],
        [3, 2, 1, 1, 0],  # floor gives 0 at the third step: at least 1
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    made = count_masked(decoder(8, schedule="exp"), [16])  # exp wants 14, 14, 13, 12: at most one less
    assert [row[0] for row in made] == [16, 14, 13, 12, 11, 10, 8, 4, 0]


def test_counts_of_a_late_start_follow_the_later_part_of_the_schedule():
    made = count_masked(decoder(4, schedule="linear"), [8], first_step=2)
    assert made == [[8], [2], [0]]  # 8 * (1 - 3 / 4)


def test_a_list_counts_in_proportion_to_what_is_unknown():
    assert count_masked(decoder(3, tokens_per_step=(1, 5, 10)), [16, 8, 3])[1:] == [[15, 7, 2], [10, 5, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("masked", "planned", "remasked", "expected"),
    [
        (8, 5, 0, (5, 0)),
        (8, 8, 0, (7, 0)),  # one of those drawn is kept
        (8, 0, 0, (1, 0)),  # the next step has something to decide
        (1, 0, 0, (1, 0)),
        (0, 0, 0, (0, 0)),  # a row that is done stays done
        (8, 5, 3, (5, 3)),  # the number masked follows the plan: three more candidates are kept
        (8, 8, 3, (8, 3)),
        (4, 9, 3, (4, 3)),  # never more than before
        (4, 1, 3, (3, 3)),  # what is masked again is masked
        (2, 1, 5, (2, 2)),
        (0, 3, 2, (0, 0)),
    ],
)
def test_what_stays_masked_is_bounded_on_both_sides(masked, planned, remasked, expected):
    assert count_after(masked, planned, remasked) == expected


class Asked(Confidence):
    """A selector that would mask all decided tokens again, and keeps what it is asked."""

    asked: ClassVar[list] = []

    def num_remasked(self, **counts):
        self.asked.append(tuple(counts.values()))
        return 99


def test_a_selector_is_asked_with_what_is_decided_and_cannot_mask_more_than_that():
    plan = ParallelDecoder(mask_schedules.build("linear"), Asked(), num_steps=4).plan([8], 16)
    assert Asked.asked == [(0, 6, 0.25), (2, 4, 0.5), (4, 2, 0.75)]  # not at the last step
    assert [(counts.after, counts.remasked, counts.undecided) for counts in plan] == [
        ([6], [0], [6]),
        ([4], [2], [2]),
        ([4], [4], [0]),
        ([0], [0], [0]),
    ]


@pytest.mark.parametrize("first_step", [0, 2])
def test_the_steps_mask_as_many_tokens_as_planned(first_step):
    tokens = partly_known(MIXED)
    made = decoder(6)
    steps = run(tokens, made, first_step=first_step)
    planned = count_masked(made, MIXED, first_step=first_step)
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


def test_the_predictor_is_asked_at_masked_positions_alone():
    calls = []

    def spy(tokens: Tensor, positions: Tensor) -> Tensor:
        calls.append((tokens, positions))
        return fake_predictor(tokens, positions)

    tokens = partly_known(MIXED)
    steps = run(tokens, decoder(6), spy)
    assert len(calls) == len(steps) == 6
    for (seen, positions), step in zip(calls, steps, strict=True):
        assert torch.equal(seen == MASK, step.was_masked)
        assert positions.shape[1] == max(step.was_masked.sum(1).tolist())
        for row, masked in enumerate(step.was_masked):
            wanted = masked.nonzero().flatten().tolist()
            assert len(set(positions[row].tolist())) == positions.shape[1]  # no position twice
            assert sorted(positions[row][: len(wanted)].tolist()) == wanted  # padding is known


def test_logits_of_padding_are_ignored():
    def poisoned(tokens: Tensor, positions: Tensor) -> Tensor:
        known = tokens.gather(1, positions) != MASK
        return fake_predictor(tokens, positions).masked_fill(known.unsqueeze(-1), torch.nan)

    tokens = partly_known(MIXED)
    for clean, dirty in zip(run(tokens, decoder()), run(tokens, decoder(), poisoned), strict=True):
        assert torch.equal(clean.tokens, dirty.tokens)
        assert torch.equal(clean.scores, dirty.scores)


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
        (lambda: decoder(0), r"num_steps must be an integer in \[1, inf\), got 0"),
        (lambda: decoder(sampling=CodeSampling(-1.0)), "sampling_temperature must be a number in .* got -1.0"),
        (
            lambda: decoder(sampling=CodeSampling(float("nan"))),
            "sampling_temperature must be a finite number in .* got nan",
        ),
        (lambda: run(partly_known([16]), decoder(17)), "num_steps must be <= 16, the tokens per image, got 17"),
        (lambda: run(partly_known([16]), decoder(4), first_step=4), r"first_step must be in \[0, 4\), got 4"),
        (lambda: run(partly_known([16]), decoder(4), first_step=-1), r"first_step must be in \[0, 4\), got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


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


@dataclass
class Network:
    """A network of gathers and sums, exact in any batch, that records all labels. Label 3 is the null class."""

    labels: list[list[int]] = field(default_factory=list)

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        self.labels.append(labels.tolist())
        known = (tokens.sum(1, keepdim=True) * 5) % 64
        return LOGITS[(positions + known) % 64] + 2 * LOGITS[labels + 50].unsqueeze(1)


ONE = (torch.full((2, 4), MASK), torch.tensor([[0, 3], [1, 2]]))


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
    everything = build_class_predictor(model(Network()), labels, scales=scales)
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


@pytest.mark.parametrize(("size", "kept"), [(2**26, 4), (2**27, 2), (2**30, 1)])
def test_fewer_classes_are_kept_if_their_logits_are_large(size, kept):
    class Large(Network):
        def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
            self.labels.append(labels.tolist())
            return torch.empty(len(labels), positions.shape[1], size // 16, device="meta")

    network = Large()
    cache = FirstStepLogits(network, num_tokens=16, mask_token_id=MASK)
    for label in (*range(5), *range(5 - kept, 5), 4 - kept):
        cache([label], device=CPU)
    assert network.labels == [[0], [1], [2], [3], [4], [4 - kept]]


def test_known_tokens_at_the_start_leave_the_first_step_alone():
    network = Network()
    decoded([0, 0], [1, 2], network=network, tokens=partly_known([16, 9]))
    assert network.labels[0] == [0, 0]


def test_a_late_start_takes_the_later_scales_and_steps():
    scales, tokens = (4.0, 3.0, 2.0, 1.0, 0.5), partly_known([9, 5])
    late = decoded([2, 0], [5, 6], scales=scales, tokens=tokens, first_step=2)
    predictor = build_class_predictor(model(Network()), [2, 0], scales=scales[2:])
    noise = SeededNoise(torch.tensor([5, 6]), 16)
    expected = list(decoder(5).steps(predictor, tokens, noise, mask_token_id=MASK, first_step=2))
    assert len(late) == len(expected) == 3
    assert all(torch.equal(step, wanted.tokens) for step, wanted in zip(late, expected, strict=True))


def test_named_negative_classes_take_the_place_of_the_null_class():
    network = Network()
    decoded([2, 0], [5, 6], scales=(1.0,) * 5, network=network, negative_labels=[1, 2])
    assert network.labels == [[0, 1, 2], *[[2, 0, 1, 2]] * 4]


def test_selectors_are_told_the_grid():
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


def test_a_batch_of_four_is_four_batches_of_one():
    labels, seeds = [2, 0, 2, 1], [7, 8, 9, 7]
    together = decoded(labels, seeds, scales=(0.0, 1.0, 2.0))[-1]
    alone = [decoded([label], [seed], scales=(0.0, 1.0, 2.0))[-1] for label, seed in zip(labels, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_guidance_without_a_null_class_is_refused_and_scale_0_is_not():
    with pytest.raises(ValueError, match="guidance must have scale 0 for a model that has no null class"):
        build_class_predictor(model(Network(), null_label=None), [0], scales=[0.0, 1.0])
    assert isinstance(build_class_predictor(model(Network(), null_label=None), [0], scales=[0.0, 0.0]), ClassPredictor)


def test_guidance_may_push_away_from_another_class_without_a_null_class():
    network = Network()
    made = build_class_predictor(model(network, null_label=None), [0, 2], negative_labels=[1, 1], scales=[1.5])(*ONE)
    conditional, other = (Network().forward_at(ONE[0], torch.tensor(labels), ONE[1]) for labels in ([0, 2], [1, 1]))
    torch.testing.assert_close(made, 2.5 * conditional - 1.5 * other)
    assert network.labels == [[0, 2, 1, 1]]


P2 = {"name": "p2", "choice_temperature": 0.0}
EDIT = {"name": "edit", "choice_temperature": 0.0}
CONFIDENCE = {"name": "confidence", "choice_temperature": 0.0}
PLACE, WRONG, RIGHT = 6, 2, 5


@dataclass
class Misled:
    """A predictor that is sure of the right code everywhere, except that its first call is surest of a wrong one."""

    shapes: list[int] = field(default_factory=list)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits = torch.zeros(*positions.shape, NUM_CODES)
        logits[..., RIGHT] = 6.0
        if not self.shapes:
            logits[positions == PLACE] = torch.eye(NUM_CODES)[WRONG] * 30
        self.shapes.append(positions.shape[1])
        return logits


def correcting_decoder(spec: object, num_steps: int = 6, **options: object):
    return DecodingConfig(num_steps, spec, **options).build_decoder(mask_schedules.build("cosine"))


def at_place(spec: object) -> list[tuple[int, bool]]:
    """The code at PLACE after each draw, and whether it was masked before."""
    steps = run(torch.full((1, 16), MASK), correcting_decoder(spec), Misled())
    return [(int(step.tokens[0, PLACE]), bool(step.was_masked[0, PLACE])) for step in steps]


def test_a_wrong_token_stays_with_confidence():
    assert [code for code, _ in at_place(CONFIDENCE)] == [WRONG] * 6


def test_p2_masks_a_wrong_token_again_and_draws_the_right_one():
    found = at_place(P2)
    assert found[0] == (WRONG, True)
    assert found[1] == (WRONG, False)  # judged, and masked
    assert found[2] == (RIGHT, True)
    assert {code for code, _ in found[2:]} == {RIGHT}


def test_edit_replaces_a_wrong_token_in_place():
    found = at_place(EDIT)
    assert found[0] == (WRONG, True)
    assert found[1] == (RIGHT, False)
    assert {code for code, _ in found[1:]} == {RIGHT}


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ({**P2, "penalty": 0.0}, CONFIDENCE),  # all decided tokens have the highest score
        ({"name": "edit", "choice_temperature": 3.0, "threshold": 1.0}, {**CONFIDENCE, "choice_temperature": 3.0}),
    ],
    ids=["p2", "edit"],
)
def test_without_corrections_the_tokens_are_those_of_confidence(spec, plain):
    tokens = partly_known(MIXED)
    for mine, other in zip(run(tokens, correcting_decoder(spec)), run(tokens, correcting_decoder(plain)), strict=True):
        assert torch.equal(mine.tokens, other.tokens)
        assert torch.equal(mine.still_masked, other.still_masked)
        assert torch.equal(mine.confidence, other.confidence)
        assert torch.equal(mine.scores, other.scores)


@pytest.mark.parametrize("name", [name for name in token_selectors.names() if name != "entropy"])
def test_only_selectors_that_ask_for_it_pay_for_decided_tokens(name):
    predictor, made = Misled(), correcting_decoder(name)
    noise = SeededNoise(torch.arange(2), 16)
    list(made.steps(predictor, torch.full((2, 16), MASK), noise, mask_token_id=MASK, grid=(4, 4)))
    counts = [before for (before, _) in count_masked(made, [16, 16])[:-1]]
    assert predictor.shapes == ([16] * 6 if made.token_selector.needs_decided_logits else counts)


def test_a_decided_code_that_became_impossible_gets_a_finite_score():
    log_probs = torch.tensor([[[0.0, -torch.inf]]])
    given = Candidates(
        log_probs, torch.ones(1, 1).long(), torch.zeros(1, 1).long(), torch.zeros(1, 1), 0.5, None, torch.ones(1, 1) > 0
    )
    assert token_selectors.build("p2")(given).isfinite().all()


# The noise, which is seeded per image

METHODS = ["gumbel", "inverse_cdf"]


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_the_same_however_many_steps_are_made_at_once(method):
    positions = torch.arange(16).repeat(2, 1)
    logits = LOGITS[:16].expand(2, -1, -1)
    one, many = (SeededNoise(torch.tensor([4, 5]), 16, count, method) for count in (1, 8))
    for step in (0, 7, 8, 3, 20):
        assert torch.equal(one.gumbel(positions, step), many.gumbel(positions, step))
        assert torch.equal(one.draw(logits, positions, step), many.draw(logits, positions, step))


@pytest.mark.parametrize("method", METHODS)
def test_draws_follow_the_softmax(method):
    images, logits = 20_000, torch.tensor([0.0, 1.0, -2.0, 3.0, 2.5])
    noise = SeededNoise(torch.arange(images), 3, method=method)
    drawn = noise.draw(logits.expand(images, 3, -1), torch.arange(3).expand(images, -1), step=0)
    expected = images * logits.softmax(-1)
    for position in range(3):
        counts = torch.bincount(drawn[:, position], minlength=5)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 25  # 4 degrees of freedom: one in 20,000


@pytest.mark.parametrize("method", METHODS)
def test_an_impossible_code_is_never_drawn(method):
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(5000, 1, -1)
    drawn = SeededNoise(torch.arange(5000), 1, method=method).draw(
        logits, torch.zeros(5000, 1, dtype=torch.int64), step=0
    )
    assert drawn.unique().tolist() == [1, 3]


@pytest.mark.parametrize("method", METHODS)
def test_noise_belongs_to_image_step_and_position(method):
    noise = SeededNoise(torch.tensor([4, 5]), 16, method=method)
    every = noise.gumbel(torch.arange(16).repeat(2, 1), step=3)
    asked = torch.tensor([[9, 2], [2, 15]])
    assert torch.equal(noise.gumbel(asked, step=3), every.gather(1, asked))  # the other positions change nothing
    assert torch.equal(SeededNoise(torch.tensor([5]), 16).gumbel(asked[1:], step=3), every[1:].gather(1, asked[1:]))
    logits = LOGITS[:16].expand(2, -1, -1)
    codes = noise.draw(logits, torch.arange(16).repeat(2, 1), step=3)
    assert torch.equal(noise.draw(logits[0][asked], asked, step=3), codes.gather(1, asked))
    assert every.unique().numel() == 32
    assert not torch.isin(noise.gumbel(torch.arange(16).repeat(2, 1), step=4), every).any()


@pytest.mark.parametrize("method", METHODS)
def test_codes_and_choices_have_noise_of_their_own(method):
    noise = SeededNoise(torch.arange(2000), 1, method=method)
    zeros = torch.zeros(2000, 1, dtype=torch.int64)
    drawn = noise.draw(torch.zeros(2000, 1, 100), zeros, step=0).flatten().float()
    correlation = torch.corrcoef(torch.stack([drawn, noise.gumbel(zeros, step=0).flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.1


def test_a_small_change_of_the_logits_changes_few_draws():
    """The bound of Gumbel-max sampling: P(change) <= 2 TV / (1 + TV), with TV the total variation distance."""
    images = 4000
    logits = 3 * torch.randn(images, 1, 256, generator=torch.Generator().manual_seed(0))
    rounded = logits.bfloat16().float()
    noise, zeros = SeededNoise(torch.arange(images), 1, method="gumbel"), torch.zeros(images, 1, dtype=torch.int64)
    changed = (noise.draw(logits, zeros, step=0) != noise.draw(rounded, zeros, step=0)).float().mean()
    distance = (logits.softmax(-1) - rounded.softmax(-1)).abs().sum(-1).mean() / 2
    assert 0 < changed < 2 * distance / (1 + distance) + 0.003
