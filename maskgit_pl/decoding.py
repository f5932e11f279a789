"""Parallel decoding: from masked tokens to tokens in a few steps, step by step.

``ParallelDecoder`` holds a mask schedule (how many tokens stay masked) and a token selector (which). It knows no
network: it asks a ``Predictor`` for logits at the positions that are still masked. Guidance and the sharing of the
first step live in predictors that wrap one another. All counts are known on the host before the loop, so the loop never
waits for the device.

Source: paper, section on iterative decoding; google-research/maskgit, ``parallel_decode.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from maskgit_pl.guidance import guidance_scales, guidance_schedules
from maskgit_pl.randomness import gumbel, random_uniform
from maskgit_pl.schedules import MaskSchedule, num_masked
from maskgit_pl.selectors import Candidates, TokenSelector, token_selectors

__all__ = [
    "ClassPredictor",
    "DecodingConfig",
    "DecodingStep",
    "FirstStepPredictor",
    "GuidedPredictor",
    "Noise",
    "ParallelDecoder",
    "Predictor",
    "SeededNoise",
    "class_predictor",
    "decode_classes",
]


class Predictor(Protocol):
    """Logits of masked positions. A predictor serves one decoding run: it may count its calls and keep caches."""

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        """Predicts.

        Args:
            tokens: (B, N) int64, codes in [0, K), or ``mask_token_id`` where unknown.
            positions: (B, M) int64, in [0, N): where logits are wanted. Rows with fewer masked tokens are padded with
                known positions, whose logits are ignored.
            newly_known: (B, P) int64: positions decided since the last call (padded with known ones); P = 0 at first.

        Returns:
            (B, M, K) float: logits of the codes.
        """


class Noise(Protocol):
    """Where a decoding run takes its chance from."""

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Codes (B, M) int64 drawn from softmax(logits), logits (B, M, K) float32, at ``positions`` of ``step``."""

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Standard Gumbel noise (B, M) float32 for the choice of tokens at ``positions`` of ``step``."""


@dataclass(frozen=True)
class SeededNoise:
    """Noise that belongs to the image: a function of (its seed, step, position), whatever else is in the batch.

    Args:
        seeds: (B,) int64, in [0, 2**32), one for each image.
        num_tokens: N, tokens of an image.
    """

    seeds: Tensor
    num_tokens: int

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Inverse-CDF sampling from one uniform number a position."""
        cumulative = logits.softmax(-1).cumsum(-1)
        threshold = self._uniform("decode/codes", positions, step).unsqueeze(-1) * cumulative[..., -1:]
        return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Gumbel noise from one uniform number a position."""
        return gumbel(self._uniform("decode/choice", positions, step))

    def _uniform(self, stream: str, positions: Tensor, step: int) -> Tensor:
        everywhere = random_uniform(stream, seed=self.seeds, index=0, epoch=step, count=self.num_tokens)
        return everywhere.gather(1, positions)


@dataclass(frozen=True)
class DecodingStep:
    """One step of a decoding run.

    Args:
        step: t, counted from 0.
        tokens: (B, N) int64 in [0, K): the step's full draw, before anything is masked again.
        was_masked: (B, N) bool: masked before the step.
        still_masked: (B, N) bool: masked again after it; nowhere at the last step.
        scores: (B, N) float32: the selector's scores where ``was_masked``, +inf elsewhere.
    """

    step: int
    tokens: Tensor
    was_masked: Tensor
    still_masked: Tensor
    scores: Tensor


@dataclass(frozen=True)
class ParallelDecoder:
    """Fills masked tokens in ``num_steps`` parallel steps.

    At step t every masked token is drawn from the predictor's distribution; then
    max(1, min(masked - 1, floor(gamma((t + 1) / T) * masked at the start))) of them, those with the lowest scores, are
    masked again. The result is the last step's draw.

    Args:
        mask_schedule: The schedule object that the mask sampler holds.
        token_selector: Which tokens to keep.
        num_steps: T, at least 1 and at most the number of tokens.
        sampling_temperature: Divides the logits before codes are drawn; 0 takes the most probable code.

    Raises:
        ValueError: A number out of range.
    """

    mask_schedule: MaskSchedule
    token_selector: TokenSelector
    num_steps: int = 8
    sampling_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps: at least 1 is needed, got {self.num_steps}")
        if not self.sampling_temperature >= 0:
            raise ValueError(f"sampling_temperature: at least 0 is needed, got {self.sampling_temperature}")

    def masked_counts(self, at_start: Sequence[int], num_tokens: int, *, first_step: int = 0) -> list[list[int]]:
        """How many tokens of each row are masked before each step, and after the last (0).

        Args:
            at_start: Masked tokens of each row at the start.
            num_tokens: N, tokens of an image.
            first_step: Step to begin at (editing begins late), in [0, num_steps).

        Returns:
            num_steps - first_step + 1 lists of one count a row.

        Raises:
            ValueError: More steps than tokens, or ``first_step`` out of range.
        """
        if self.num_steps > num_tokens:
            raise ValueError(f"num_steps: at most the {num_tokens} tokens of an image, got {self.num_steps}")
        if not 0 <= first_step < self.num_steps:
            raise ValueError(f"first_step: a step in [0, {self.num_steps}) is needed, got {first_step}")
        progress = torch.arange(1, self.num_steps + 1, dtype=torch.float32) / self.num_steps
        ratios = self.mask_schedule(progress, num_tokens)  # on the host, in float32, before the loop
        planned = num_masked(ratios.unsqueeze(1), torch.tensor(list(at_start)), rounding="floor")  # (T, B)
        counts = [list(at_start)]
        for row in planned[first_step:-1].tolist():
            pairs = zip(counts[-1], row, strict=True)
            counts.append([min(masked, max(1, min(masked - 1, plan))) for masked, plan in pairs])
        return [*counts, [0] * len(counts[0])]

    @torch.no_grad()
    def steps(
        self, predictor: Predictor, tokens: Tensor, noise: Noise, *, mask_token_id: int, first_step: int = 0
    ) -> Iterator[DecodingStep]:
        """Decodes, one step at a time.

        Args:
            predictor: Where logits come from.
            tokens: (B, N) int64: known codes, and ``mask_token_id`` where they are to be found.
            noise: Where chance comes from.
            mask_token_id: The id that marks an unknown token.
            first_step: Step to begin at, in [0, num_steps).

        Yields:
            A ``DecodingStep`` for each step; known tokens never change. Nothing, where nothing is masked.
        """
        num_tokens = tokens.shape[1]
        masked = tokens == mask_token_id
        counts = self.masked_counts(masked.sum(1).tolist(), num_tokens, first_step=first_step)  # the only wait
        if max(counts[0]) == 0:
            return
        order = masked.logical_not().argsort(dim=1, stable=True)  # masked positions first, known ones as padding
        positions = order[:, : max(counts[0])]
        newly_known = positions[:, :0]
        for step, (before, after) in enumerate(pairwise(counts), start=first_step):
            logits = predictor(tokens, positions, newly_known)
            valid = _first(before, positions)
            drawn, scores = self._draw(logits.float(), positions, noise, step)
            drawn = drawn.where(valid, tokens.gather(1, positions))
            scores = scores.where(valid, torch.inf)
            ranks = scores.argsort(dim=1, stable=True)  # least sure first; padding last
            positions, remasked = positions.gather(1, ranks), _first(after, positions)
            ranked = drawn.gather(1, ranks)
            full = tokens.scatter(1, positions, ranked)
            tokens = tokens.scatter(1, positions, ranked.masked_fill(remasked, mask_token_id))
            still_masked = tokens == mask_token_id
            everywhere = torch.full_like(full, torch.inf, dtype=scores.dtype)
            yield DecodingStep(
                step, full, masked, still_masked, everywhere.scatter(1, positions, scores.gather(1, ranks))
            )
            masked = still_masked
            newly_known, positions = _between(before, after, positions), positions[:, : max(after)]

    def decode(
        self, predictor: Predictor, tokens: Tensor, noise: Noise, *, mask_token_id: int, first_step: int = 0
    ) -> Tensor:
        """The tokens (B, N) int64 in [0, K) that ``steps`` ends with; arguments as there."""
        last = tokens
        for step in self.steps(predictor, tokens, noise, mask_token_id=mask_token_id, first_step=first_step):
            last = step.tokens
        return last

    def _draw(self, logits: Tensor, positions: Tensor, noise: Noise, step: int) -> tuple[Tensor, Tensor]:
        if self.sampling_temperature == 0:
            drawn = logits.argmax(-1)
        else:
            drawn = noise.draw(logits / self.sampling_temperature, positions, step)
        candidates = Candidates(
            log_probs=logits.log_softmax(-1),
            tokens=drawn,
            positions=positions,
            gumbel=noise.gumbel(positions, step),
            progress=(step + 1) / self.num_steps,
        )
        return drawn, self.token_selector(candidates)


def _first(counts: list[int], like: Tensor) -> Tensor:
    """(B, M) bool in the shape of ``like``: the first counts[b] of row b."""
    if min(counts) == max(counts):  # the usual case, without a transfer to the device
        row = torch.arange(like.shape[1], device=like.device) < counts[0]
        return row.expand_as(like)
    limit = torch.tensor(counts).to(like.device, non_blocking=True)
    return torch.arange(like.shape[1], device=like.device) < limit.unsqueeze(1)


def _between(before: list[int], after: list[int], positions: Tensor) -> Tensor:
    """(B, P): the positions from after[b] to before[b] of each row, padded with later ones, which are known too."""
    decided = max(b - a for b, a in zip(before, after, strict=True))
    if min(after) == max(after):
        return positions[:, after[0] : after[0] + decided]
    start = torch.tensor(after).to(positions.device, non_blocking=True).unsqueeze(1)
    columns = (start + torch.arange(decided, device=positions.device)).clamp(max=positions.shape[1] - 1)
    return positions.gather(1, columns)


class ConditionalNetwork(Protocol):
    """The network that the predictors ask: codes' logits of some positions, given tokens and class rows."""

    def __call__(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """(B, N) int64 tokens, (B,) int64 labels, (B, M) int64 positions -> (B, M, K) float logits of the codes."""


@dataclass(frozen=True)
class ClassPredictor:
    """One forward of the network, given the class of each image.

    Args:
        network: Usually a ``networks.transformer.MaskedTransformer``.
        labels: (B,) int64: class of each image, or the null class.
    """

    network: ConditionalNetwork
    labels: Tensor

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        return self.network(tokens, self.labels, positions)


class GuidedPredictor:
    """Classifier-free guidance: conditional + scale (conditional - unconditional), in one batched forward.

    Where the scale is 0 only the conditional half runs.

    Args:
        network: As of ``ClassPredictor``.
        labels: (B,) int64, class of each image.
        null_label: The class row that stands for "no class".
        scales: The scale of each call, in order (``guidance.guidance_scales``, from the first step on).
    """

    def __init__(
        self, network: ConditionalNetwork, labels: Tensor, *, null_label: int, scales: Sequence[float]
    ) -> None:
        self.network = network
        self.labels = labels
        self.both_labels = torch.cat([labels, torch.full_like(labels, null_label)])
        self._scales = iter(scales)

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        scale = next(self._scales)
        if scale == 0:
            return self.network(tokens, self.labels, positions)
        both = self.network(tokens.repeat(2, 1), self.both_labels, positions.repeat(2, 1))
        conditional, unconditional = both.float().chunk(2)
        return conditional + scale * (conditional - unconditional)


class FirstStepPredictor:
    """Shares the first step: it sees only mask tokens, so its logits depend on the class alone.

    Exact. For a batch of few classes it takes the first of T steps away; right only where every token starts masked.

    Args:
        first: Predictor over one row for each distinct class, for the first call.
        rest: Predictor over the whole batch, for all later calls.
        row_of_image: (B,) int64: the row of ``first`` that an image's class has.
        num_rows: Distinct classes.
    """

    def __init__(self, first: Predictor, rest: Predictor, *, row_of_image: Tensor, num_rows: int) -> None:
        self.first: Predictor | None = first
        self.rest = rest
        self.row_of_image = row_of_image
        self.num_rows = num_rows

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        if self.first is None:
            return self.rest(tokens, positions, newly_known)
        first, self.first = self.first, None
        rows = slice(self.num_rows)  # every row of a start without known tokens looks alike
        return first(tokens[rows], positions[rows], newly_known[rows])[self.row_of_image]


def class_predictor(
    network: ConditionalNetwork,
    labels: Sequence[int],
    *,
    device: torch.device,
    null_label: int | None = None,
    scales: Sequence[float] = (),
    all_masked: bool = False,
) -> Predictor:
    """The predictor of a class-conditional run, put together from the parts above.

    Args:
        network: As of ``ClassPredictor``.
        labels: Class of each image.
        device: Where the network is.
        null_label: The class row that stands for "no class"; None where the network has none.
        scales: Guidance scale of each call; empty for no guidance.
        all_masked: Whether every token starts masked, so that the first step can be shared.

    Raises:
        ValueError: Guidance is asked of a network that was trained without class dropout.
    """
    guided = any(scale > 0 for scale in scales)
    if guided and null_label is None:
        raise ValueError("guidance: this model has no null class (it was trained with class_dropout 0); use scale 0")

    def over(classes: Sequence[int], of_calls: Sequence[float]) -> Predictor:
        rows = torch.tensor(list(classes), device=device)
        if not guided or null_label is None:
            return ClassPredictor(network, rows)
        return GuidedPredictor(network, rows, null_label=null_label, scales=of_calls)

    distinct = sorted(set(labels))
    if not all_masked or len(distinct) == len(labels):
        return over(labels, scales)
    row_of_image = torch.tensor([distinct.index(label) for label in labels], device=device)
    return FirstStepPredictor(
        over(distinct, scales[:1]), over(labels, scales[1:]), row_of_image=row_of_image, num_rows=len(distinct)
    )


@dataclass(frozen=True)
class DecodingConfig:
    """How images are decoded, in plain values, as a recipe and a pretrained folder hold it.

    Args:
        num_steps: T.
        token_selector: Name or mapping of a registered token selector.
        guidance: Name or mapping of a registered guidance schedule.
        sampling_temperature: As of ``ParallelDecoder``.
    """

    num_steps: int = 8
    token_selector: str | dict[str, Any] = "confidence"
    guidance: str | dict[str, Any] = "constant"
    sampling_temperature: float = 1.0

    def decoder(self, mask_schedule: MaskSchedule) -> ParallelDecoder:
        """The decoder that follows ``mask_schedule``.

        Raises:
            ValueError: An unknown name or a number out of range.
        """
        return ParallelDecoder(
            mask_schedule,
            token_selectors.build(self.token_selector),
            num_steps=self.num_steps,
            sampling_temperature=self.sampling_temperature,
        )

    def scales(self) -> tuple[float, ...]:
        """Guidance scale of each step."""
        return guidance_scales(guidance_schedules.build(self.guidance), self.num_steps)


def decode_classes(
    network: ConditionalNetwork,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    decoder: ParallelDecoder,
    scales: Sequence[float],
    num_tokens: int,
    mask_token_id: int,
    null_label: int | None,
    device: torch.device,
    tokens: Tensor | None = None,
    first_step: int = 0,
) -> Iterator[DecodingStep]:
    """Decodes one image for each label: from nothing but its class and its seed, or from a part of its tokens.

    Args:
        network: As of ``ClassPredictor``.
        labels: Class of each image.
        seeds: Seed of each image, in [0, 2**32): its noise does not depend on the rest of the batch.
        decoder: The steps.
        scales: Guidance scale of each step.
        num_tokens: N, tokens of an image.
        mask_token_id: As of ``ParallelDecoder.steps``.
        null_label: As of ``class_predictor``.
        device: Where the network is.
        tokens: (B, N) int64 to begin from, as of ``ParallelDecoder.steps``; None where every token starts masked.
        first_step: Step to begin at, in [0, num_steps).

    Yields:
        Each step.
    """
    predictor = class_predictor(
        network, labels, device=device, null_label=null_label, scales=scales[first_step:], all_masked=tokens is None
    )
    noise = SeededNoise(torch.tensor(list(seeds), dtype=torch.int64, device=device), num_tokens)
    if tokens is None:
        tokens = torch.full((len(labels), num_tokens), mask_token_id, dtype=torch.int64, device=device)
    return decoder.steps(predictor, tokens.to(device), noise, mask_token_id=mask_token_id, first_step=first_step)
