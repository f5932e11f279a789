"""Class-conditional decoding: from labels and seeds to tokens. What the pipeline and the training module run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maskgit_pl.decoding.decoder import DecodingStep, ParallelDecoder
from maskgit_pl.decoding.noise import SeededNoise
from maskgit_pl.decoding.predictors import ConditionalNetwork, FirstStepLogits, class_predictor

__all__ = ["decode_classes"]


def decode_classes(
    network: ConditionalNetwork,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    decoder: ParallelDecoder,
    scales: Sequence[float],
    grid: tuple[int, int],
    mask_token_id: int,
    null_label: int | None,
    device: torch.device,
    negative_labels: Sequence[int] | None = None,
    tokens: Tensor | None = None,
    first_step: int = 0,
    first_step_logits: FirstStepLogits | None = None,
    refresh: int | None = None,
) -> Iterator[DecodingStep]:
    """Decodes one image for each label: from nothing but its class and its seed, or from a part of its tokens.

    Args:
        network: As of ``ClassPredictor``.
        labels: Class of each image, or the null class.
        seeds: Seed of each image, in [0, 2**32): its noise does not depend on the rest of the batch.
        decoder: The steps.
        scales: Guidance scale of each step.
        grid: Rows and columns of tokens.
        mask_token_id: As of ``ParallelDecoder.steps``.
        null_label: The class row that stands for "no class"; None where the network has none.
        device: Where the network is.
        negative_labels: The class that guidance pushes each image away from; None is the null class.
        tokens: (B, N) int64 to begin from, as of ``ParallelDecoder.steps``; None where every token starts masked.
        first_step: Step to begin at, in [0, num_steps).
        first_step_logits: Kept from run to run, so that a class's first step is computed once; None to share it within
            this batch alone.
        refresh: As of ``CachedPredictor``, approximate; None computes everything at each step.

    Returns:
        The steps, one by one.

    Raises:
        ValueError: Guidance is asked of a network without a null class, and no negative classes are named.
    """
    num_tokens = math.prod(grid)
    if negative_labels is None and null_label is not None:
        negative_labels = [null_label] * len(labels)
    shared, num_masked = None, None
    if tokens is None:
        tokens = torch.full((len(labels), num_tokens), mask_token_id, dtype=torch.int64, device=device)
        num_masked = [num_tokens] * len(labels)
        shared = first_step_logits or FirstStepLogits(network, num_tokens=num_tokens, mask_token_id=mask_token_id)
    with torch.no_grad():
        predictor = class_predictor(
            network,
            labels,
            device=device,
            negative_labels=negative_labels,
            scales=scales[first_step:],
            first_step=shared,
            refresh=refresh,
        )
    seeds_here = torch.tensor(list(seeds), dtype=torch.int64, device=device)
    return decoder.steps(
        predictor,
        tokens.to(device),
        SeededNoise(seeds_here, num_tokens, steps_at_once=min(decoder.num_steps, 32)),
        mask_token_id=mask_token_id,
        first_step=first_step,
        grid=grid,
        num_masked=num_masked,
    )
