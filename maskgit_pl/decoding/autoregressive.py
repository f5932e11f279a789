"""Autoregressive decoding, the paper's baseline: one token per step, in raster order.

``AutoregressiveDecoder`` is the counterpart of ``ParallelDecoder`` for networks with causal attention. It asks a
predictor for logits and yields the same ``DecodingStep``, so callers treat both decoders alike. Each of the N steps:

    1. Predict. The predictor returns logits (B, K) of the next token.
    2. Draw. A code is drawn for it, which never changes later.

Source: paper, Table 1 (VQGAN*) and Figure 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskgit_pl.decoding.decoder import DecodingStep, SeededNoise
from maskgit_pl.decoding.guidance import check_guidance, step_progress
from maskgit_pl.decoding.predictors import ConditionalModel, apply_guidance
from maskgit_pl.decoding.sampling import CodeSampling, Noise
from maskgit_pl.networks.backbone import AutoregressiveBackbone


@dataclass(frozen=True)
class AutoregressiveDecoder:
    """The decoder of autoregressive models, which draws the tokens of an image one by one in raster order.

    Args:
        num_tokens: N, tokens per image and steps of a run, >= 1.
        sampling: Temperature and truncation of the logits that codes are drawn from.
    """

    num_tokens: int
    sampling: CodeSampling = field(default_factory=CodeSampling)

    @torch.no_grad()
    def steps(
        self, predictor: Callable[[Tensor], Tensor], noise: Noise, *, batch_size: int, device: torch.device
    ) -> Iterator[DecodingStep]:
        """Decodes, and yields after each token.

        Args:
            predictor: Computes the logits (B, K) of the next token from the tokens so far, (B, t) int64 in
                [0, K). t is 0 at the first call and grows by 1 with each call, so it may keep a cache.
            noise: Source of the random numbers.
            batch_size: B, number of images.
            device: Device of the predictor's logits.

        Yields:
            A ``DecodingStep`` for each token. Codes and confidence are 0 at positions that are not drawn yet.
            The score of position n is -n.
        """
        shape = batch_size, self.num_tokens
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        confidence = torch.zeros(shape, device=device)
        positions = torch.arange(self.num_tokens, device=device).expand(shape)
        scores = -positions.float()
        for step in range(self.num_tokens):
            # 1. Predict.
            logits = predictor(tokens[:, :step]).float().unsqueeze(1)  # (B, 1, K)
            # 2. Draw. Each position is drawn once, so the noise of step 0 serves all steps.
            current = positions[:, step : step + 1]  # (B, 1)
            progress = step_progress(step, self.num_tokens)
            drawn = self.sampling.draw(logits, noise, current, step=0, progress=progress)  # (B, 1)
            probability = logits.softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)  # (B, 1)
            tokens, confidence = tokens.scatter(1, current, drawn), confidence.scatter(1, current, probability)
            was_masked = positions >= step
            yield DecodingStep(
                step, tokens, was_masked, positions > step, scores.masked_fill(~was_masked, torch.inf), confidence
            )


def decode_autoregressive(
    model: ConditionalModel,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    decoder: AutoregressiveDecoder,
    scales: Sequence[float],
    negative_labels: Sequence[int] | None = None,
    cache: bool = True,
) -> Iterator[DecodingStep]:
    """Decodes one image for each label with a causal network: the counterpart of ``decode_classes``.

    Args:
        model: A model with a causal network.
        labels: Class of each image, or the null label.
        seeds: Seed of each image, in [0, 2**32). The rest of the batch does not change an image.
        decoder: The number of tokens and the sampling of codes.
        scales: Guidance scale of each step, >= 0.
        negative_labels: Class that guidance pushes each image away from; None uses the null class.
        cache: True keeps keys and values from step to step. False computes all of them at each step, for
            measurements: equal up to rounding, and slower for long sequences.

    Returns:
        An iterator over the steps.

    Raises:
        ValueError: if a scale is positive, the network has no null class and ``negative_labels`` is None.
    """
    network, is_guided = model.network, any(scale > 0 for scale in scales)
    assert isinstance(network, AutoregressiveBackbone)
    negative_labels = model.fill_negative_labels(negative_labels, labels)
    check_guidance(scales, has_negative_class=negative_labels is not None)
    rows = [*labels, *(negative_labels or ())] if is_guided else list(labels)
    label_tensor = torch.tensor(rows, device=model.device)
    caches = network.create_cache() if cache else None

    def predict(tokens: Tensor) -> Tensor:
        if not is_guided:
            return network.forward_next(tokens, label_tensor, cache=caches)
        # Both halves in one batch, also with scale 0: the cache must hold the keys and values of all rows.
        conditional, unconditional = network.forward_next(tokens.repeat(2, 1), label_tensor, cache=caches).chunk(2)
        return apply_guidance(conditional, unconditional, scales[tokens.shape[1]])

    seed_tensor = torch.tensor(list(seeds), dtype=torch.int64, device=model.device)
    noise = SeededNoise(seed_tensor, decoder.num_tokens, 1)
    return decoder.steps(predict, noise, batch_size=len(labels), device=model.device)
