"""The FLOPs of a training step and the memory of the tensors that it keeps. Used by ``costs``.

``transformer_activations`` and ``step_flops`` are closed formulas for stage 2 with the transformer of the paper. Other
networks (those of stage 1, and all other backbones) are counted: ``count_step`` and ``count_backbone`` run a step with
tensors that have a shape but no content. Such a step must have no operation whose result has a size that depends on
values.

Letters: B images of a micro-batch, N tokens per image, S = N + 1 with the class token (N with causal attention, where
the last token is not an input), R = B S rows, m masked tokens of the micro-batch, D embedding dimension, F dimension of
the MLP, h heads, L blocks, V rows of the token embedding, which are also the columns of the loss. A loss over the codes
has K columns in place of V, and with G token groups of k values, G k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from maskgit_pl.losses import rows_at_once
from maskgit_pl.masking import MaskRatio, ScheduleRatio
from maskgit_pl.networks.backbone import Backbone, BackboneConfig, Vocabulary
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.weights import skeletons
from maskgit_pl.runs.memory import FLOAT, HALF, Activations
from maskgit_pl.schedules import MaskSchedule, num_masked

__all__ = [
    "Checkpointing",
    "CountedStep",
    "Precision",
    "count_backbone",
    "count_step",
    "fake_tensors",
    "mean_num_masked",
    "step_flops",
    "transformer_activations",
]

Precision = Literal["32-true", "bf16-mixed"]
Checkpointing = Literal["none", "blocks"]

_DROPPED = 1  # bytes per element of a dropout mask (bool)
_STATISTICS = 2 * FLOAT  # mean and standard deviation of a row, which LayerNorm keeps


def mean_num_masked(
    schedule: MaskSchedule,
    num_tokens: int,
    *,
    min_mask_ratio: float = 0.0,
    mask_ratio: MaskRatio = ScheduleRatio(),  # noqa: B008  # frozen
) -> float:
    """Returns the mean number of masked tokens per image in training, with ratio gamma(u), u uniform in [0, 1)."""
    progress = (torch.arange(4096) + 0.5) / 4096
    ratios = mask_ratio(progress, schedule, num_tokens).clamp(min=min_mask_ratio)
    return float(num_masked(ratios, num_tokens, rounding="ceil").double().mean())


def transformer_activations(
    config: TransformerConfig,
    *,
    batch: int,
    masked: int | None = None,
    precision: Precision = "32-true",
    checkpointing: Checkpointing = "none",
    vocabulary: Vocabulary = "all",
) -> Activations:
    """Estimates the activation memory of a training step on a GPU with fused attention, which keeps no S x S matrix.

    The forward pass keeps:

    - the sum of the embeddings, the input of the first norm;
    - for each block, the tensors listed in ``_block_kept``; with activation checkpointing, only its input;
    - for the head, only at masked tokens, four vectors of D elements and V log-probabilities; the latter not if the
      loss is computed in chunks (``losses.chunked_statistics``).

    bf16-mixed also keeps a bfloat16 copy of each matrix, except with FSDP2, which gathers weights in bfloat16 and frees
    them after a block.

    The temporary memory is the largest of three peaks:

    - at the start of the backward pass: gradients of the logits, 3 m V elements; in chunks of m' rows, their logits and
      gradients, 4 m' V elements, and two gradients of the table, 2 D V. If the loss has fewer columns than the table
      rows, also a gradient of the whole table;
    - within a block, after the tensors of the head are freed: the gradients of its MLP, R F + 2 R D elements, and with
      activation checkpointing the recomputed tensors of one block;
    - at its end, without any tensor that was kept: the gradients of the table as head and as embedding, and their sum.

    Args:
        config: Sizes of the network.
        batch: B, images of a micro-batch.
        masked: m, masked tokens of the micro-batch; None means all tokens, an upper bound.
        precision: Precision of the Trainer.
        checkpointing: ``blocks`` recomputes blocks in the backward pass instead of keeping their tensors.
        vocabulary: Columns of the softmax of the loss.
    """
    rows = batch * _length(config)
    masked_rows = batch * config.num_tokens if masked is None else masked
    dim, half, columns = config.embed_dim, precision == "bf16-mixed", _columns(config, vocabulary)
    drop = _DROPPED * (config.dropout > 0)
    # 8 bytes per row: the int64 index that the embedding keeps for its backward pass.
    embedding = rows * (dim * (FLOAT + drop) + _STATISTICS + 8)
    middle = _block_kept(config, batch, rows, half=half)
    # The MLP of the last block only sees the masked rows, whose logits the loss reads.
    last = _block_kept(config, batch, masked_rows, half=half)
    blocks = (config.depth - 1) * middle + last
    recomputed = 0
    if checkpointing == "blocks":
        # Each block keeps its float32 input; one block at a time has its tensors back.
        blocks, recomputed = config.depth * rows * dim * FLOAT, middle if config.depth > 1 else last
    number = HALF if half else FLOAT
    is_whole = rows_at_once(masked_rows, columns) == masked_rows  # else a chunk's logits are computed twice
    head = masked_rows * (dim * (3 * number + FLOAT) + _STATISTICS + is_whole * columns * FLOAT)
    feed_forward = rows * (config.mlp_dim * number + 2 * dim * FLOAT)
    matrices = config.depth * (4 * dim**2 + 2 * dim * config.mlp_dim) + dim**2 + columns * dim
    kept = embedding + blocks + head
    peaks = _logits_working(config, masked_rows, columns), recomputed + feed_forward - head, 3 * _table(config) - kept
    return Activations(kept=kept, casts=matrices * HALF if half else 0, working=max(peaks))


def _block_kept(config: TransformerConfig, batch: int, masked_rows: int, *, half: bool) -> int:
    """Returns the bytes that a block keeps for its backward pass.

    - For all R rows: input, queries, keys, values and the output of the heads, 5 D elements, and the log-sum-exp of
      each head, h float32.
    - For the rows of the MLP (all, or only the masked ones in the last block): the inputs of both norms and of the
      first linear layer, 3 D; F before and F after the GELU; the masks of both dropouts, 2 D bools; the statistics of
      the norms; in the last block also a copy of the output of the heads, D.

    bf16-mixed halves the inputs and outputs of matrix products; the inputs of norms stay float32.
    """
    rows = batch * _length(config)
    d, f, number = config.embed_dim, config.mlp_dim, HALF if half else FLOAT
    attention = rows * (5 * d * number + config.num_heads * FLOAT)
    copied = masked_rows * d * number if masked_rows != rows else 0
    norms = masked_rows * (2 * d * FLOAT + 2 * _STATISTICS)
    dropped = masked_rows * 2 * d * _DROPPED if config.dropout > 0 else 0
    return attention + copied + norms + masked_rows * (d + 2 * f) * number + dropped


def _logits_working(config: TransformerConfig, masked_rows: int, columns: int) -> int:
    """Returns the temporary bytes at the start of the backward pass; see ``transformer_activations``."""
    at_once = rows_at_once(masked_rows, columns)
    is_whole = at_once == masked_rows
    logits = 3 * masked_rows * columns if is_whole else (4 * at_once + 2 * config.embed_dim) * columns
    # The gradient of the rows in the loss becomes one of the whole table.
    return logits * FLOAT + (_table(config) if columns < config.num_rows else 0)


def _table(config: TransformerConfig) -> int:
    """Returns the bytes of the token embedding, or of its gradient."""
    return config.embed_dim * config.num_rows * FLOAT


def _length(config: TransformerConfig) -> int:
    return config.num_tokens + (config.attention == "bidirectional")


def _columns(config: TransformerConfig, vocabulary: Vocabulary) -> int:
    """Returns the number of columns of the logits of the loss."""
    return config.num_columns(config.loss_columns(vocabulary))


def step_flops(config: TransformerConfig, *, images: int, masked: float, vocabulary: Vocabulary = "all") -> float:
    """Returns the useful FLOPs of forward and backward pass: matrix products, without recomputation.

    A linear layer costs 2 FLOPs per weight and row in the forward pass, and twice that in the backward pass: 6 in all.
    The MLP of the last block and the head see only the masked rows. Attention is two products of S x S x D per image:
    4 S^2 D FLOPs, and twice that in the backward pass.

        6 R (L 4 D^2 - D^2 + (L - 1) 2 D F)  +  6 m (D^2 + 2 D F + D^2 + D V)  +  12 images L S^2 D

    Args:
        config: Sizes of the network.
        images: Images of the step over all ranks.
        masked: Masked tokens of these images.
        vocabulary: Columns of the softmax of the loss.
    """
    d, f, length = config.embed_dim, config.mlp_dim, _length(config)
    rows = images * length
    # Queries, keys and values of every block, and the rest of all blocks except the last.
    at_all_rows = config.depth * 3 * d**2 + (config.depth - 1) * (d**2 + 2 * d * f)
    # Output projection and MLP of the last block, and both layers of the head.
    at_masked_rows = d**2 + 2 * d * f + d**2 + d * _columns(config, vocabulary)
    return 6 * rows * at_all_rows + 6 * masked * at_masked_rows + 12 * images * config.depth * length**2 * d


@dataclass(frozen=True)
class CountedStep:
    """The products of a step and the tensors that it keeps.

    Attributes:
        flops: FLOPs of matrix products and convolutions, forward and backward, without recomputation.
        outside: Bytes that autograd keeps outside of the blocks.
        inputs: Bytes of the inputs of the blocks that are not in ``outside``.
        in_blocks: Bytes that autograd keeps in each block, without its input.
    """

    flops: int
    outside: int
    inputs: int
    in_blocks: tuple[int, ...]

    def kept(self, checkpointing: Checkpointing) -> int:
        """Returns the bytes of the kept tensors; with ``blocks``, one block at a time has its own."""
        own = max(self.in_blocks, default=0) if checkpointing == "blocks" else sum(self.in_blocks)
        return self.outside + self.inputs + own


def count_backbone(
    config: BackboneConfig,
    *,
    images: int = 1,
    masked: int,
    vocabulary: Vocabulary = "all",
    precision: Precision = "32-true",
) -> CountedStep:
    """Counts the training step of a backbone, without dropout: that of attention is not fused on a CPU.

    bf16-mixed has the dtypes of autocast on a CPU, which are those on a GPU for the layers of our backbones.

    Args:
        config: Configuration of the backbone.
        images: Images of the step.
        masked: Tokens of each image whose logits the loss reads. A backbone without a ``forward_selected`` of its own
            computes all.
        vocabulary: Columns of the softmax of the loss.
        precision: Precision of the Trainer.
    """
    without_dropout: dict[str, Any] = {"dropout": 0.0}
    with skeletons():
        network = replace(config, **without_dropout).create()
    columns = config.loss_columns(vocabulary)

    def step() -> None:
        tokens = torch.zeros(images, config.num_tokens, dtype=torch.int64)
        labels = torch.zeros(images, dtype=torch.int64)
        vectors = torch.zeros(images, config.condition_dim) if config.condition_dim else None
        if type(network).forward_selected is Backbone.forward_selected:
            logits = network(tokens, labels, vectors=vectors, vocabulary=columns)
        else:
            positions = torch.zeros(images * masked, dtype=torch.int64)
            logits = network.forward_selected(tokens, labels, positions, vectors=vectors, vocabulary=columns)
        torch.autograd.backward(F.log_softmax(logits.float(), dim=-1).mean())

    with fake_tensors(network), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return count_step(step, [network], blocks=network.blocks)


def count_step(
    step: Callable[[], object], networks: Iterable[nn.Module], *, blocks: Iterable[nn.Module] = ()
) -> CountedStep:
    """Runs a step and counts its FLOPs and the tensors that it keeps. Inside ``fake_tensors``, nothing is computed.

    Args:
        step: Function that runs forward and backward pass of a micro-batch.
        networks: Networks whose weights and buffers exist already.
        blocks: Blocks that activation checkpointing would run again.
    """
    owned = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    kept, products = _KeptTensors(owned, blocks), FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    products.mod_tracker = _NoModules()  # type: ignore[assignment]  # has all that is used of it
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(kept.watch())
        stack.enter_context(products)
        step()
    return kept.counts(products.get_total_flops())


def fake_tensors(*networks: nn.Module) -> FakeTensorMode:
    """Returns a context in which new tensors are fake: they have shapes, but no content. It can be entered repeatedly.

    Args:
        networks: Networks whose weights become fake, in place and permanently, for this context only. They may be on
            the meta device.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for network in networks:
            network._apply(_empty)  # type: ignore[no-untyped-call]  # torch: untyped
    return mode


def _empty(old: Tensor) -> Tensor:
    return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)


class _KeptTensors:
    """The storages that autograd keeps for the backward pass, by the block that keeps them first.

    Args:
        known: Tensors that are not counted.
        blocks: Blocks of the networks.
    """

    def __init__(self, known: Iterable[Tensor], blocks: Iterable[nn.Module]) -> None:
        self._place: nn.Module | Literal["outside", "inputs"] = "outside"
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._kept: dict[int, tuple[Any, torch.UntypedStorage]] = {}  # alive, so that no number is used again
        self._blocks = tuple(blocks)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Counts in a context."""
        hooks = [
            hook
            for block in self._blocks
            for hook in (block.register_forward_pre_hook(self._enter), block.register_forward_hook(self._leave))
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def counts(self, flops: int) -> CountedStep:
        """Returns the bytes, together with ``flops``."""

        def size(place: nn.Module | str) -> int:
            return sum(storage.nbytes() for where, storage in self._kept.values() if where is place)

        return CountedStep(flops, size("outside"), size("inputs"), tuple(size(block) for block in self._blocks))

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # views share it and are counted once
        if storage._cdata not in self._known:
            self._kept.setdefault(storage._cdata, (self._place, storage))
        return tensor

    def _enter(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._place = "inputs"
        for argument in arguments:
            if isinstance(argument, Tensor):
                self._keep(argument)
        self._place = block

    def _leave(self, block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self._place = "outside"


class _NoModules(nullcontext[None]):
    """Replaces the tracker of modules of ``FlopCounterMode``, whose hooks fail in ``autograd.grad``."""

    parents = frozenset({"Global"})


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch: untyped


def _attention_backward_flops(gradient: Sequence[int], *shapes: Sequence[int], **_: Any) -> int:
    return 2 * _attention_flops(*shapes)


_ATTENTION = {  # the CPU's fused kernel, which torch leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
