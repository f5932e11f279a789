"""FLOPs of a training step and the tensors that it keeps, counted with tensors that have a shape but no content.

Used for networks without closed formulas: those of stage 1, and all backbones but the transformer of the paper. Their
step must have no operation whose result has a size that depends on values.
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

from maskgit_pl.networks.backbone import Backbone, BackboneConfig, Vocabulary
from maskgit_pl.networks.skeleton import skeletons
from maskgit_pl.runs.transformer import Checkpointing, Precision

__all__ = ["CountedStep", "count_backbone", "count_step", "fake_tensors"]


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


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch: untyped


def _attention_backward_flops(gradient: Sequence[int], *shapes: Sequence[int], **_: Any) -> int:
    return 2 * _attention_flops(*shapes)


_ATTENTION = {  # the CPU's fused kernel, which torch leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class _NoModules(nullcontext[None]):
    """Replaces the tracker of modules of ``FlopCounterMode``, whose hooks fail in ``autograd.grad``."""

    parents = frozenset({"Global"})


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
