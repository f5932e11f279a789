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

__all__ = ["AutoregressiveClassPredictor", "AutoregressiveDecoder", "decode_autoregressive"]


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


class AutoregressiveClassPredictor:
    """The predictor of a causal network that is conditioned on classes. Guidance runs both halves in one batch.

    Args:
        network: The network.
        labels: (B,) int64 in [0, num_classes), or the null label.
        negative_labels: (B,) int64: class that guidance pushes each image away from; None if there is none.
        scales: Guidance scale of each step, >= 0; empty for no guidance.
        cache: True keeps keys and values from step to step. False computes all of them at each step, for
            measurements: equal up to rounding, and slower for long sequences.

    Raises:
        ValueError: if a scale is positive and there is no class to push images away from.
    """

    def __init__(
        self,
        network: AutoregressiveBackbone,
        labels: Tensor,
        *,
        negative_labels: Tensor | None = None,
        scales: Sequence[float] = (),
        cache: bool = True,
    ) -> None:
        self.network = network
        self.scales = scales if any(scale > 0 for scale in scales) else ()
        check_guidance(self.scales, has_negative_class=negative_labels is not None)
        self.labels = torch.cat([labels, negative_labels]) if self.scales and negative_labels is not None else labels
        self._cache = network.create_cache() if cache else None

    def __call__(self, tokens: Tensor) -> Tensor:
        if not self.scales:
            return self.network.forward_next(tokens, self.labels, cache=self._cache)
        # Steps with scale 0 also run both halves, because the cache must hold the keys and values of all rows.
        logits = self.network.forward_next(tokens.repeat(2, 1), self.labels, cache=self._cache)  # (2 B, K)
        conditional, unconditional = logits.chunk(2)
        return apply_guidance(conditional, unconditional, self.scales[tokens.shape[1]])


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
        cache: True keeps keys and values from step to step. See ``AutoregressiveClassPredictor``.

    Returns:
        An iterator over the steps.

    Raises:
        ValueError: if a scale is positive, the network has no null class and ``negative_labels`` is None.
    """
    assert isinstance(model.network, AutoregressiveBackbone)
    negative_labels = model.fill_negative_labels(negative_labels, labels)
    predictor = AutoregressiveClassPredictor(
        model.network,
        torch.tensor(list(labels), device=model.device),
        negative_labels=None if negative_labels is None else torch.tensor(list(negative_labels), device=model.device),
        scales=scales,
        cache=cache,
    )
    seed_tensor = torch.tensor(list(seeds), dtype=torch.int64, device=model.device)
    noise = SeededNoise(seed_tensor, decoder.num_tokens, 1, decoder.sampling.method)
    return decoder.steps(predictor, noise, batch_size=len(labels), device=model.device)
