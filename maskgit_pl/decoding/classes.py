"""Class-conditional decoding: from labels and seeds to tokens.

Used by the pipeline, and by ``mvtm.MaskedTokenModel`` for its sample images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maskgit_pl.decoding.decoder import DecodingStep, ParallelDecoder
from maskgit_pl.decoding.noise import SeededNoise
from maskgit_pl.decoding.predictors import ConditionalModel, ConditionalNetwork, class_predictor

__all__ = ["decode_classes"]


def decode_classes(
    model: ConditionalModel[ConditionalNetwork],
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    decoder: ParallelDecoder,
    scales: Sequence[float],
    negative_labels: Sequence[int] | None = None,
    tokens: Tensor | None = None,
    first_step: int = 0,
) -> Iterator[DecodingStep]:
    """Decodes one image for each label: from its class and its seed only, or from a part of its tokens.

    Args:
        model: The network, its grid, ids and caches.
        labels: Class of each image, or the null class.
        seeds: Seed of each image, in [0, 2**32): its noise does not depend on the rest of the batch.
        decoder: The schedule, the selector and the steps.
        scales: Guidance scale of each step.
        negative_labels: The class that guidance pushes each image away from; None is the null class.
        tokens: (B, N) int64 to begin from, as in ``ParallelDecoder.steps``; None if every token starts masked.
        first_step: Step to begin at, in [0, num_steps).

    Returns:
        The steps, one by one.

    Raises:
        ValueError: if there is guidance, the network has no null class, and no negative classes are named.
    """
    num_masked = None
    all_masked = tokens is None
    with torch.no_grad():
        predictor = class_predictor(
            model, labels, negative_labels=negative_labels, scales=scales[first_step:], all_masked=all_masked
        )
    if tokens is None:
        shape = len(labels), model.num_tokens
        tokens = torch.full(shape, model.mask_token_id, dtype=torch.int64, device=model.device)
        num_masked = [model.num_tokens] * len(labels)
    seeds_here = torch.tensor(list(seeds), dtype=torch.int64, device=model.device)
    return decoder.steps(
        predictor,
        tokens.to(model.device),
        SeededNoise(seeds_here, model.num_tokens, steps_at_once=min(decoder.num_steps, 32)),
        mask_token_id=model.mask_token_id,
        first_step=first_step,
        grid=model.grid,
        num_masked=num_masked,
    )
