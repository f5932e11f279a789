"""The parallel decoder of MaskGIT: fills all masked tokens of an image in T steps.

Each step processes all images of the batch together (``_Run.steps`` repeats the numbers):

    1. Predict. The predictor returns logits (B, M, K) at the masked positions.
    2. Draw. A code is drawn for each of these positions.
    3. Score. The token selector scores the draws. High scores are kept.
    4. Count. The mask schedule sets how many tokens stay masked (``ParallelDecoder.plan``).
    5. Remask. The draws with the lowest scores become mask tokens again. A selector may also mask tokens that
       earlier steps decided.

The last step keeps all of its draws. They are the result.

``decode_classes`` decodes images of given classes and seeds for the pipeline, and for the sample images of
``mvtm.MaskedTokenModel``.

Shapes: B images, N tokens per image, K codes, M the largest number of masked tokens of an image in the batch. Images
with fewer masked tokens are padded to M with known positions. Padding never changes a code, a confidence or an order.
All counts are known on the host before the loop, so that nothing waits for the device; only a selector that sets the
number of tokens itself (``TokenSelector.num_kept``) makes the host wait once a step. For a selector that sees decided
tokens, M is the largest number of tokens that were masked at the start, in each step.

Source: paper, section on iterative decoding; google-research/maskgit, ``parallel_decode.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count

import torch
from torch import Tensor

from maskgit_pl.decoding.corruption import Corruption
from maskgit_pl.decoding.guidance import step_progress
from maskgit_pl.decoding.predictors import (
    ConditionalModel,
    Predictor,
    build_class_predictor,
    start_from,
)
from maskgit_pl.decoding.sampling import CodeSampling, Noise
from maskgit_pl.decoding.selectors import Candidates, Decided, TokenSelector
from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.randomness import gumbel, gumbel_rows, random_bits, random_uniform, uniform_of
from maskgit_pl.schedules import MaskSchedule, num_masked


@dataclass(frozen=True)
class ParallelDecoder:
    """The decoder of MaskGIT, which fills masked tokens in ``num_steps`` parallel steps.

    Args:
        mask_schedule: gamma: the schedule object that the mask sampler of the training holds too.
        token_selector: Scores the draws.
        num_steps: T, in [1, N].
        sampling: Temperature and truncation of the logits that codes are drawn from.
        tokens_per_step: Number of tokens that each step decides, in place of the mask schedule: T integers >= 1 whose
            sum is N. Images with fewer masked tokens at the start decide them in proportion, rounded down.
        random_start: Probability that ``decode_classes`` shows a random code in place of a mask token in step 0.
        corruption: What ``decode_classes`` shows the network of the tokens in each step, as the training did; None
            shows them as they are.
    """

    mask_schedule: MaskSchedule
    token_selector: TokenSelector
    num_steps: int = 8
    sampling: CodeSampling = field(default_factory=CodeSampling)
    tokens_per_step: tuple[int, ...] | None = None
    random_start: float = 0.0
    corruption: Corruption | None = None

    @torch.no_grad()
    def steps(
        self,
        predictor: Predictor,
        tokens: Tensor,
        noise: Noise,
        *,
        mask_token_id: int,
        grid: tuple[int, ...],
        first_step: int = 0,
        num_masked: Sequence[int] | None = None,
    ) -> Iterator[DecodingStep]:
        """Decodes, and yields after each step.

        Args:
            predictor: Computes the logits.
            tokens: (B, N) int64: known codes in [0, K), and ``mask_token_id`` at unknown positions.
            noise: Source of the random numbers.
            mask_token_id: Id of the mask token.
            grid: Sizes of the axes of the token grid, for selectors that depend on the position.
            first_step: Step to begin at, in [0, T).
            num_masked: Masked tokens of each row; None counts them, which waits for the device.

        Yields:
            A ``DecodingStep`` for each step. Known tokens never change. Nothing is yielded if no token is masked.

        Raises:
            ValueError: if the logits have another shape than (B, M, K).
        """
        run = _Run(self, predictor, tokens, noise, mask_token_id=mask_token_id, grid=grid)
        at_start = list(num_masked) if num_masked is not None else run.masked.sum(1).tolist()
        yield from run.steps(at_start, first_step)

    def plan(self, at_start: Sequence[int], num_tokens: int, *, first_step: int = 0) -> list[StepCounts]:
        """Counts the masked tokens of each step on the host, so that all shapes are known before the loop.

        A row starts with U masked tokens, and m of them are masked before step t. The counts after the step are

            planned  = floor(gamma((t + 1) / T) U), or U / N times the rest of ``tokens_per_step``, rounded down
            remasked = tokens that the selector masks again, of the U - m that earlier steps decided; usually 0
            after    = ``count_after(m, planned, remasked)``, and 0 after the last step

        Args:
            at_start: U of each row.
            num_tokens: N, tokens per image.
            first_step: Step to begin at, in [0, T). Editing skips the first steps.

        Raises:
            ValueError: if T is above N, or ``tokens_per_step`` does not fit T and N.

        A selector that sets the number of tokens itself (``num_kept``) may decide more or fewer in its steps.

        Source: google-research/maskgit, ``parallel_decode.py``; remasking: ReMDM, arXiv:2503.00307.
        """
        planned = self.plan_by_schedule(at_start, num_tokens)
        steps, before = [], list(at_start)
        for step in range(first_step, self.num_steps):
            steps.append(self.count_step(step, at_start, before, planned[step]))
            before = steps[-1].after
        return steps

    def count_step(self, step: int, at_start: Sequence[int], before: list[int], planned: Sequence[int]) -> StepCounts:
        """Counts the masked tokens of one step, see ``plan``, from the counts of each row before it."""
        if step == self.num_steps - 1:
            return StepCounts(before, [0] * len(before), [0] * len(before))
        rows, selector = [], self.token_selector
        may_remask = not (selector.sees_decided or selector.counts_in_loop)  # else its scores or its counts decide
        for start, masked, target in zip(at_start, before, planned, strict=True):
            decided = start - masked
            num_remasked = selector.num_remasked(decided=decided, planned=target) if may_remask else 0
            rows.append(count_after(masked, target, max(0, min(num_remasked, decided))))
        after, remasked = (list(column) for column in zip(*rows, strict=True))
        return StepCounts(before, after, remasked)

    def plan_by_schedule(self, at_start: Sequence[int], num_tokens: int) -> list[list[int]]:
        """Returns the counts that the schedule or ``tokens_per_step`` leaves masked: T lists, one count per row."""
        if self.num_steps > num_tokens:
            raise ValueError(f"num_steps must be <= {num_tokens}, the tokens per image, got {self.num_steps}")
        if self.tokens_per_step is None:
            progress = torch.arange(1, self.num_steps + 1, dtype=torch.float32) / self.num_steps
            ratios = self.mask_schedule(progress, num_tokens).unsqueeze(1)  # (T, 1)
            counts: list[list[int]] = num_masked(ratios, torch.tensor(list(at_start)), rounding="floor").tolist()
            return counts
        decided = list(accumulate(self.tokens_per_step))
        if len(decided) != self.num_steps or min(self.tokens_per_step) < 1 or decided[-1] != num_tokens:
            raise ValueError(
                f"tokens_per_step must sum to {num_tokens}, the tokens per image, in {self.num_steps} integers >= 1, "
                f"got {list(self.tokens_per_step)} with sum {decided[-1]}"
            )
        return [[unknown * (num_tokens - count) // num_tokens for unknown in at_start] for count in decided]


@dataclass(frozen=True)
class StepCounts:
    """The counts of one step: one integer per row of the batch.

    Args:
        before: Tokens masked before the step.
        after: Tokens masked after the step.
        remasked: Tokens among ``after`` that earlier steps had decided.
    """

    before: list[int]
    after: list[int]
    remasked: list[int]


def count_after(masked: int, planned: int, remasked: int) -> tuple[int, int]:
    """Counts the tokens of a row that are masked after a step, and those among them that are remasked.

    Args:
        masked: m, tokens masked before the step, which is not the last one.
        planned: Count that the schedule gives after the step.
        remasked: Tokens decided by earlier steps that the selector masks again, >= 0.
    """
    # The released code clips to [1, m - 1]: each step decides at least one token, and leaves one for the next step.
    most = masked - 1 + remasked
    least = max(1, remasked)
    # The number of masked tokens never grows, so a finished row (m = 0) stays finished.
    after = min(masked, max(least, min(most, planned)))
    return after, min(remasked, after)


class _Run:
    """The state of a decoding run and its loop; see ``ParallelDecoder.steps`` for the arguments.

    Attributes:
        tokens: (B, N) int64: codes in [0, K), and ``mask_token_id`` where ``masked``.
        masked: (B, N) bool.
        unknown: (B, N) bool, True = masked at the start. All other tokens were given and are never masked.
        confidence: (B, N) float32 in [0, 1]: the probability that each code had when it was last drawn; 1 for
            given codes.
        no_scores: (B, N) float32: +inf, the score of a position that a step does not draw.
        log_probs: (B, N, K) float32: log-probabilities of each position when it was last a candidate, for a selector
            that sees them; None in the first step.
    """

    def __init__(
        self,
        decoder: ParallelDecoder,
        predictor: Predictor,
        tokens: Tensor,
        noise: Noise,
        *,
        mask_token_id: int,
        grid: tuple[int, ...],
    ) -> None:
        self.decoder = decoder
        self.selector, self.sampling, self.num_steps = decoder.token_selector, decoder.sampling, decoder.num_steps
        self.predictor, self.noise = predictor, noise
        self.mask_token_id, self.grid = mask_token_id, grid
        self.tokens = tokens
        self.masked = self.unknown = tokens == mask_token_id
        self.confidence = torch.ones(tokens.shape, device=tokens.device)
        self.no_scores = torch.full_like(self.confidence, torch.inf)
        self.log_probs: Tensor | None = None

    def steps(self, at_start: list[int], first_step: int) -> Iterator[DecodingStep]:
        """Runs the steps of the module docstring, for the number of masked tokens of each row."""
        selector, before = self.selector, at_start
        planned = self.decoder.plan_by_schedule(at_start, self.tokens.shape[1])
        positions = every_unknown = _sort_masked_first(self.masked, at_start)  # (B, M)
        for step in range(first_step, self.num_steps):
            columns = at_start if selector.sees_decided else before
            if max(columns) == 0:
                return
            # 1. Predict. Softmax and scores are computed in float32 for every dtype of the network.
            logits = self.predictor(self.tokens, positions).float()  # (B, M, K)
            if logits.shape[:2] != positions.shape:
                raise ValueError(
                    f"predictor must return logits of shape {(*positions.shape, 'K')}, those at the given positions, "
                    f"got {tuple(logits.shape)}; select them from logits of all positions with torch.gather"
                )
            # 2. Draw.
            candidates = self._draw(logits, positions, step)
            # 3. Score. Padding, which +inf sorts last, keeps its code and confidence.
            is_padded = min(columns) < positions.shape[1]
            is_real = _mark_first_columns(columns, positions) if is_padded else None  # (B, M)
            scores = selector(candidates).float()  # (B, M)
            # 4. Count, on the host.
            counts = self.decoder.count_step(step, at_start, before, planned[step])
            if selector.counts_in_loop and step < self.num_steps - 1:
                of_real = scores if is_real is None else scores.where(is_real, -torch.inf)
                counts = self._count_in_loop(candidates, of_real, counts)
            scores = scores if is_real is None else scores.where(is_real, torch.inf)
            all_drawn = self._keep_draws(candidates, is_real)  # (B, N)
            # 5. Remask. Lowest scores first. The sort is stable, so equal scores give the same result on every device.
            by_score = positions.gather(1, scores.argsort(dim=1, stable=True))  # (B, M)
            was_masked = self.masked
            undecided = [after - remasked for after, remasked in zip(counts.after, counts.remasked, strict=True)]
            self.tokens = _mask_first(all_drawn, by_score, undecided, self.mask_token_id)
            has_remasked = max(counts.remasked) > 0
            if has_remasked:
                self._mask_decided(counts.remasked, step)
            self.masked = self.tokens == self.mask_token_id
            all_scores = self.no_scores.scatter(1, positions, scores)  # (B, N)
            yield DecodingStep(step, all_drawn, was_masked, self.masked, all_scores, self.confidence)
            # The columns are sorted by score, so those that stay masked come first: they need no second sort,
            # except when the selector has masked positions that are not among the columns.
            before = counts.after
            if selector.sees_decided:
                positions = every_unknown
            else:
                positions = _sort_masked_first(self.masked, before) if has_remasked else by_score[:, : max(before)]

    def _draw(self, logits: Tensor, positions: Tensor, step: int) -> Candidates:
        """Draws a code for each of ``positions`` (B, M) from ``logits`` (B, M, K)."""
        # Selectors and the mask schedule count progress to the end of the step, in (0, 1]. Sampling
        # temperature and guidance run from 0 at the first step to 1 at the last (``step_progress``).
        progress = (step + 1) / self.num_steps
        drawn = self.sampling.draw(
            logits,
            self.noise,
            positions,
            step=step,
            progress=step_progress(step, self.num_steps),
            sharpness=self.selector.sharpness(progress),
        )
        candidates = Candidates(
            log_probs=logits.log_softmax(-1),
            tokens=drawn,
            positions=positions,
            gumbel=self.noise.gumbel(positions, step),
            progress=progress,
            grid=self.grid,
        )
        if self.selector.sees_previous:
            candidates = replace(candidates, previous=self._exchange_log_probs(candidates))
        if self.selector.sees_decided:
            is_masked, codes = self.masked.gather(1, positions), self.tokens.gather(1, positions)
            candidates = replace(candidates, decided=codes.masked_fill(is_masked, -1))
            candidates = replace(candidates, tokens=self.selector.revise(candidates))
        return candidates

    def _exchange_log_probs(self, candidates: Candidates) -> Tensor | None:
        """Returns the log-probabilities (B, M, K) of the candidates in their last step, and keeps those of this one."""
        current, size = candidates.log_probs, self.tokens.shape[1]
        places = candidates.positions.unsqueeze(-1).expand_as(current)
        known = self.log_probs
        base = current.new_zeros(len(current), size, current.shape[-1]) if known is None else known
        self.log_probs = base.scatter(1, places, current)
        return None if known is None else known.gather(1, places)

    def _count_in_loop(self, candidates: Candidates, scores: Tensor, counts: StepCounts) -> StepCounts:
        """Returns the counts of a step whose selector sets them itself, which waits for the device."""
        decided = [before - after for before, after in zip(counts.before, counts.after, strict=True)]
        kept = self.selector.num_kept(candidates, scores, torch.tensor(decided).to(scores.device))
        if kept is None:
            return counts
        pairs = zip(counts.before, kept.tolist(), strict=True)
        after = [masked - max(0, min(number, masked)) for masked, number in pairs]
        return StepCounts(counts.before, after, counts.remasked)

    def _keep_draws(self, candidates: Candidates, is_real: Tensor | None) -> Tensor:
        """Returns all tokens (B, N) after the draw, and keeps the probabilities of new codes as their confidence.

        Args:
            candidates: The draws.
            is_real: (B, M) bool, False in padding; None if there is none.
        """
        positions, codes, confidence = candidates.positions, candidates.tokens, candidates.drawn_log_probs.exp()
        if is_real is not None:
            codes = codes.where(is_real, self.tokens.gather(1, positions))
            confidence = confidence.where(is_real, self.confidence.gather(1, positions))
        self.confidence = self.confidence.scatter(1, positions, confidence)
        return self.tokens.scatter(1, positions, codes)

    def _mask_decided(self, counts: list[int], step: int) -> None:
        """Masks the ``counts[b]`` tokens of row b with the highest remasking scores that earlier steps decided."""
        # ``self.masked`` still is the mask before this step, so the draws of this step are not among them.
        is_decided = self.unknown & ~self.masked  # (B, N)
        every_position = torch.arange(is_decided.shape[1], device=is_decided.device).expand_as(is_decided)
        decided = Decided(self.confidence, self.noise.gumbel(every_position, step))
        scores = self.selector.remasking_scores(decided).float()  # (B, N)
        order = scores.masked_fill(~is_decided, -torch.inf).argsort(dim=1, descending=True, stable=True)
        self.tokens = _mask_first(self.tokens, order, counts, self.mask_token_id)


@dataclass(frozen=True)
class DecodingStep:
    """One step of a decoding run.

    Args:
        step: t, counted from 0.
        tokens: (B, N) int64 in [0, K): all tokens after the draw, before any is masked again.
        was_masked: (B, N) bool, True = masked before the step.
        still_masked: (B, N) bool, True = masked after the step; all False at the last step.
        scores: (B, N) float32: the selector's scores of the candidates, +inf elsewhere.
        confidence: (B, N) float32 in [0, 1]: the probability that each code had when it was last drawn; 1 for
            codes that were given.
    """

    step: int
    tokens: Tensor
    was_masked: Tensor
    still_masked: Tensor
    scores: Tensor
    confidence: Tensor


def _sort_masked_first(masked: Tensor, counts: list[int]) -> Tensor:
    """Returns (B, M) int64: the masked positions of each row in raster order, then known positions as padding."""
    num_tokens = masked.shape[1]
    if min(counts) == num_tokens:  # all tokens are masked: the order is known without a sort
        return torch.arange(num_tokens, device=masked.device).expand(masked.shape)
    return masked.logical_not().argsort(dim=1, stable=True)[:, : max(counts)]


def _mark_first_columns(counts: list[int], like: Tensor) -> Tensor:
    """Returns (B, M) bool in the shape of ``like``: True in the first counts[b] columns of row b."""
    limit = torch.tensor(counts).to(like.device, non_blocking=True)
    return torch.arange(like.shape[1], device=like.device) < limit.unsqueeze(1)


def _mask_first(tokens: Tensor, positions: Tensor, counts: list[int], mask_token_id: int) -> Tensor:
    """Masks tokens (B, N) at the first counts[b] positions of row b."""
    if min(counts) == max(counts):  # the usual case: slicing copies no counts to the device
        return tokens.scatter(1, positions[:, : counts[0]], mask_token_id)
    kept = tokens.gather(1, positions).masked_fill(_mark_first_columns(counts, positions), mask_token_id)
    return tokens.scatter(1, positions, kept)


@dataclass(frozen=True)
class SeededNoise:
    """Noise that is a function of (seed of the image, step, position): the batch does not change an image.

    Args:
        seeds: (B,) int64 in [0, 2**32), one per image.
        num_tokens: N, tokens per image.
        steps_at_once: Steps whose numbers are generated together, >= 1. It changes no number. With 8, a run
            of 8 steps launches an eighth of the kernels.
    """

    seeds: Tensor
    num_tokens: int
    steps_at_once: int = 8
    _kept: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Draws the codes with the largest sum of logit and Gumbel number, K numbers per position.

        A small change of the logits, as of bfloat16 or another device, changes few draws. The released code draws so.
        """
        first, second = (self._at(number, positions, step) for number in (0, 1))
        return gumbel_rows(first, second, logits.shape[-1]).add_(logits).argmax(-1)

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Returns Gumbel noise (B, M) float32 from one uniform number per position."""
        return self._at(2, positions, step)

    def _at(self, number: int, positions: Tensor, step: int) -> Tensor:
        """Returns the generated numbers (B, M) of some positions: 0 and 1 are words for codes, 2 is Gumbel noise."""
        first = self._generate(step)
        return self._kept[first][number][:, step - first].gather(1, positions)

    def _generate(self, step: int) -> int:
        """Generates the numbers of the group of steps that holds ``step``, if needed, and returns its first step."""
        first = step - step % self.steps_at_once
        if first not in self._kept:
            self._kept.clear()  # one group of steps is kept: 3 B N numbers per step
            steps = torch.arange(first, first + self.steps_at_once, device=self.seeds.device)
            first_words, second_words, choice = random_bits(
                ["decode/codes", "decode/codes/second", "decode/choice"],
                seed=self.seeds.unsqueeze(1),
                index=0,
                epoch=steps,
                count=self.num_tokens,
            )  # (B, steps, N) each
            self._kept[first] = first_words, second_words, gumbel(uniform_of(choice))
        return first


def draw_start(seeds: Tensor, num_tokens: int, fraction: float, codebook_size: int, *, mask_token_id: int) -> Tensor:
    """Draws what the network sees in place of mask tokens in the first step: random codes, or the mask token.

    Args:
        seeds: (B,) int64 in [0, 2**32), one per image.
        num_tokens: N, tokens per image.
        fraction: Probability of a random code, in [0, 1].
        codebook_size: K.
        mask_token_id: Id of the mask token.

    Returns:
        (B, N) int64.

    Source: Di[M]O, Zhu et al., arXiv:2503.15457, token initialization.
    """
    chance, codes = random_uniform(
        ["decode/start", "decode/start/codes"], seed=seeds, index=0, epoch=0, count=num_tokens
    )  # (B, N) each
    start: Tensor = (codes * codebook_size).long().clamp(max=codebook_size - 1)
    return start.masked_fill(chance >= fraction, mask_token_id)


def _corrupt(
    predictor: Predictor, corruption: Corruption, seeds: Tensor, config: BackboneConfig, first_step: int
) -> Predictor:
    """Returns a predictor that shows the network corrupted tokens, by random numbers of the seed and the step."""
    steps, mask_id = count(first_step), config.mask_token_id

    def predict(tokens: Tensor, positions: Tensor) -> Tensor:
        step = next(steps)

        def uniform(name: str) -> Tensor:
            stream = f"decode/corruption/{name}"
            return random_uniform(stream, seed=seeds, index=0, epoch=step, count=config.num_tokens)

        seen = corruption(tokens, tokens == mask_id, uniform, codebook_size=config.codebook_size, mask_token_id=mask_id)
        return predictor(seen, positions)

    return predict


def decode_classes(
    model: ConditionalModel,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    decoder: ParallelDecoder,
    scales: Sequence[float],
    negative_labels: Sequence[int] | None = None,
    tokens: Tensor | None = None,
    first_step: int = 0,
) -> Iterator[DecodingStep]:
    """Decodes one image for each label, from mask tokens only or from partly known tokens.

    Args:
        model: The network and its caches.
        labels: Class of each image, or the null label.
        seeds: Seed of each image, in [0, 2**32). The rest of the batch does not change an image.
        decoder: The mask schedule, the token selector and the number of steps.
        scales: Guidance scale of each step, >= 0.
        negative_labels: Class that guidance pushes each image away from; None uses the null class.
        tokens: (B, N) int64 to begin with, see ``ParallelDecoder.steps``; None masks all tokens.
        first_step: Step to begin at, in [0, T).

    Returns:
        An iterator over the steps.

    Raises:
        ValueError: if a scale is positive, the network has no null class and ``negative_labels`` is None.
    """
    config, is_random = model.network.config, decoder.random_start > 0 and first_step == 0
    is_plain = decoder.corruption is None and not is_random
    # The steps are computed lazily, under ``no_grad`` of the decoder; the shared first step is computed here.
    with torch.no_grad():
        predictor = build_class_predictor(
            model,
            labels,
            negative_labels=negative_labels,
            scales=scales[first_step:],
            all_masked=tokens is None and is_plain,
        )
    num_masked = None
    if tokens is None:
        shape = len(labels), config.num_tokens
        tokens = torch.full(shape, config.mask_token_id, dtype=torch.int64, device=model.device)
        num_masked = [config.num_tokens] * len(labels)  # known without asking the device
    seed_tensor = torch.tensor(list(seeds), dtype=torch.int64, device=model.device)
    if decoder.corruption is not None:
        predictor = _corrupt(predictor, decoder.corruption, seed_tensor, config, first_step)
    if is_random:
        fraction, mask = decoder.random_start, config.mask_token_id
        start = draw_start(seed_tensor, config.num_tokens, fraction, config.codebook_size, mask_token_id=mask)
        predictor = start_from(start, predictor, mask_token_id=mask)
    return decoder.steps(
        predictor,
        tokens.to(model.device),
        # All steps at once in few kernels; 32 bounds the memory of long runs.
        SeededNoise(seed_tensor, config.num_tokens, min(decoder.num_steps, 32)),
        mask_token_id=config.mask_token_id,
        grid=config.grid,
        first_step=first_step,
        num_masked=num_masked,
    )
