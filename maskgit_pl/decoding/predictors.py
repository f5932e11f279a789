"""Predictors: the sources of the logits of ``ParallelDecoder``.

``build_class_predictor`` composes them, from the inside out: ``ClassPredictor`` runs the network,
``GuidedPredictor`` adds classifier-free guidance or ``AutoguidedPredictor`` guidance by a second network, and
``FirstStepLogits`` shares the first step between images of a class. ``start_from`` shows random codes in it.
``check_condition_vectors`` checks the vectors of images, such as text embeddings, that ``ConditionalModel.bind``
hands to the network.

Source of guidance: Ho and Salimans, arXiv:2207.12598; of its use with masked tokens: Muse, arXiv:2301.00704;
of guidance by a second network: Karras et al., arXiv:2406.02507.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from maskgit_pl.decoding.guidance import check_guidance
from maskgit_pl.networks.backbone import Backbone, PredictAt

_MOST_LABELS, _MOST_NUMBERS = 64, 2**28  # of the cached logits; 1 GiB in float32


class Predictor(Protocol):
    """A source of the logits of masked tokens. It serves one decoding run: it may count its calls."""

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Predicts the codes at masked positions.

        Args:
            tokens: (B, N) int64: codes in [0, K), and ``mask_token_id`` at unknown positions.
            positions: (B, M) int64 in [0, N): the masked positions. Rows with fewer masked tokens are padded
                with known positions, whose logits are ignored.

        Returns:
            (B, M, K) float: logits of the codes.
        """


class ClassPredictor:
    """A predictor that runs the network once per call, given the class of each image. Exact.

    What depends only on the class is computed at the first call: the weights must not change between the calls.

    Args:
        network: The network.
        labels: (B,) int64 in [0, num_classes), or the null label.
        vectors: (B, C) float on the network's device; None for a network without vectors.
    """

    def __init__(self, network: Backbone, labels: Tensor, vectors: Tensor | None = None) -> None:
        self.network, self.labels, self.vectors = network, labels, vectors

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._predict(tokens, positions)

    @cached_property
    def _predict(self) -> PredictAt:
        return self.network.conditioned(self.labels, self.vectors)


class GuidedPredictor:
    """A predictor with classifier-free guidance (``apply_guidance``), both halves in one batch.

    Calls with scale 0 run the conditional half only.

    Args:
        network: The network.
        labels: (B,) int64 in [0, num_classes).
        negative_labels: (B,) int64: class that each image is pushed away from, usually the null label.
        scales: Guidance scale of each call, >= 0.
        vectors: (B, C) float, for both halves of each image; None for a network without vectors.
    """

    def __init__(
        self,
        network: Backbone,
        labels: Tensor,
        *,
        negative_labels: Tensor,
        scales: Sequence[float],
        vectors: Tensor | None = None,
    ) -> None:
        self.conditional = ClassPredictor(network, labels, vectors)
        twice = None if vectors is None else vectors.repeat(2, 1)
        self.both = ClassPredictor(network, torch.cat([labels, negative_labels]), twice)  # (2 B,)
        self._scales = iter(scales)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        scale = next(self._scales)
        if scale == 0:
            return self.conditional(tokens, positions)
        # Both halves have the same tokens and differ in their labels; the conditional half comes first.
        conditional, unconditional = self.both(tokens.repeat(2, 1), positions.repeat(2, 1)).chunk(2)  # (B, M, K) each
        return apply_guidance(conditional, unconditional, scale)


class AutoguidedPredictor:
    """A predictor with autoguidance: a weaker network takes the place of the unconditional prediction.

    guided = positive + scale (positive - negative), on logits. Both networks see the same tokens, each with
    its own mask token. Calls with scale 0 run the positive network only.

    Args:
        positive: Predictor of the network that generates.
        negative: Predictor of the negative network.
        scales: Guidance scale of each call, >= 0.

    Source: Karras et al., arXiv:2406.02507, equation 3, whose weight w is 1 + scale.
    """

    def __init__(self, positive: ClassPredictor, negative: ClassPredictor, *, scales: Sequence[float]) -> None:
        self.positive, self.negative = positive, negative
        self._scales = iter(scales)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        scale = next(self._scales)
        logits = self.positive(tokens, positions)  # (B, M, K)
        if scale == 0:
            return logits
        # The mask tokens have different ids if only one network has a null class.
        positive_id, negative_id = (part.network.config.mask_token_id for part in (self.positive, self.negative))
        tokens = tokens if positive_id == negative_id else tokens.masked_fill(tokens == positive_id, negative_id)
        return apply_guidance(logits, self.negative(tokens, positions), scale)


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Applies classifier-free guidance: conditional + scale (conditional - unconditional).

    Args:
        conditional: Logits of any shape.
        unconditional: Logits of the same shape.
        scale: Guidance scale >= 0; 0 returns the conditional logits.

    Returns:
        float32 logits of that shape.
    """
    # u + (1 + s) (c - u) = c + s (c - u), in one kernel.
    return torch.lerp(unconditional.float(), conditional.float(), 1 + scale)


def first_then(first: Predictor, rest: Predictor) -> Predictor:
    """Returns a predictor whose first call is that of ``first``, and whose later calls are those of ``rest``.

    ``first`` is freed after its call, with the (B, N, K) logits that it may hold.
    """
    waiting = [first]
    return lambda tokens, positions: (waiting.pop() if waiting else rest)(tokens, positions)


def start_from(start: Tensor, predictor: Predictor, *, mask_token_id: int) -> Predictor:
    """Returns a predictor whose first call shows the network other tokens in place of mask tokens.

    Args:
        start: (B, N) int64: what the first call shows in place of each mask token; see ``decoder.draw_start``.
        predictor: Predictor of all calls.
        mask_token_id: Id of the mask token.
    """
    return first_then(
        lambda tokens, positions: predictor(start.where(tokens == mask_token_id, tokens), positions), predictor
    )


class FirstStepLogits:
    """A cache of the logits of the first step. It sees mask tokens only, so its logits depend on the class only. Exact.

    Callers that change the weights, the device or the dtype of the network call ``clear``.

    Args:
        network: The network. The 64 classes that were used last are kept, N K numbers each; fewer if they take more
            than 2^28.
    """

    def __init__(self, network: Backbone) -> None:
        self.network = network
        self._known: OrderedDict[int, Tensor] = OrderedDict()  # label -> (N, K), last used at the end

    def __call__(self, labels: Sequence[int], *, device: torch.device) -> Tensor:
        """Returns logits (B, N, K) of B labels at all positions in raster order; ``device`` is the network's."""
        # 1. Compute each missing class once, in sorted order, so that the batch order changes no result.
        missing = sorted(set(labels) - set(self._known))
        if missing:
            config = self.network.config
            shape = len(missing), config.num_tokens
            tokens = torch.full(shape, config.mask_token_id, dtype=torch.int64, device=device)
            positions = torch.arange(config.num_tokens, device=device).expand(shape)
            logits = self.network.conditioned(torch.tensor(missing, device=device))(
                tokens, positions
            )  # (missing, N, K)
            # A view would keep the memory of all classes while one of them is in the cache.
            self._known.update(zip(missing, map(Tensor.clone, logits) if len(missing) > 1 else logits, strict=True))
        # 2. Collect the rows first: a batch may have more classes than the cache keeps.
        rows = [self._known[label] for label in labels]
        # 3. Remove the least recently used classes.
        for label in dict.fromkeys(labels):
            self._known.move_to_end(label)
        most = max(1, min(_MOST_LABELS, _MOST_NUMBERS // rows[0].numel()))
        while len(self._known) > most:
            self._known.popitem(last=False)
        return torch.stack(rows)

    def clear(self) -> None:
        """Removes all logits."""
        self._known.clear()


@dataclass(frozen=True)
class ConditionalModel:
    """A class-conditional network on its device, with what its decoding runs share.

    Args:
        network: The network; its configuration has the grid and the ids.
        device: Device of the network.
        first_step_logits: Cache of the first step's logits, shared between runs; None computes them once per batch.
        negative: Weaker model of the same tokens, which guidance pushes images away from
            (``AutoguidedPredictor``); None pushes them away from the negative or null class.
        vectors: (B, C) float, the vectors of a batch (``bind``).
    """

    network: Backbone
    device: torch.device
    first_step_logits: FirstStepLogits | None = None
    negative: ConditionalModel | None = None
    vectors: Tensor | None = None

    def bind(self, vectors: Tensor | None) -> ConditionalModel:
        """Returns the model for a batch whose images have vectors. A network without vectors stays as it is.

        Args:
            vectors: (B, C) float on the network's device; None for a network without vectors.
        """
        if vectors is None or not self.network.config.condition_dim:
            return self
        negative = self.negative and self.negative.bind(vectors)
        return replace(self, vectors=vectors, negative=negative)

    def first_logits(self, labels: Sequence[int]) -> Tensor:
        """Returns the logits (B, N, K) of the first step without guidance, so that a cache serves all scales."""
        return (self.first_step_logits or FirstStepLogits(self.network))(labels, device=self.device)

    def fill_negative_labels(
        self, negative_labels: Sequence[int] | None, labels: Sequence[int]
    ) -> Sequence[int] | None:
        """Returns the labels of the negative half of guidance.

        They are ``negative_labels``; without them ``labels`` if there is a negative model, else null labels, else None.
        """
        if negative_labels is not None:
            return negative_labels
        if self.negative is not None:
            return labels
        null_label = self.network.config.null_label
        return None if null_label is None else [null_label] * len(labels)


def build_class_predictor(
    model: ConditionalModel,
    labels: Sequence[int],
    *,
    negative_labels: Sequence[int] | None = None,
    scales: Sequence[float] = (),
    all_masked: bool = False,
) -> Predictor:
    """Builds the predictor of a class-conditional run.

    Args:
        model: The network.
        labels: Class of each image.
        negative_labels: Class that guidance pushes each image away from; None uses the null class, or with a
            negative model the class of the image.
        scales: Guidance scale of each call, >= 0; empty for no guidance.
        all_masked: True if all tokens start masked. Images of a class then share the logits of the first
            call, unless each has a vector (``ConditionalModel.bind``).
    """
    negative_labels = model.fill_negative_labels(negative_labels, labels)
    check_guidance(scales, has_negative_class=negative_labels is not None)
    if not all_masked or model.vectors is not None:
        return _build_guided(model, labels, negative_labels, scales)
    logits = _first_logits(model, labels, negative_labels, scales[0] if scales else 0)
    # All positions are masked, so those of the first call are in raster order, as the logits are.
    return first_then(lambda tokens, positions: logits, _build_guided(model, labels, negative_labels, scales[1:]))


def _build_guided(
    model: ConditionalModel, labels: Sequence[int], negative_labels: Sequence[int] | None, scales: Sequence[float]
) -> Predictor:
    """Builds the predictor without the shared first step; see ``build_class_predictor``."""
    positive = torch.tensor(list(labels), device=model.device)
    conditional = ClassPredictor(model.network, positive, model.vectors)
    if negative_labels is None or not any(scale > 0 for scale in scales):
        return conditional
    negative = torch.tensor(list(negative_labels), device=model.device)
    if model.negative is None:
        return GuidedPredictor(model.network, positive, negative_labels=negative, scales=scales, vectors=model.vectors)
    other = ClassPredictor(model.negative.network, negative, model.negative.vectors)
    return AutoguidedPredictor(conditional, other, scales=scales)


def _first_logits(
    model: ConditionalModel, labels: Sequence[int], negative_labels: Sequence[int] | None, scale: float
) -> Tensor:
    """Returns the guided logits of the first step, (B, N, K)."""
    if negative_labels is None or scale == 0:
        return model.first_logits(labels)
    if model.negative is None:
        conditional, negative = model.first_logits([*labels, *negative_labels]).chunk(2)
    else:
        conditional, negative = model.first_logits(labels), model.negative.first_logits(negative_labels)
    return apply_guidance(conditional, negative, scale)


def check_condition_vectors(
    vectors: object, labels: Sequence[int], *, condition_dim: int, null_label: int | None
) -> Tensor | None:
    """Checks the vectors of a request against the network.

    Args:
        vectors: (n, C) float array or tensor, or (C,) for all images; None if none are given.
        labels: Label of each image; the null label hides its vector.
        condition_dim: C of the network; 0 if it takes no vectors.
        null_label: Label of "no class and no vector"; None if the network has none.

    Returns:
        (n, C) float32, zeros if all labels are the null label; None for a network without vectors.
    """
    if not condition_dim:
        if vectors is not None:
            raise ValueError("vectors must not be given to a model that was trained without vectors; leave them out")
        return None
    expected = len(labels), condition_dim
    is_hidden = all(label == null_label for label in labels)
    if vectors is None:
        if not is_hidden:
            raise ValueError(
                f"vectors must be given: the model was trained with a vector of {condition_dim} values for each image, "
                f"got none; give MaskGIT.generate an array of shape {expected}, or generate images of no class (None)"
            )
        return torch.zeros(expected)
    if is_hidden:
        raise ValueError("classes must be given with vectors, since no class (None) hides the vector, got none")
    vectors = torch.as_tensor(vectors)
    if vectors.ndim == 1:
        vectors = vectors.expand(len(labels), -1)
    if tuple(vectors.shape) != expected:
        raise ValueError(
            f"vectors must have shape {expected}, one row of the {condition_dim} values that the model was trained "
            f"with for each image, got {tuple(vectors.shape)}"
        )
    if not vectors.isfinite().all():
        raise ValueError("vectors must be finite, got NaN or infinity")
    return vectors.float()
