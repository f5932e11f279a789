"""Linear layers, MLPs, attention and norms that are fast on a CPU.

Transformers are built of ``FastLinear``, ``feed_forward``, ``attend`` and ``rms_norm``; heads multiply by ``linear``.

1. torch multiplies float32 by MKL. Where oneDNN is faster (``multiplies_by_onednn``), ``linear`` uses it, forward and
   backward.
2. A product first copies the weight to blocks that fit the instructions. ``FastLinear`` does it once for inference,
   after ``set_packing``, which ``MaskGIT`` calls. oneDNN packs float32 where it multiplies it, and bfloat16 on CPUs
   with instructions for it. The copy takes as much memory as the weight, and is renewed after changes (``watch``).

Elsewhere, and in compiled and exported graphs, both are the plain product of torch. Outputs are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.devices import has_amx, has_bfloat16, multiplies_by_onednn
from maskgit_pl.networks.watch import count_changes

_Part = tuple[int, int, int]
"""A part of a weight: the dimension, 0 for rows and 1 for columns; the first of them; the last one + 1."""

_Gate = Callable[[Tensor, Tensor], Tensor]

# Bytes of hidden values per thread above which two parts, or parts of at least 1024 values, are faster.
_HALVED, _SPLIT = 2_000_000, 4_000_000
_SMALLEST_PART = 1024
# Keys from which two products beat the fused attention without gradients, and bytes of the scores that then stay in
# the cache; keys up to which they beat it in training.
_MANY_KEYS, _SCORE_BYTES = 128, 4_000_000
_FEW_KEYS = 512

_has_amx = cache(has_amx)
_multiplies_by_onednn = cache(multiplies_by_onednn)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes ``torch.nn.functional.linear``, with its gradients, by the library that is faster on this CPU.

    Args:
        x: (..., in) float.
        weight: (out, in) float.
        bias: (out,) float; None for zero.

    Returns:
        (..., out) float.
    """
    if not _are_plain(x, weight, weight.shape[1]) or x.dtype != torch.float32 or not _multiplies_by_onednn():
        return F.linear(x, weight, bias)
    product: Tensor = (_Product.apply if torch.is_grad_enabled() else _multiply)(x, weight, bias)
    return product


class _Product(torch.autograd.Function):
    """``linear`` by oneDNN, whose products have no gradients of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # With create_graph, gradients have gradients: torch's own products have them.
        multiply = F.linear if torch.is_grad_enabled() else _multiply
        grads, rows = (part.reshape(-1, part.shape[-1]) for part in (grad, x))
        return (
            multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            multiply(grads.t(), rows.t()) if ctx.needs_input_grad[1] else None,
            grads.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """Returns the product of oneDNN with a weight as it is or packed, with GELU in its tanh form if asked for."""
    operation, form = ("gelu", "tanh") if gelu else ("none", "")
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, operation, [], form)
    return product


def _are_plain(x: Tensor, weight: Tensor, width: int) -> bool:
    """Returns True if x (..., width) and a weight may be given to oneDNN, whose products check nothing."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch: untyped
        and not torch.is_autocast_enabled("cpu")
        and x.dtype == weight.dtype
        and x.device.type == weight.device.type == "cpu"
        and x.ndim > 0
        and x.numel() > 0
        and x.shape[-1] == width  # oneDNN reads beyond the memory of a packed weight
        and type(x) is Tensor  # no DTensor or fake tensor
        and type(weight) in (Tensor, nn.Parameter)
    )


class FastLinear(nn.Linear):
    """A layer that multiplies by ``linear``, with GELU if asked for, and packs its weight for inference on a CPU.

    The weight stays a parameter. It is packed at the first call without gradients after ``set_packing``, and again
    after an optimizer step or an operation in place. Call ``free_packed`` after changes that nothing counts.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        bias: True adds a learned bias.
        gelu: True applies GELU in its tanh form to the output.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, gelu: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.gelu = gelu
        self.packs = False
        self._packed: dict[_Part, _Packed] = {}
        self._num_parts = 1

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output (..., out_features) for an input (..., in_features)."""
        return self.part(x, 0, self.out_features)

    def part(self, x: Tensor, first: int, last: int) -> Tensor:
        """Returns the outputs ``first`` to ``last`` - 1, (..., last - first), for an input (..., in_features)."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        packed = self._obtain_packed(x, weight, (0, first, last))
        if last - first < self.out_features:  # the whole is no view, which FSDP2 and compilation prefer
            weight, bias = weight[first:last], None if bias is None else bias[first:last]
        if packed is not None:
            return _multiply(x, packed, bias, gelu=self.gelu)
        out = linear(x, weight, bias)
        return F.gelu(out, approximate="tanh") if self.gelu else out

    def add_part(self, to: Tensor | None, x: Tensor, first: int, last: int) -> Tensor:
        """Adds the product of the inputs ``first`` to ``last`` - 1, without GELU, and the bias with the first input.

        Args:
            to: (..., out_features), what the product is added to; None for zero.
            x: (..., last - first), the inputs.
            first: First input.
            last: Last input + 1.

        Returns:
            (..., out_features).
        """
        weight, bias = self.weight, self.bias if first == 0 else None
        is_all = last - first == self.in_features
        packed = self._obtain_packed(x, weight, (0, 0, self.out_features) if is_all else (1, first, last))
        if packed is None:
            product = linear(x, weight if is_all else weight[:, first:last], bias)
            return product if to is None else to + product
        if to is None:
            return _multiply(x, packed, bias)
        added: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, to, packed, bias, "add")
        return added

    def packs_for(self, x: Tensor) -> bool:
        """Returns True if the layer would use a packed weight for an input (..., in_features)."""
        return self._reads_packed(x, self.weight, self.in_features) and _can_pack(self.weight)

    def set_num_parts(self, num_parts: int) -> None:
        """Frees the packed weight if it was used in another number of parts, so that it is not there twice."""
        if num_parts != self._num_parts:
            self._packed.clear()
            self._num_parts = num_parts

    def _reads_packed(self, x: Tensor, weight: Tensor, width: int) -> bool:
        """Returns True if an input of ``width`` values may be multiplied with a packed weight."""
        return self.packs and not torch.is_grad_enabled() and _are_plain(x, weight, width)

    def _obtain_packed(self, x: Tensor, weight: Tensor, part: _Part) -> Tensor | None:
        """Returns the packed part of the weight, packed now if it is new or has changed; None if x cannot read it."""
        # The weight is an argument because to find it takes a Module some time.
        dimension, first, last = part
        if not self._reads_packed(x, weight, last - first if dimension else self.in_features):
            return None
        packed = self._packed.get(part)
        if packed is None or not packed.is_of(weight):
            if not _can_pack(weight):
                return None
            rows = weight.detach().narrow(dimension, first, last - first).contiguous()
            blocks = torch.ops.mkldnn._reorder_linear_weight(rows)
            packed = self._packed[part] = _Packed(weight.detach(), count_changes(weight), blocks)
        return packed.data

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, which pack for themselves."""
        return self.__dict__ | {"_packed": {}}


def set_packing(network: nn.Module, *, enabled: bool) -> None:
    """Lets the linear layers of a network pack their weights, or stops it and frees the packed weights.

    Args:
        network: Network whose ``FastLinear`` layers are set.
        enabled: True packs at the next call without gradients, if the weights are on a CPU that gains by it.
    """
    for layer in network.modules():
        if isinstance(layer, FastLinear):
            layer.packs = enabled
    if not enabled:
        free_packed(network)


def free_packed(network: nn.Module) -> None:
    """Frees the packed weights of a network, such as those of a device that it has left."""
    for layer in network.modules():
        if isinstance(layer, FastLinear):
            layer._packed.clear()


def add_output(to: Tensor, layer: FastLinear, x: Tensor) -> Tensor:
    """Returns ``to + layer(x)``, the sum of a residual; to rounding, if a packed product can add it itself."""
    if layer.packs_for(x):
        return layer.add_part(to, x, 0, layer.in_features)
    out: Tensor = to + layer(x)
    return out


def feed_forward(
    x: Tensor, inner: FastLinear, outer: FastLinear, gate: _Gate | None = None, *, to: Tensor | None = None
) -> Tensor:
    """Returns the output of an MLP, ``outer(inner(x))``.

    Packed bfloat16 products are so fast that the second layer waits for hidden values that have left the cache. With
    many rows, some of them are therefore computed and multiplied at once, and the products of these parts are added.

    Args:
        x: (..., D).
        inner: Layer (..., D) -> (..., H) with the activation; (..., D) -> (..., 2 H) with ``gate``.
        outer: Layer (..., H) -> (..., E).
        gate: Function, value by value, of both halves of the output of ``inner`` to hidden values (..., H).
        to: (..., E), to which the output is added; None for zero.

    Returns:
        (..., E).
    """
    num_parts = 1
    if x.dtype == torch.bfloat16 and inner.packs_for(x):
        num_parts = _count_parts(x.numel() // x.shape[-1], outer.in_features)
    for layer in (inner, outer):
        layer.set_num_parts(num_parts)
    if num_parts > 1:
        return _sum_parts(x, inner, outer, gate, to, num_parts)
    hidden: Tensor = inner(x)
    if gate is not None:
        hidden = gate(*hidden.chunk(2, dim=-1))
    out: Tensor = outer(hidden) if to is None else add_output(to, outer, hidden)
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0, is_causal: bool = False) -> Tensor:
    """Computes attention, softmax(q k^T / sqrt(d)) v, for each image and head.

    In bfloat16 on a CPU, two products and a softmax, whose scores are rounded to bfloat16, take 0.6 to 0.9 of the time
    of torch's fused attention in training, and half of it with dropout. Without gradients they take 0.6 of it on CPUs
    without AMX, if the scores stay in the cache.

    Args:
        query: (B, heads, M, d).
        key: (B, heads, S, d).
        value: (B, heads, S, d).
        dropout: Probability that an attention weight is dropped, in [0, 1).
        is_causal: True if query i sees the first i + 1 keys only.

    Returns:
        (B, M, heads d).
    """
    num_keys, is_trained = key.shape[2], torch.is_grad_enabled()
    is_bfloat16 = query.dtype == torch.bfloat16 and query.device.type == "cpu" and not is_causal
    if is_bfloat16 and is_trained and (dropout or num_keys <= _FEW_KEYS):
        attended = _attend_in_products(query, key, value, dropout=dropout)
    elif is_bfloat16 and not is_trained and num_keys >= _MANY_KEYS and _multiplies_bfloat16():
        size = max(1, _SCORE_BYTES // (2 * query.shape[2] * num_keys))  # heads at once
        images = []
        for image in zip(query, key, value, strict=True):
            heads = zip(*(part.split(size) for part in image), strict=True)
            images.append(torch.cat([_attend_in_products(*parts, dropout=dropout) for parts in heads]))
        attended = torch.stack(images)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=is_causal)
    return attended.transpose(1, 2).flatten(2)


def _attend_in_products(query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> Tensor:
    weights = torch.softmax((query * query.shape[-1] ** -0.5) @ key.mT, dim=-1)
    return F.dropout(weights, dropout) @ value


def rms_norm(x: Tensor, *, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps), for x (..., D) and in its dtype."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    # On a CPU, torch's own copies x to float32 and back: five times the time of these passes for 8 images of 257 x 768.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).float()
    return x * torch.rsqrt(length.square() / x.shape[-1] + eps).to(x.dtype)


def _sum_parts(
    x: Tensor, inner: FastLinear, outer: FastLinear, gate: _Gate | None, to: Tensor | None, num_parts: int
) -> Tensor:
    hidden_dim = outer.in_features
    for first, last in pairwise(range(0, hidden_dim + 1, hidden_dim // num_parts)):
        hidden = inner.part(x, first, last)
        if gate is not None:
            hidden = gate(hidden, inner.part(x, hidden_dim + first, hidden_dim + last))
        to = outer.add_part(to, hidden, first, last)
    assert to is not None
    return to


def _count_parts(num_rows: int, hidden_dim: int) -> int:
    """Returns the number of equal parts of bfloat16 hidden values (num_rows, hidden_dim)."""
    if not _has_amx():  # the products are too slow to wait for the cache
        return 1
    num_bytes = 2 * num_rows * hidden_dim / torch.get_num_threads()
    most = hidden_dim // _SMALLEST_PART
    limit = most if num_bytes > _SPLIT else min(2, most) if num_bytes > _HALVED else 1
    return next((parts for parts in range(limit, 1, -1) if hidden_dim % parts == 0), 1)


@dataclass(slots=True)
class _Packed:
    """A packed part of a weight, and the weight that it was made of.

    Args:
        source: The whole weight. While it is kept, no other weight can have its memory.
        changes: ``count_changes`` of the weight when it was packed.
        data: Packed part.
    """

    source: Tensor
    changes: tuple[int, int]
    data: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """Returns True if a weight is the one that was packed, unchanged."""
        return self.source.data_ptr() == weight.data_ptr() and self.changes == count_changes(weight)


def _can_pack(weight: Tensor) -> bool:
    """Returns True if products with a packed weight are faster than with a weight, and its changes are counted."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _packed_dtypes()
        and not weight.is_inference()  # torch does not count its changes
    )


@cache
def _packed_dtypes() -> tuple[torch.dtype, ...]:
    """Returns the dtypes whose products are faster with packed weights on this CPU."""
    return (torch.float32,) * _multiplies_by_onednn() + (torch.bfloat16,) * has_bfloat16("cpu")


@cache
def _multiplies_bfloat16() -> bool:
    """Returns True for a CPU with instructions for bfloat16, but not for tiles of it."""
    return has_bfloat16("cpu") and not has_amx()
