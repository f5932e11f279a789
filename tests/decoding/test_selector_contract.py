"""Selectors that break their contract are refused when they are built."""

from dataclasses import dataclass

import pytest
import torch

from maskgit_pl.decoding.selectors import TokenSelector, check_token_selector

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
