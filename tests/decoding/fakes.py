"""Decoders and predictors of a few lines, which the tests of decoding share."""

import torch
from torch import Tensor

from maskgit_pl.decoding import (
    DecodingStep,
    ParallelDecoder,
    SeededNoise,
)
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.schedules import mask_schedules

NUM_CODES, MASK = 7, 7
CPU = torch.device("cpu")
LOGITS = torch.randn(64, NUM_CODES, generator=torch.Generator().manual_seed(0))


def fake_predictor(tokens: Tensor, positions: Tensor) -> Tensor:
    """Returns logits that depend on the position and on the number of known tokens."""
    known = (tokens != MASK).sum(1, keepdim=True)
    return LOGITS[(positions + known) % 64]


def decoder(num_steps: int = 5, *, schedule: str = "cosine", **options: object) -> ParallelDecoder:
    return ParallelDecoder(mask_schedules.build(schedule), Confidence(), num_steps=num_steps, **options)


def partly_known(unknown: list[int], num_tokens: int = 16) -> Tensor:
    """Returns tokens with one row for each number: that many mask tokens at random positions."""
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


def count_masked(made: ParallelDecoder, at_start: list[int], num_tokens: int = 16, **options: int) -> list[list[int]]:
    """Returns the planned number of masked tokens of each row before each step, and after the last."""
    plan = made.plan(at_start, num_tokens, **options)
    return [plan[0].before, *(step.after for step in plan)]


MIXED = [16, 9, 3, 1, 0]  # unknown tokens of the rows
