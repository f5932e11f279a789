"""Linear layers, MLPs, attention and norms for inference on a CPU, with weights in the layout that products read.

Transformers are built of ``PackingLinear``, ``feed_forward``, ``attend`` and ``rms_norm``. ``set_packing`` turns
packing on, which ``MaskGIT`` does for the networks that it loads.

A matrix product on a CPU first copies the weight to blocks that fit its instructions. For a few hundred rows, as in
decoding, this takes a fifth to a half of the time. ``PackingLinear`` copies it once. float32 weights are packed by MKL,
bfloat16 weights by oneDNN on CPUs with bfloat16 instructions. The packed copy takes as much memory as the weight.
Outputs are those of a plain layer to rounding. A weight is packed again when it has changed (``WeightWatch``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from maskgit_pl.devices import has_amx, has_bfloat16

_Part = tuple[int, int, int]
"""A part of a weight: the dimension, 0 for rows and 1 for columns; the first of them; the last one + 1."""

_Gate = Callable[[Tensor, Tensor], Tensor]

_USUAL_ROWS = 256  # of an input, for which MKL chooses its blocks; the result does not depend on it
_ROWS_IN_CACHE = 32  # on which GELU works at once
_GELU_SCALE = 2 * math.sqrt(2 / math.pi)
# Bytes of hidden values per thread above which two parts, or parts of at least 1024 values, are faster.
_HALVED, _SPLIT = 2_000_000, 4_000_000
_SMALLEST_PART = 1024
# Keys from which two products beat the fused attention without gradients, and bytes of the scores that then stay in
# the cache; keys up to which they beat it in training.
_MANY_KEYS, _SCORE_BYTES = 128, 4_000_000
_FEW_KEYS = 512

# All entries of a tensor of at most 4096 are compared, else every 509th: the number is prime, so they lie in different
# columns. For the released size this takes 0.3 % of the time of one image on a CPU; all entries take 1.2 to 2.4 %.
_SMALL_WEIGHT, _STRIDE = 4096, 509

_has_amx = cache(has_amx)


class PackingLinear(nn.Linear):
    """A linear layer, with GELU if asked for, that packs its weight for inference on a CPU.

    The weight stays a parameter. It is packed at the first call without gradients after ``set_packing``, and
    again after an optimizer step or an operation in place. ``WeightWatch`` names the changes that nothing
    counts; call ``free_packed`` after them.

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
        if packed is None:
            return self._activate(F.linear(x, weight, bias))
        if x.dtype == torch.bfloat16:
            operation, form = ("gelu", "tanh") if self.gelu else ("none", "")
            fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, operation, [], form)
            return fused
        out: Tensor = torch.ops.mkl._mkl_linear(x, packed, weight, bias, x.numel() // x.shape[-1])
        return _apply_gelu(out) if self.gelu else out

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
        packed = None
        if x.dtype == torch.bfloat16:
            packed = self._obtain_packed(x, weight, (0, 0, self.out_features) if is_all else (1, first, last))
        if packed is None:
            product = F.linear(x, weight if is_all else weight[:, first:last], bias)
            return product if to is None else to + product
        if to is None:
            started: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
            return started
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
        return (
            self.packs
            and x.dtype == weight.dtype
            and x.ndim > 0
            and x.shape[-1] == width  # the packed product does not check it, and reads beyond the memory
            and not torch.is_grad_enabled()
        )

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
            rows = weight.detach().narrow(dimension, first, last - first)
            packed = self._packed[part] = _Packed(weight.detach(), _count_changes(weight), _pack(rows))
        return packed.data

    def _activate(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if self.gelu else x

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, which pack for themselves."""
        return self.__dict__ | {"_packed": {}}


def set_packing(network: nn.Module, *, enabled: bool) -> None:
    """Lets the linear layers of a network pack their weights, or stops it and frees the packed weights.

    Args:
        network: Network whose ``PackingLinear`` layers are set.
        enabled: True packs at the next call without gradients, if the weights are on a CPU that gains by it.
    """
    for layer in network.modules():
        if isinstance(layer, PackingLinear):
            layer.packs = enabled
    if not enabled:
        free_packed(network)


def free_packed(network: nn.Module) -> None:
    """Frees the packed weights of a network, such as those of a device that it has left."""
    for layer in network.modules():
        if isinstance(layer, PackingLinear):
            layer._packed.clear()


def add_output(to: Tensor, layer: PackingLinear, x: Tensor) -> Tensor:
    """Returns ``to + layer(x)``, the sum of a residual; to rounding, if a packed bfloat16 product can add it itself."""
    if x.dtype == torch.bfloat16 and layer.packs_for(x):
        return layer.add_part(to, x, 0, layer.in_features)
    out: Tensor = to + layer(x)
    return out


def feed_forward(
    x: Tensor, inner: PackingLinear, outer: PackingLinear, gate: _Gate | None = None, *, to: Tensor | None = None
) -> Tensor:
    """Returns the output of an MLP, ``outer(inner(x))``.

    Packed bfloat16 products are so fast that the second layer waits for hidden values that have left the
    cache. With many rows, some of the hidden values are therefore computed and multiplied at once, and the
    products of these parts are added, which is the same to rounding.

    Args:
        x: (..., D).
        inner: Layer (..., D) -> (..., H) with the activation; (..., D) -> (..., 2 H) with ``gate``.
        outer: Layer (..., H) -> (..., E).
        gate: Function of both halves of the output of ``inner``, (..., H) each, to hidden values (..., H). It
            works value by value.
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

    In bfloat16 on a CPU, two products and a softmax are often faster than torch's fused attention. In training they
    take 0.6 to 0.9 of its time for 257 keys, and half of it with dropout. Without gradients they take 0.6 of it on
    CPUs without AMX, if the scores stay in the cache. The scores are then rounded to bfloat16.

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
    x: Tensor, inner: PackingLinear, outer: PackingLinear, gate: _Gate | None, to: Tensor | None, num_parts: int
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
        changes: ``_count_changes`` of the weight when it was packed.
        data: Packed part, of MKL or oneDNN.
    """

    source: Tensor
    changes: tuple[int, int]
    data: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """Returns True if a weight is the one that was packed, unchanged."""
        return self.source.data_ptr() == weight.data_ptr() and self.changes == _count_changes(weight)


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
    dtypes = []
    if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]  # torch: untyped
        dtypes.append(torch.float32)
    if has_bfloat16("cpu"):
        dtypes.append(torch.bfloat16)
    return tuple(dtypes)


@cache
def _multiplies_bfloat16() -> bool:
    """Returns True for a CPU with instructions for bfloat16, but not for tiles of it."""
    return has_bfloat16("cpu") and not has_amx()


def _pack(weight: Tensor) -> Tensor:
    """Packs a weight (out, in) or a part of it, float32 or bfloat16."""
    if weight.dtype == torch.bfloat16:
        blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return blocks
    panels: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), _USUAL_ROWS)
    return panels


def _apply_gelu(x: Tensor) -> Tensor:
    """Replaces a float32 tensor (..., D) by its GELU in the tanh form, and returns it.

    With u = sqrt(2 / pi) (x + 0.044715 x^3), 0.5 x (1 + tanh u) = x sigmoid(2 u). Operations on rows that
    stay in the cache take two thirds of the time of torch's GELU.
    """
    scale = torch.tensor(_GELU_SCALE)
    for rows in torch.split(x.view(-1, x.shape[-1]), _ROWS_IN_CACHE):
        rows.mul_(torch.addcmul(scale, rows, rows, value=_GELU_SCALE * 0.044715).mul_(rows).sigmoid_())
    return x


class WeightWatch:
    """Detects changes of the weights of a network, so that nothing computed from old weights is used after them.

    torch counts operations in place, such as those of ``load_state_dict``. It does not count fused optimizers, nor
    writes to ``weight.data`` or to the memory of a weight through NumPy. The changes are therefore found in three ways:

    1. ``Tensor._version`` counts operations in place.
    2. A hook counts the steps of all optimizers of the process.
    3. A sample of the weights is compared with their earlier values, which finds the writes that nothing
       counts. Only writes to few entries can stay unnoticed.

    ``PackingLinear`` uses 1 and 2 at every call, a pipeline all three at every call of its methods.

    Args:
        network: The network. Its parameters and buffers are compared.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._marks: list[tuple[int, tuple[int, int]]] = []
        self._parts: list[Tensor] = []  # views of the weights
        self._sample = torch.empty(0)
        self.has_changed()

    def has_changed(self) -> bool:
        """Returns True if the weights may have changed since the last call, at first since the watch was made."""
        weights = [*self._network.parameters(), *self._network.buffers()]
        marks = [(weight.data_ptr(), _count_changes(weight)) for weight in weights]
        is_counted = marks != self._marks
        if is_counted:
            self._marks, self._parts = marks, [_view_sample(weight) for weight in weights]
        sample, before = torch.cat(self._parts), self._sample
        self._sample = sample
        return is_counted or not torch.equal(sample, before)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, which have other memory."""
        return self.__dict__ | {"_marks": [], "_parts": [], "_sample": torch.empty(0)}


def _view_sample(weight: Tensor) -> Tensor:
    """Returns the compared entries of a weight: a view, if the weight is contiguous."""
    return weight.detach().reshape(-1)[:: _STRIDE if weight.numel() > _SMALL_WEIGHT else 1]


def _count_changes(weight: Tensor) -> tuple[int, int]:
    """Returns two numbers that differ after an optimizer step and after an operation in place on a weight."""
    # torch does not count the changes of tensors that were made in inference mode.
    return _Steps.count, 0 if weight.is_inference() else weight._version


class _Steps:
    """The number of steps of all optimizers of the process."""

    count = 0


def _count_step(*_: object) -> None:
    _Steps.count += 1


register_optimizer_step_post_hook(_count_step)
