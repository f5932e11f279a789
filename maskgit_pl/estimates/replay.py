"""Replay of a step with fake tensors: measures its peak memory and its FLOPs without computing anything.

Used for networks without closed formulas: those of stage 1, whose step differentiates several losses with respect to
the image, one of them twice, and third-party feature networks. bfloat16 is used where autocast uses it on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from maskgit_pl.estimates.transformer import Precision

__all__ = ["LiveBytes", "Replay", "fake_tensors", "replay", "run_backward"]


@dataclass(frozen=True)
class Replay:
    """The memory and FLOPs of a step.

    Attributes:
        peak: Peak memory in bytes of the tensors that the step allocates. Weights and gradients that existed before
            are not counted; gradients that the step allocates are.
        flops: FLOPs of matrix products and convolutions, forward and backward.
        casts: Bytes of bfloat16 copies of trained weights, a part of ``peak`` that does not grow with the batch.
    """

    peak: int
    flops: int
    casts: int = 0

    def peak_of(self, times: int) -> int:
        """Returns ``peak`` for a batch that is ``times`` as large, if only ``casts`` do not grow with it."""
        return self.casts + times * (self.peak - self.casts)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch: untyped
    """A dispatch mode that counts the bytes of living tensors that were allocated in its context.

    Attributes:
        live: Bytes that are alive now.
        peak: Maximum of ``live``.

    Args:
        known: Existing tensors, which are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch: untyped
        self.live = self.peak = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._see(tensor, counts=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls ``func``, and counts the results that do not share memory with known tensors."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        return made

    def _see(self, tensor: Tensor, *, counts: bool = True) -> None:
        storage = tensor.untyped_storage()  # views share it and are counted once
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes() if counts else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        # Called when the last tensor that shares the storage is freed.
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def replay(step: Callable[[], object], networks: Iterable[nn.Module], *, precision: Precision = "32-true") -> Replay:
    """Runs a step and measures its memory and FLOPs. Inside ``fake_tensors``, nothing is computed.

    Args:
        step: Function that runs forward and backward pass of a micro-batch.
        networks: Networks whose weights, buffers and gradients exist already.
        precision: Precision of the Trainer.
    """
    owned = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    known = [*owned, *(tensor.grad for tensor in owned if tensor.grad is not None)]
    with ExitStack() as stack:
        # The modes see each operation in reverse order: autocast first, then FLOPs, then memory.
        live = stack.enter_context(LiveBytes(known))
        products = stack.enter_context(_Products())
        autocast = None
        if precision == "bf16-mixed":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            autocast = stack.enter_context(_AutocastOfGPU())
        step()
        casts = 0 if autocast is None else sum(cast.nbytes for cast in autocast.casts.values())
    return Replay(live.peak, products.flops, casts)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch: untyped
    """A dispatch mode that sums FLOPs by torch's formulas; ``FlopCounterMode`` fails in ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch: untyped
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls ``func``, and counts its FLOPs if it is a matrix product or a convolution."""
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=made))
        return made


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


_IN_BFLOAT16 = {F.conv2d, F.linear, F.conv_transpose2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm}
_FUNCTIONS = "softmax log_softmax logsumexp sum cumsum prod exp log rsqrt square pow"  # also methods of tensors
_IN_FLOAT32 = {
    *(F.group_norm, F.layer_norm, F.rms_norm, F.normalize, F.cosine_similarity, F.softplus, F.mse_loss, F.l1_loss),
    *(F.log_softmax, F.softmax, F.interpolate, Tensor.__pow__),
    *(getattr(home, name) for home in (torch, Tensor) for name in _FUNCTIONS.split()),
}


class _AutocastOfGPU(TorchFunctionMode):
    """A function mode that applies the rules of ``torch.autocast("cuda", torch.bfloat16)`` to tensors on the CPU.

    The CPU's own autocast, inside of which it works, has fewer rules: products are in bfloat16, but norms are not in
    float32. Where a network turns that autocast off, this mode is off, too.

    Source: torch's documentation of automatic mixed precision, operators that autocast to float16 or to float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, Tensor] = {}  # copies of weights, which autocast keeps until it ends

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Casts the arguments of matrix products to bfloat16, and those of norms and losses to float32."""
        kwargs = kwargs or {}
        if func in (Tensor.backward, torch.autograd.backward):
            # The mode is off while it handles a call, but checkpointed blocks run their forward pass here.
            with self:
                return run_backward(args[0])
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if func in _IN_BFLOAT16:
            args, kwargs = tree_map_only(Tensor, self._half, (args, kwargs))
        elif func in _IN_FLOAT32:
            args, kwargs = tree_map_only(Tensor, _whole, (args, kwargs))
        return func(*args, **kwargs)

    def _half(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):  # an activation: no cache
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(torch.bfloat16)
        return self.casts[id(tensor)]


def run_backward(losses: Tensor | tuple[Tensor, ...]) -> None:
    """Runs ``loss.backward()`` inside the function modes, which are off while they handle a call of that method."""
    losses = (losses,) if isinstance(losses, Tensor) else losses
    ones = tuple(torch.ones_like(loss) for loss in losses)
    engine = torch.autograd.Variable._execution_engine
    keep_graph = create_graph = False
    engine.run_backward(losses, ones, keep_graph, create_graph, (), allow_unreachable=True, accumulate_grad=True)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
