"""Memory and FLOPs of a training step of any backbone, from replays with one fake image.

The transformer of the paper has closed formulas (``transformer``); all other backbones are measured here. The backbone
must have no operation whose result has a size that depends on values, except in ``forward_masked``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskgit_pl.estimates.replay import Replay, fake_tensors, replay, run_backward
from maskgit_pl.estimates.sharding import group_of
from maskgit_pl.estimates.transformer import Precision
from maskgit_pl.losses import chunked_statistics, needs_chunks, token_statistics
from maskgit_pl.networks.backbone import Backbone, BackboneConfig, Vocabulary
from maskgit_pl.networks.skeleton import skeletons

__all__ = ["has_chunked_loss", "masked_token_flops", "replay_backbone"]

_LONGEST = 4  # blocks of a network that is replayed as a whole


def has_chunked_loss(config: BackboneConfig, images: int, *, vocabulary: Vocabulary = "all") -> bool:
    """Returns True if the logits of a micro-batch whose tokens are all masked are computed in chunks.

    Args:
        config: Configuration of the backbone.
        images: Images of the micro-batch.
        vocabulary: Columns of the softmax of the loss.
    """
    columns = config.num_columns(config.loss_columns(vocabulary))
    return needs_chunks(images * config.num_tokens, columns) and _build_empty(config).takes_project


def replay_backbone(
    config: BackboneConfig,
    *,
    chunked_images: int | None = None,
    vocabulary: Vocabulary = "all",
    precision: Precision = "32-true",
    prepare: Callable[[nn.ModuleList], None] = lambda blocks: None,
) -> Replay:
    """Replays forward and backward pass of one image whose tokens are all masked; n images cost n times as much.

    This does not hold for the memory of a loss in chunks: all images of a micro-batch share the size of a chunk.

    Equal blocks cost the same, so that a network with many of them is extrapolated from those of 3 and 4 blocks.

    Args:
        config: Configuration of the backbone.
        chunked_images: Images of a micro-batch with a loss in chunks, to replay instead; see ``has_chunked_loss``.
        vocabulary: Columns of the softmax of the loss.
        precision: Precision of the Trainer.
        prepare: Changes the blocks before the step, for activation checkpointing.
    """

    def of(depth: int | None = None) -> Replay:
        made = config if depth is None else _with_depth(config, depth)
        columns = config.loss_columns(vocabulary)
        return _replay(made, chunked_images, vocabulary=columns, precision=precision, prepare=prepare)

    if config.num_blocks <= _LONGEST or not _has_equal_blocks(config):
        return of()
    shorter, longer = of(_LONGEST - 1), of(_LONGEST)
    more = config.num_blocks - _LONGEST
    peak, flops, casts = (
        new + more * (new - old)
        for old, new in zip(
            (shorter.peak, shorter.flops, shorter.casts), (longer.peak, longer.flops, longer.casts), strict=True
        )
    )
    return Replay(peak, flops, casts)


def _with_depth(config: BackboneConfig, depth: int) -> BackboneConfig:
    changes: dict[str, Any] = {"depth": depth}
    return replace(config, **changes)


def _has_equal_blocks(config: BackboneConfig) -> bool:
    """Returns True if the field ``depth`` counts the blocks, and these have tensors of the same shapes."""
    blocks = _build_empty(config).blocks
    return len(blocks) == config.num_blocks and len({group_of([block]) for block in blocks}) == 1


def _replay(
    config: BackboneConfig,
    chunked_images: int | None,
    *,
    vocabulary: Vocabulary,
    precision: Precision,
    prepare: Callable[[nn.ModuleList], None],
) -> Replay:
    network = _build_empty(config)
    prepare(network.blocks)
    with fake_tensors(network):
        # Gradients exist between steps, so they must not count as allocations of the replay.
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        tokens, labels, vectors = _images(config, chunked_images or 1)

        def step() -> None:
            losses = _whole_losses if chunked_images is None else _chunked_losses
            run_backward(losses(network, tokens, labels, vectors, vocabulary).mean())

        with _FusedAttention():
            return replay(step, [network], precision=precision)


def _whole_losses(
    network: Backbone, tokens: Tensor, labels: Tensor, vectors: Tensor | None, vocabulary: Vocabulary
) -> Tensor:
    """Returns log-probabilities, whose mean costs what a loss with label smoothing costs."""
    return F.log_softmax(network(tokens, labels, vectors=vectors, vocabulary=vocabulary).float(), dim=-1)


def _chunked_losses(
    network: Backbone, tokens: Tensor, labels: Tensor, vectors: Tensor | None, vocabulary: Vocabulary
) -> Tensor:
    """Returns the losses of all tokens, with label smoothing, from logits in chunks."""
    measure = partial(token_statistics, label_smoothing=0.1, num_token_groups=network.config.num_token_groups)
    project = partial(chunked_statistics, targets=tokens.flatten(), measure=measure)
    positions = torch.arange(tokens.numel())
    found = network.forward_selected(tokens, labels, positions, vectors=vectors, vocabulary=vocabulary, project=project)
    return found[:, 0]


class _FusedAttention(TorchFunctionMode):
    """A function mode without dropout in attention: on a GPU a fused kernel draws it, on a CPU it needs S x S masks."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls ``func``, for attention with a dropout of 0."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def masked_token_flops(config: BackboneConfig) -> float:
    """Returns the FLOPs that a step saves for each token that is not masked: those of the head, for example.

    0 for a backbone without a ``forward_selected`` of its own.

    They are those by which ``forward_selected`` gets cheaper, three times: the backward pass costs twice the forward
    pass.

    Args:
        config: Configuration of the backbone.
    """
    if config.num_tokens == 1:
        return 0.0
    if config.num_blocks > 2 and _has_equal_blocks(config):  # only the last block and the head are cheaper
        config = _with_depth(config, 2)
    network = _build_empty(config).eval()
    if type(network).forward_selected is Backbone.forward_selected:  # computes all positions, or makes a mask of them
        return 0.0
    with fake_tensors(network), torch.no_grad():
        tokens, labels, vectors = _images(config, 1)

        def count(num_positions: int) -> int:
            positions = torch.zeros(num_positions, dtype=torch.int64)
            return replay(lambda: network.forward_selected(tokens, labels, positions, vectors=vectors), [network]).flops

        return 3 * (count(config.num_tokens) - count(1)) / (config.num_tokens - 1)


def _build_empty(config: BackboneConfig) -> Backbone:
    with skeletons():
        return config.create()


def _images(config: BackboneConfig, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns tokens (B, N), labels (B,) and vectors (B, C) of ``count`` images."""
    tokens, labels = torch.zeros(count, config.num_tokens, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    return tokens, labels, torch.zeros(count, config.condition_dim) if config.condition_dim else None
