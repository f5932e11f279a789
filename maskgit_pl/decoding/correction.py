"""The decoding loop with self-correction, for selectors that ask for the current logits of decided tokens.

Used by ``decoder.ParallelDecoder`` if ``TokenSelector.needs_decided_logits``. Each step processes all images together:

    1. Predict. The predictor returns logits (B, U, K) at all U positions that were masked at the start.
    2. Draw. A code is drawn for each of these positions that is masked. Decided positions keep their current code.
    3. Score. The selector scores draws and decided tokens alike, both by the current logits.
    4. Replace. A selector may give decided positions another code.
    5. Mask. The tokens with the lowest scores are masked, as many as the plan says, new or old.

The number of masked tokens follows the plan, so all shapes are known before the loop, and nothing waits for the device.

Source: P2, Peng et al., arXiv:2502.03540, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from maskgit_pl.decoding.columns import mark_masked_columns, mask_first, sort_masked_first
from maskgit_pl.decoding.plan import StepCounts
from maskgit_pl.decoding.run import DecodingRun, DecodingStep
from maskgit_pl.decoding.selectors import Candidates

__all__ = ["CorrectingRun"]


class CorrectingRun(DecodingRun):
    """The state of a decoding run that corrects decided tokens; see ``DecodingRun``."""

    def steps(self, plan: Sequence[StepCounts], first_step: int) -> Iterator[DecodingStep]:
        """Runs the loop of the module docstring, with the counts of ``plan``."""
        positions = sort_masked_first(self.masked, plan[0].before)  # (B, U), the same in every step
        is_unknown = mark_masked_columns(plan[0].before, positions)  # (B, U); None if no row is padded
        for step, counts in enumerate(plan, start=first_step):
            if max(counts.before) == 0:
                return
            # 1. All of these positions are computed in each step, so none is newly known.
            logits = self.predictor(self.tokens, positions).float()  # (B, U, K)
            # 2.
            is_decided = ~self.masked.gather(1, positions)  # (B, U), True in padding too
            candidates = self._draw(logits, positions, step, is_decided=is_decided)
            # 3.
            scores = self.selector(candidates)  # (B, U)
            if is_unknown is not None:
                scores = scores.where(is_unknown, float("inf"))
            self.selector.check_values(scores)
            # 4.
            codes = self._replace(candidates, is_decided if is_unknown is None else is_decided & is_unknown)
            self._update_confidence(candidates, codes, is_decided)
            # 5. Lowest scores first. The sort is stable, so equal scores give the same result on every device.
            all_drawn = self.tokens.scatter(1, positions, codes)  # (B, N)
            by_score = positions.gather(1, scores.argsort(dim=1, stable=True))
            was_masked = self.masked
            self.tokens = mask_first(all_drawn, by_score, counts.after, self.mask_token_id)
            self.masked = self.tokens == self.mask_token_id
            scores_by_position = self.no_scores.scatter(1, positions, scores.masked_fill(is_decided, float("inf")))
            yield DecodingStep(step, all_drawn, was_masked, self.masked, scores_by_position, self.confidence)

    def _replace(self, candidates: Candidates, is_replaceable: Tensor) -> Tensor:
        """Returns the codes (B, U) after the selector has replaced decided ones."""
        if not self.selector.selector.replaces_decided:
            return candidates.tokens
        return self.selector.replacements(candidates).where(is_replaceable, candidates.tokens)

    def _update_confidence(self, candidates: Candidates, codes: Tensor, is_decided: Tensor) -> None:
        """Sets the confidence of codes that are new at this step to their current probability."""
        probability = candidates.log_probs.gather(-1, codes.unsqueeze(-1)).squeeze(-1).exp()  # (B, U)
        is_new = ~is_decided | (codes != candidates.tokens)
        old = self.confidence.gather(1, candidates.positions)
        self.confidence = self.confidence.scatter(1, candidates.positions, probability.where(is_new, old))
