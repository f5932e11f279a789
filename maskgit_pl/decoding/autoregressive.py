"""Autoregressive decoding, the paper's baseline: one token per step, in raster order.

``AutoregressiveDecoder`` is to a causal network what ``ParallelDecoder`` is to a bidirectional one. It knows no
network, asks a predictor for logits, and yields the same ``DecodingStep``, so callers can treat both decoders alike.

Source: paper, Table 1 (VQGAN*) and Figure 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from maskgit_pl.decoding.decoder import DecodingStep
from maskgit_pl.decoding.limits import check_guidance
from maskgit_pl.decoding.noise import Noise, SeededNoise
from maskgit_pl.decoding.plan import step_progress
from maskgit_pl.decoding.predictors import ConditionalModel, apply_guidance
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.networks.autoregressive import AutoregressiveTransformer

__all__ = ["AutoregressiveClassPredictor", "AutoregressiveDecoder", "AutoregressivePredictor", "decode_autoregressive"]


class AutoregressivePredictor(Protocol):
    """Logits of the next token. A predictor serves one decoding run: it may count its calls and keep caches."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, t) int64, the tokens so far, one more at each call, none at the first -> (B, K) float logits."""


@dataclass(frozen=True)
class AutoregressiveDecoder:
    """Draws the tokens of an image one after the other, in raster order.

    Args:
        num_tokens: Tokens to draw: N steps.
        sampling: Temperature and truncation of the logits that codes are drawn from.

    Raises:
        ValueError: if ``num_tokens`` is below 1.
    """

    num_tokens: int
    sampling: CodeSampling = field(default_factory=CodeSampling)

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be >= 1, got {self.num_tokens}")

    @torch.no_grad()
    def steps(
        self, predictor: AutoregressivePredictor, noise: Noise, *, batch_size: int, device: torch.device
    ) -> Iterator[DecodingStep]:
        """Decodes, one token at a time.

        Args:
            predictor: Gives the logits.
            noise: Source of the random numbers; each token is drawn once, so all are those of step 0.
            batch_size: B, images.
            device: Device of the predictor's logits.

        Yields:
            A ``DecodingStep`` for each token. Codes and confidence are 0 where nothing is drawn yet; the scores are
            those of raster order, the earlier the higher.
        """
        shape = batch_size, self.num_tokens
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        confidence = torch.zeros(shape, device=device)
        positions = torch.arange(self.num_tokens, device=device).expand(shape)
        scores = -positions.float()
        for step in range(self.num_tokens):
            logits = predictor(tokens[:, :step]).float().unsqueeze(1)  # (B, 1, K)
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
    """A causal network, given the class of each image; with guidance, both halves run in one batch at each step.

    Args:
        network: Gives the logits.
        labels: (B,) int64: class of each image, or the null class.
        negative_labels: (B,) int64: the class that each image is pushed away from; None where there is none.
        scales: Guidance scale of each step, in order; empty for no guidance.
        cache: Keep keys and values from token to token. False computes all of them again for each token: the same up
            to rounding, and slower the longer the sequence; for measurements.

    Raises:
        ValueError: if there is guidance but no class to push away from.
    """

    def __init__(
        self,
        network: AutoregressiveTransformer,
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
        logits = self.network.forward_next(tokens.repeat(2, 1), self.labels, cache=self._cache)
        conditional, unconditional = logits.chunk(2)
        return apply_guidance(conditional, unconditional, self.scales[tokens.shape[1]])


def decode_autoregressive(
    model: ConditionalModel[AutoregressiveTransformer],
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    decoder: AutoregressiveDecoder,
    scales: Sequence[float],
    negative_labels: Sequence[int] | None = None,
    cache: bool = True,
) -> Iterator[DecodingStep]:
    """Decodes one image for each label, from its class and its seed only: ``decode_classes`` in raster order.

    Args:
        model: The causal network and its null label.
        labels: Class of each image, or the null class.
        seeds: Seed of each image, in [0, 2**32): its noise does not depend on the rest of the batch.
        decoder: The number of tokens, and how codes are drawn.
        scales: Guidance scale of each step.
        negative_labels: The class that guidance pushes each image away from; None is the null class.
        cache: Keep keys and values from token to token, as in ``AutoregressiveClassPredictor``.

    Returns:
        The steps, one by one.

    Raises:
        ValueError: if there is guidance, the network has no null class, and no negative classes are named.
    """
    negative_labels = model.negative_labels(negative_labels, len(labels))
    predictor = AutoregressiveClassPredictor(
        model.network,
        torch.tensor(list(labels), device=model.device),
        negative_labels=None if negative_labels is None else torch.tensor(list(negative_labels), device=model.device),
        scales=scales,
        cache=cache,
    )
    seeds_here = torch.tensor(list(seeds), dtype=torch.int64, device=model.device)
    noise = SeededNoise(seeds_here, decoder.num_tokens, steps_at_once=1)
    return decoder.steps(predictor, noise, batch_size=len(labels), device=model.device)
