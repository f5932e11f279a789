"""The decoding loop, with a predictor of three lines."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import (
    CodeSampling,
    ParallelDecoder,
    SeededNoise,
)
from maskgit_pl.decoding.selectors import Candidates, Confidence, TokenSelector
from maskgit_pl.schedules import mask_schedules
from tests.decoding.fakes import LOGITS, MASK, MIXED, NUM_CODES, decoder, fake_predictor, partly_known, run


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
    made = decoder(4, schedule="linear").count_masked([16, 9, 3, 1, 0], 16)
    assert [list(column) for column in zip(*made, strict=True)] == [
        [16, 12, 8, 4, 0],
        [9, 6, 4, 2, 0],
        [3, 2, 1, 1, 0],  # floor gives 0 at the third step: at least 1
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    made = decoder(8, schedule="exp").count_masked([16], 16)  # exp wants 14, 14, 13, 12: at most one less
    assert [row[0] for row in made] == [16, 14, 13, 12, 11, 10, 8, 4, 0]


def test_counts_of_a_late_start_follow_the_later_part_of_the_schedule():
    made = decoder(4, schedule="linear").count_masked([8], 16, first_step=2)
    assert made == [[8], [2], [0]]  # 8 * (1 - 3 / 4)


@pytest.mark.parametrize("first_step", [0, 2])
def test_the_steps_mask_as_many_tokens_as_planned(first_step):
    tokens = partly_known(MIXED)
    made = decoder(6)
    steps = run(tokens, made, first_step=first_step)
    planned = made.count_masked(MIXED, 16, first_step=first_step)
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
        (lambda: decoder(0), "num_steps must be >= 1, got 0"),
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


def test_sampling_temperature_0_takes_the_most_probable_code():
    def keep_all(tokens: Tensor, positions: Tensor) -> Tensor:
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
