"""Runs a step on tensors without content, and counts its highest memory and its FLOPs; nothing is computed.

For networks that have no closed formula: those of stage 1, whose step differentiates several losses at the image, one
of them twice, and feature networks of others. bfloat16 is used where autocast uses it on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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

__all__ = ["LiveBytes", "Replay", "fake_tensors", "replay"]


@dataclass(frozen=True)
class Replay:
    """Memory and FLOPs of a step.

    Attributes:
        peak: Bytes of the tensors that the step made and that were alive at the same time, at the highest point.
            Weights and gradients that existed before do not count; gradients that the step makes do.
        flops: FLOPs of matrix products and convolutions, forward and backward.
        casts: Bytes of bfloat16 copies of weights, a part of ``peak``: the only part that does not grow with the batch.
    """

    peak: int
    flops: int
    casts: int = 0

    def peak_of(self, times: int) -> int:
        """Returns ``peak`` for a batch that is ``times`` as large."""
        return self.casts + times * (self.peak - self.casts)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch: untyped
    """Counts the bytes of tensors that are made in the context and still alive.

    Args:
        known: Tensors that existed before and do not count.
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
        """Calls ``func``, and counts the results that have memory of their own."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        return made

    def _see(self, tensor: Tensor, *, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes() if counts else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def replay(step: Callable[[], object], networks: Iterable[nn.Module], *, precision: Precision = "32-true") -> Replay:
    """Runs a step and counts its memory and FLOPs; inside ``fake_tensors`` nothing is computed.

    Args:
        step: Forward and backward pass of a micro-batch.
        networks: Networks whose weights, buffers and gradients existed before.
        precision: Precision of the Trainer.
    """
    owned = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    known = [*owned, *(tensor.grad for tensor in owned if tensor.grad is not None)]
    with ExitStack() as stack:
        live = stack.enter_context(LiveBytes(known))
        products = stack.enter_context(_Products())
        autocast = stack.enter_context(_AutocastOfGPU()) if precision == "bf16-mixed" else None
        step()
        casts = 0 if autocast is None else sum(cast.nbytes for cast in autocast.casts.values())
    return Replay(live.peak, products.flops, casts)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch: untyped
    """Sums FLOPs by torch's formulas; its ``FlopCounterMode`` also follows modules, and fails in ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch: untyped
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls ``func``, and counts it if it is a product."""
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=made))
        return made


@contextmanager
def fake_tensors(*networks: nn.Module) -> Iterator[None]:
    """Makes tensors of the context have sizes and no content; these networks' weights lose theirs for good.

    Args:
        networks: Networks, changed in place; they may be on the meta device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks:
            network._apply(_empty)  # type: ignore[no-untyped-call]  # torch: untyped
        yield


def _empty(old: Tensor) -> Tensor:
    return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)


_IN_BFLOAT16 = {F.conv2d, F.linear, F.conv_transpose2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm}
_IN_FLOAT32 = {F.group_norm, F.layer_norm, F.softplus, F.mse_loss, F.l1_loss, F.log_softmax, F.softmax}


class _AutocastOfGPU(TorchFunctionMode):
    """Acts as ``torch.autocast("cuda", torch.bfloat16)`` for tensors on the CPU, whose own autocast has another list.

    Source: torch's documentation of automatic mixed precision, operators that autocast to float16 or to float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, Tensor] = {}  # of weights: autocast keeps them until it ends

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Casts the arguments of products and norms."""
        kwargs = kwargs or {}
        if func in (Tensor.backward, torch.autograd.backward):
            with self:  # off while it handles a call, and needed by blocks whose forward pass runs again
                return _run_backward(args[0])
        if func in _IN_BFLOAT16:
            args, kwargs = tree_map_only(Tensor, self._half, (args, kwargs))
        elif func in _IN_FLOAT32:
            args, kwargs = tree_map_only(Tensor, _whole, (args, kwargs))
        return func(*args, **kwargs)

    def _half(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(torch.bfloat16)
        return self.casts[id(tensor)]


def _run_backward(losses: Tensor | tuple[Tensor, ...]) -> None:
    """Calls autograd as ``loss.backward()`` does, which cannot be called while its own call is handled."""
    losses = (losses,) if isinstance(losses, Tensor) else losses
    ones = tuple(torch.ones_like(loss) for loss in losses)
    engine = torch.autograd.Variable._execution_engine
    keep_graph = create_graph = False
    engine.run_backward(losses, ones, keep_graph, create_graph, (), allow_unreachable=True, accumulate_grad=True)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
