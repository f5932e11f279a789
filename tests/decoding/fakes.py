"""Decoders and predictors of a few lines, which the tests of decoding share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, DecodingStep, ParallelDecoder, SeededNoise
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.schedules import mask_schedules

NUM_CODES, MASK = 7, 7
GRID, NUM_TOKENS = (2, 8), 16
CPU = torch.device("cpu")
LOGITS = 2 * torch.randn(64, NUM_CODES, generator=torch.Generator().manual_seed(0))
MIXED = [16, 9, 3, 1, 0]  # masked tokens of the rows
ALL_MASKED = torch.full((2, NUM_TOKENS), MASK)


def fake_predictor(tokens: Tensor, positions: Tensor) -> Tensor:
    """Returns logits that depend on the position and on the number of known tokens of the row."""
    num_known = (tokens != MASK).sum(1, keepdim=True)
    return LOGITS[(positions + num_known) % 64]


def decoder(num_steps: int = 5, *, schedule: str = "cosine", **options: object) -> ParallelDecoder:
    return ParallelDecoder(mask_schedules.build(schedule), Confidence(), num_steps=num_steps, **options)


def decoder_of(selector: object, num_steps: int = 6, **options: object) -> ParallelDecoder:
    """Builds a decoder with the selector of a spec."""
    return DecodingConfig(num_steps, selector, **options).build_decoder(mask_schedules.build("cosine"))


def partly_known(num_masked: list[int]) -> Tensor:
    """Returns tokens with one row for each number: that many mask tokens at random positions."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(NUM_CODES, (len(num_masked), NUM_TOKENS), generator=generator)
    for row, count in enumerate(num_masked):
        tokens[row, torch.randperm(NUM_TOKENS, generator=generator)[:count]] = MASK
    return tokens


def run(
    tokens: Tensor,
    parallel_decoder: ParallelDecoder,
    predictor: object = fake_predictor,
    *,
    seeds: Sequence[int] | None = None,
    **options: int,
) -> list[DecodingStep]:
    noise = SeededNoise(torch.tensor(seeds or range(len(tokens))), tokens.shape[1])
    return list(parallel_decoder.steps(predictor, tokens, noise, mask_token_id=MASK, grid=GRID, **options))


def count_masked(parallel_decoder: ParallelDecoder, at_start: list[int], **options: int) -> list[list[int]]:
    """Returns the planned number of masked tokens of each row before each step, and after the last."""
    plan = parallel_decoder.plan(at_start, NUM_TOKENS, **options)
    return [plan[0].before, *(step.after for step in plan)]
