"""Results of a selector or a schedule that break their contract are refused, when it is built or when it decodes."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from maskgit_pl.decoding import ParallelDecoder, SeededNoise
from maskgit_pl.decoding.selectors import TokenSelector
from maskgit_pl.decoding.token_selector import CheckedSelector, check_token_selector
from maskgit_pl.schedules import MaskSchedule, check_mask_schedule, mask_schedules

NUM_CODES, MASK, NUM_TOKENS = 7, 7, 24


@dataclass(frozen=True)
class Given(TokenSelector):
    """A selector that returns scores of equal height, unless a subclass says otherwise."""

    def __call__(self, candidates):
        return torch.zeros(candidates.tokens.shape)


def selector(**methods: object) -> TokenSelector:
    """Returns a selector with other methods or attributes."""
    return dataclass(frozen=True)(type("Mine", (Given,), methods))()


def decode(token_selector: TokenSelector, mask_schedule: MaskSchedule | None = None) -> torch.Tensor:
    decoder = ParallelDecoder(mask_schedule or mask_schedules.build("cosine"), token_selector, num_steps=6)
    logits = torch.randn(NUM_TOKENS, NUM_CODES, generator=torch.Generator().manual_seed(0))
    return decoder.decode(
        lambda tokens, positions: logits[positions],
        torch.full((2, NUM_TOKENS), MASK),
        SeededNoise(torch.arange(2), NUM_TOKENS),
        mask_token_id=MASK,
    )


NAN = float("nan")
CORRECTING = {"needs_decided_logits": True, "replaces_decided": True}
REMASKING = {"num_remasked": lambda self, **counts: 2}
OWN_COUNT = {"follows_schedule": False}
BROKEN = [
    ({"__call__": lambda self, c: c.drawn_log_probs * NAN}, "scores must be finite, got NaN"),
    ({"__call__": lambda self, c: c.drawn_log_probs[:1]}, r"scores must be a float tensor \(B, M\)"),
    ({"__call__": lambda self, c: c.tokens}, r"scores must be a float tensor \(B, M\)"),
    ({"sharpness": lambda self, progress: NAN}, "sharpness at progress .* must be a finite number"),
    ({"schedule_progress": lambda self, p: 1 - p}, r"schedule_progress must lie in \(0, 1\] and never fall"),
    ({"schedule_progress": lambda self, p: p * 2}, r"schedule_progress must lie in \(0, 1\]"),
    ({"schedule_progress": lambda self, p: p[:1]}, r"schedule_progress must be a float tensor \(T,\)"),
    ({"schedule_progress": lambda self, p: p * NAN}, r"schedule_progress must lie in .* got \[nan"),
    ({"num_remasked": lambda self, **counts: 2.5}, "num_remasked at progress .* must be an integer .* got 2.5"),
    (REMASKING | {"remasking_scores": lambda self, d: d.confidence[0]}, "remasking_scores must be a float tensor"),
    (REMASKING | {"remasking_scores": lambda self, d: d.confidence * NAN}, "remasking_scores must be finite"),
    (OWN_COUNT | {"num_kept": lambda self, c, s, v: 3}, r"num_kept must be an int64 tensor \(B,\) = \(2,\), got 3"),
    (OWN_COUNT | {"num_kept": lambda self, c, s, v: v.sum(1) / 2}, "num_kept must be an int64 tensor"),
    (CORRECTING | {"replacements": lambda self, c: c.tokens + 7}, r"replacements must be codes in \[0, "),
    (CORRECTING | {"replacements": lambda self, c: c.tokens.float()}, "replacements must be an int64 tensor"),
]


@pytest.mark.parametrize(("methods", "message"), BROKEN)
def test_a_broken_result_is_refused_when_the_selector_is_built_and_when_it_decodes(methods, message):
    with pytest.raises(ValueError, match=f"token selector 'mine': {message}"):
        check_token_selector("mine", selector(**methods))
    with pytest.raises(ValueError, match=f"token selector 'Mine': {message}"):
        decode(selector(**methods))


@pytest.mark.parametrize("methods", [REMASKING, OWN_COUNT, CORRECTING])
def test_a_missing_method_is_found_when_the_selector_is_built(methods):
    with pytest.raises(TypeError, match="Mine must define "):
        check_token_selector("mine", selector(**methods))


def test_scores_of_half_precision_are_taken_as_float32():
    half = selector(__call__=lambda self, c: c.drawn_log_probs.half())
    check_token_selector("mine", half)
    assert (decode(half) != MASK).all()
    assert CheckedSelector(half).schedule_progress(torch.tensor([0.5, 1.0])).tolist() == [0.5, 1.0]


@dataclass(frozen=True)
class Late(MaskSchedule):
    """A schedule that is right at the numbers of tokens that are tried when it is built, and wrong at others."""

    value: ClassVar[float] = NAN

    def __call__(self, progress: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return torch.full_like(progress, self.value) if num_tokens == NUM_TOKENS else 1 - progress


class TooHigh(Late):
    value = 1.5


@pytest.mark.parametrize("schedule", [Late(), TooHigh()])
def test_a_schedule_that_breaks_at_the_tokens_of_the_model_is_refused(schedule):
    check_mask_schedule("late", schedule)
    with pytest.raises(ValueError, match=r"must be finite and lie in \[0, 1\], got .* \(at 24 tokens\)"):
        decode(Given(), schedule)
