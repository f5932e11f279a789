"""Class-conditional decoding: labels and seeds in, tokens out.

Used by the pipeline, and by ``mvtm.MaskedTokenModel`` for the sample images of the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maskgit_pl.decoding.decoder import ParallelDecoder
from maskgit_pl.decoding.noise import SeededNoise
from maskgit_pl.decoding.predictors import ConditionalModel, ConditionalNetwork, build_class_predictor
from maskgit_pl.decoding.run import DecodingStep

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
    """Decodes one image for each label, from mask tokens only or from partly known tokens.

    Args:
        model: The network with its grid, ids and caches.
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
    num_masked = None
    all_masked = tokens is None
    # The steps are computed lazily, under ``no_grad`` of the decoder; the shared first step is computed here.
    with torch.no_grad():
        predictor = build_class_predictor(
            model, labels, negative_labels=negative_labels, scales=scales[first_step:], all_masked=all_masked
        )
    if tokens is None:
        shape = len(labels), model.num_tokens
        tokens = torch.full(shape, model.mask_token_id, dtype=torch.int64, device=model.device)
        num_masked = [model.num_tokens] * len(labels)  # known without asking the device
    seed_tensor = torch.tensor(list(seeds), dtype=torch.int64, device=model.device)
    return decoder.steps(
        predictor,
        tokens.to(model.device),
        # All steps at once in few kernels; 32 bounds the memory of long runs.
        SeededNoise(seed_tensor, model.num_tokens, min(decoder.num_steps, 32), decoder.sampling.method),
        mask_token_id=model.mask_token_id,
        first_step=first_step,
        grid=model.grid,
        num_masked=num_masked,
    )
