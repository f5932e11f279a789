"""Predictors: the source of the decoder's logits. Guidance, caches and the sharing of the first step wrap one another.

Source of guidance: Ho and Salimans, arXiv:2207.12598; of its use with masked tokens: Muse, arXiv:2301.00704.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from maskgit_pl.checks import check_integer
from maskgit_pl.decoding.limits import check_guidance
from maskgit_pl.networks.transformer import ContextCache, Transformer

__all__ = [
    "CachedPredictor",
    "CachingNetwork",
    "ClassPredictor",
    "ConditionalModel",
    "ConditionalNetwork",
    "FirstStepLogits",
    "FirstStepPredictor",
    "GuidedPredictor",
    "Predictor",
    "apply_guidance",
    "class_predictor",
]


class Predictor(Protocol):
    """Logits of masked positions. A predictor serves one decoding run: it may count its calls and keep caches."""

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        """Predicts.

        Args:
            tokens: (B, N) int64, codes in [0, K), or ``mask_token_id`` where unknown.
            positions: (B, M) int64, in [0, N): where logits are wanted. Rows with fewer masked tokens are padded with
                known positions, whose logits are ignored.
            newly_known: (B, P) int64: positions decided since the last call (padded with known ones); P = 0 at first.

        Returns:
            (B, M, K) float: logits of the codes.
        """


class ConditionalNetwork(Protocol):
    """The network that the predictors ask: logits of the codes at some positions, given tokens and labels."""

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """(B, N) int64 tokens, (B,) int64 labels, (B, M) int64 positions -> (B, M, K) float logits of the codes."""


@runtime_checkable
class CachingNetwork(ConditionalNetwork, Protocol):
    """A network that can keep the keys and values of positions whose tokens stay as they are."""

    def forward_cached(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, newly_known: Tensor, *, cache: ContextCache
    ) -> Tensor:
        """See ``networks.transformer.MaskedTransformer.forward_cached``."""


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: conditional + scale (conditional - unconditional), on logits of one shape."""
    return torch.lerp(unconditional.float(), conditional.float(), 1 + scale)


@dataclass(frozen=True)
class ClassPredictor:
    """One forward of the network, given the class of each image.

    Args:
        network: Usually a ``networks.transformer.MaskedTransformer``.
        labels: (B,) int64: class of each image, or the null class.
    """

    network: ConditionalNetwork
    labels: Tensor

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        return self.network.forward_at(tokens, self.labels, positions)


class CachedPredictor:
    """Keeps keys and values of what was known before; approximate, except with ``context_cache`` 1.

    A call computes the masked positions and those that became known since the last call; known tokens keep the keys and
    values that they had when more of the others were masked. Every ``context_cache``-th call computes everything, the
    first one too. It saves little: decoding in 8 steps on one CPU thread took 0.88 (49 tokens, width 128) and 0.90 of
    the exact time (256 tokens, width 768) with 4, and 0.91 and 0.98 with 2; a third to two fifths of a trained model's
    tokens changed (``benchmarks/context_cache.py``).

    Args:
        network: Usually a ``networks.transformer.MaskedTransformer``.
        labels: (B,) int64: class of each image, or the null class.
        context_cache: Calls from one full pass to the next, at least 1.

    Raises:
        ValueError: if ``context_cache`` is out of range.
        TypeError: if the network has no ``forward_cached``.
    """

    def __init__(self, network: ConditionalNetwork, labels: Tensor, *, context_cache: int = 4) -> None:
        check_integer("context_cache", context_cache, "[1, inf)")
        if not isinstance(network, CachingNetwork):
            raise TypeError(
                "context_cache above 1 must have a network that keeps keys and values (a method `forward_cached`), got "
                f"{type(network).__name__}; set context_cache to 1 to decode exactly"
            )
        self.network = network
        self.labels = labels
        self.context_cache = context_cache
        self._calls = 0
        self._cache = ContextCache()

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        if self._calls % self.context_cache == 0:
            self._cache = ContextCache()
        self._calls += 1
        return self.network.forward_cached(tokens, self.labels, positions, newly_known, cache=self._cache)


class GuidedPredictor:
    """Classifier-free guidance (``apply_guidance``) in one batched forward.

    If the scale of a call is 0, only the conditional half runs.

    Args:
        network: Usually a ``networks.transformer.MaskedTransformer``.
        labels: (B,) int64, class of each image.
        negative_labels: (B,) int64, the class that each image is pushed away from: the null class, or another one.
        scales: The scale of each call, in order (``guidance.guidance_scales``, from the first step on).
        build_predictor: Makes the predictor that asks the network for the rows of some labels.
    """

    def __init__(
        self,
        network: ConditionalNetwork,
        labels: Tensor,
        *,
        negative_labels: Tensor,
        scales: Sequence[float],
        build_predictor: Callable[[ConditionalNetwork, Tensor], Predictor] = ClassPredictor,
    ) -> None:
        self.network = network
        self.labels = labels
        self.both_labels = torch.cat([labels, negative_labels])  # (2 B,)
        self.build_predictor = build_predictor
        self._scales = iter(scales)
        self._copies, self._predictor = 0, build_predictor(network, labels)

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        scale = next(self._scales)
        predictor = self._predictor_of(1 if scale == 0 else 2)
        if scale == 0:
            return predictor(tokens, positions, newly_known)
        # Both halves have the same tokens and differ in their labels: (2 B, M, K), the conditional half first.
        logits = predictor(tokens.repeat(2, 1), positions.repeat(2, 1), newly_known.repeat(2, 1))
        conditional, unconditional = logits.chunk(2)
        return apply_guidance(conditional, unconditional, scale)

    def _predictor_of(self, copies: int) -> Predictor:
        """Returns the predictor of one or both halves; a new one, with empty caches, if the number has changed."""
        if copies != self._copies:
            self._copies = copies
            self._predictor = self.build_predictor(self.network, self.labels if copies == 1 else self.both_labels)
        return self._predictor


class FirstStepLogits:
    """The logits of the first step, which sees only mask tokens: they depend on the class only. Exact.

    Each class is computed once, for as long as it is among the last ``max_labels`` that were asked for. A caller that
    changes the network's weights, device or type calls ``clear``.

    Args:
        network: Usually a ``networks.transformer.MaskedTransformer``.
        num_tokens: N, tokens of an image.
        mask_token_id: The id that marks an unknown token.
        max_labels: Classes kept, at least 1; each takes N K numbers.
    """

    def __init__(
        self, network: ConditionalNetwork, *, num_tokens: int, mask_token_id: int, max_labels: int = 64
    ) -> None:
        self.network = network
        self.num_tokens = num_tokens
        self.mask_token_id = mask_token_id
        self.max_labels = max_labels
        self._known: OrderedDict[int, Tensor] = OrderedDict()  # label -> (N, K), the one asked for last at the end

    def __call__(self, labels: Sequence[int], *, device: torch.device) -> Tensor:
        """Returns logits (B, N, K) of B labels, at all positions in raster order, on the network's ``device``."""
        # 1. Compute what is not kept, each class once, in an order that does not depend on the batch's.
        missing = sorted(set(labels) - set(self._known))
        if missing:
            self._compute(missing, device)
        # 2. Collect the rows before anything is forgotten: a batch may have more classes than are kept.
        rows = [self._known[label] for label in labels]
        # 3. Forget the classes that were asked for longest ago.
        for label in dict.fromkeys(labels):
            self._known.move_to_end(label)
        while len(self._known) > self.max_labels:
            self._known.popitem(last=False)
        return torch.stack(rows)

    def clear(self) -> None:
        """Forgets all logits."""
        self._known.clear()

    def _compute(self, labels: Sequence[int], device: torch.device) -> None:
        shape = len(labels), self.num_tokens
        tokens = torch.full(shape, self.mask_token_id, dtype=torch.int64, device=device)
        positions = torch.arange(self.num_tokens, device=device).expand(shape)
        logits = self.network.forward_at(tokens, torch.tensor(labels, device=device), positions)  # (classes, N, K)
        # A view would keep the memory of all classes for as long as one of them is kept.
        rows = [row.clone() for row in logits.unbind()] if len(labels) > 1 else logits.unbind()
        self._known.update(zip(labels, rows, strict=True))


class FirstStepPredictor:
    """Takes the first call's logits from ``FirstStepLogits``; right only if every token starts masked.

    Args:
        logits: (B, N, K) of the first step, guidance included.
        rest: Predictor of all later calls.
    """

    def __init__(self, logits: Tensor, rest: Predictor) -> None:
        self.logits: Tensor | None = logits
        self.rest = rest

    def __call__(self, tokens: Tensor, positions: Tensor, newly_known: Tensor) -> Tensor:
        if self.logits is None:
            return self.rest(tokens, positions, newly_known)
        logits, self.logits = self.logits, None  # frees N K numbers an image after the first step
        return logits  # every position is masked, and asked for in raster order


NetworkT = TypeVar("NetworkT", covariant=True)
TransformerT = TypeVar("TransformerT", bound=Transformer)


@dataclass(frozen=True)
class ConditionalModel(Generic[NetworkT]):
    """A class-conditional network with the facts that decoding needs; ``from_network`` reads most of them from it.

    Args:
        network: Gives the logits: a ``ConditionalNetwork``, or an ``AutoregressiveTransformer`` for
            ``decode_autoregressive``.
        grid: Rows and columns of tokens; N is their product.
        mask_token_id: The id that marks an unknown token.
        null_label: The label that stands for "no class"; None if the network has none.
        device: Device of the network.
        first_step_logits: Keeps the first step's logits of a class from run to run; None computes them once a batch.
        context_cache: Calls from one full pass to the next, as in ``CachedPredictor``; 1 is exact.
    """

    network: NetworkT
    grid: tuple[int, int]
    mask_token_id: int
    null_label: int | None
    device: torch.device
    first_step_logits: FirstStepLogits | None = None
    context_cache: int = 1

    @staticmethod
    def from_network(
        network: TransformerT,
        device: torch.device,
        *,
        first_step_logits: FirstStepLogits | None = None,
        context_cache: int = 1,
    ) -> ConditionalModel[TransformerT]:
        """Returns the model of a ``Transformer``, whose configuration holds the grid and the ids."""
        config = network.config
        return ConditionalModel(
            network, config.grid, config.mask_token_id, config.null_label, device, first_step_logits, context_cache
        )

    @property
    def num_tokens(self) -> int:
        """N, tokens of an image."""
        return self.grid[0] * self.grid[1]

    def negative_labels(self, given: Sequence[int] | None, count: int) -> Sequence[int] | None:
        """Returns the ``count`` classes that guidance pushes away from: those given, else the null class, or None."""
        return [self.null_label] * count if given is None and self.null_label is not None else given


def class_predictor(
    model: ConditionalModel[ConditionalNetwork],
    labels: Sequence[int],
    *,
    negative_labels: Sequence[int] | None = None,
    scales: Sequence[float] = (),
    all_masked: bool = False,
) -> Predictor:
    """Returns the predictor of a class-conditional run, put together from the parts above.

    Args:
        model: The network; its ``context_cache`` above 1 makes the predictor approximate.
        labels: Class of each image.
        negative_labels: The class that each image is pushed away from; None is the null class.
        scales: Guidance scale of each call; empty for no guidance.
        all_masked: Every token starts masked, so that the first call's logits depend on the class alone and are shared.

    Raises:
        ValueError: if there is guidance but no class to push away from, or ``context_cache`` is out of range.
        TypeError: if ``context_cache`` is above 1 and the network cannot keep keys and values.
    """
    build_predictor: Callable[[ConditionalNetwork, Tensor], Predictor] = ClassPredictor
    if model.context_cache != 1:
        build_predictor = partial(CachedPredictor, context_cache=model.context_cache)
    negative_labels = model.negative_labels(negative_labels, len(labels))
    check_guidance(scales, has_negative_class=negative_labels is not None)

    def for_calls(scales: Sequence[float]) -> Predictor:
        positive = torch.tensor(list(labels), device=model.device)
        if negative_labels is None or not any(scale > 0 for scale in scales):
            return build_predictor(model.network, positive)
        negative = torch.tensor(list(negative_labels), device=model.device)
        return GuidedPredictor(
            model.network, positive, negative_labels=negative, scales=scales, build_predictor=build_predictor
        )

    if not all_masked:
        return for_calls(scales)
    first_step = model.first_step_logits or FirstStepLogits(
        model.network, num_tokens=model.num_tokens, mask_token_id=model.mask_token_id
    )
    if negative_labels is not None and scales and scales[0] > 0:
        conditional, unconditional = first_step([*labels, *negative_labels], device=model.device).chunk(2)
        logits = apply_guidance(conditional, unconditional, scales[0])
    else:
        logits = first_step(labels, device=model.device)
    return FirstStepPredictor(logits, for_calls(scales[1:]))
