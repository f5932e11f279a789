"""Linear layers that pack their weights for inference on a CPU: the layout that matrix products read, made only once.

A matrix product on a CPU first copies the weight to blocks that fit its instructions. For a few hundred rows, as in
decoding, this takes a fifth to a half of the time. Transformers are built of ``PackingLinear``; ``set_packing`` turns
packing on, which ``MaskGIT`` does for the networks that it loads.

float32 weights are packed by MKL, bfloat16 weights by oneDNN on CPUs with bfloat16 instructions. The packed copy takes
as much memory as the weight. Outputs are those of a plain layer to rounding.

A packed weight that is used often moves to ``large_pages``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.devices import has_bfloat16
from maskgit_pl.networks import large_pages
from maskgit_pl.networks.weight_changes import count_changes

__all__ = ["PackingLinear", "add_output", "free_packed", "set_packing"]

_USUAL_ROWS = 256  # for which MKL chooses its blocks; the result does not depend on it
_ROWS_IN_CACHE = 32
_GELU_SCALE = 2 * math.sqrt(2 / math.pi)
_SMALL = 2**20  # bytes; networks of smaller weights gain nothing by large pages

_Part = tuple[int, int, int]
"""A part of a weight: the dimension, 0 for rows and 1 for columns; the first of them; the last one + 1."""


@dataclass(slots=True)
class _Packed:
    """A packed part of a weight, and the weight that it was made of.

    Args:
        source: The whole weight. While it is kept, no other weight can have its memory.
        changes: ``weight_changes.count_changes`` of the weight when it was packed.
        data: Packed part, of MKL or oneDNN.
        num_bytes: Size of the part.
        uses: Number of products so far.
    """

    source: Tensor
    changes: tuple[int, int]
    data: Tensor
    num_bytes: int
    uses: int = 0

    def is_of(self, weight: Tensor) -> bool:
        """Returns True if a weight is the one that was packed, unchanged."""
        return self.source.data_ptr() == weight.data_ptr() and self.changes == count_changes(weight)

    def move_to_large_pages(self) -> None:
        """Moves the packed part to large pages, unless it is small."""
        if self.num_bytes >= _SMALL:
            large_pages.move(torch.ops.mkldnn.data_ptr(self.data), torch.ops.mkldnn._nbytes(self.data))


class PackingLinear(nn.Linear):
    """A linear layer, with GELU if asked for, that packs its weight for inference on a CPU.

    The weight stays a parameter. It is packed at the first call without gradients after ``set_packing``, and again
    after an optimizer step or an operation in place. ``weight_changes`` names the changes that nothing counts; call
    ``free_packed`` after them.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        bias: True adds a learned bias.
        gelu: True applies GELU in its tanh form to the output.

    Attributes:
        packs: True if the layer may pack its weight.
        uses_in_small_pages: Number of products after which a packed weight moves to large pages. The move takes as long
            as some 30 products gain by it.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, gelu: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.gelu = gelu
        self.packs = False
        self.uses_in_small_pages = 32
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
        found = self._packed.get(part)
        if found is None or not found.is_of(weight):
            if not _can_pack(weight):
                return None
            rows = weight.detach().narrow(dimension, first, last - first)
            found = self._packed[part] = _Packed(weight.detach(), count_changes(weight), _pack(rows), rows.nbytes)
        if found.uses == self.uses_in_small_pages:
            found.move_to_large_pages()
        found.uses += 1
        return found.data

    def _activate(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if self.gelu else x

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, which pack for themselves."""
        return self.__dict__ | {"_packed": {}}


def add_output(to: Tensor, layer: nn.Module, x: Tensor) -> Tensor:
    """Returns ``to + layer(x)``, the sum of a residual; to rounding, if a packed bfloat16 product can add it itself."""
    if isinstance(layer, PackingLinear) and x.dtype == torch.bfloat16 and layer.packs_for(x):
        return layer.add_part(to, x, 0, layer.in_features)
    out: Tensor = to + layer(x)
    return out


def free_packed(network: nn.Module) -> None:
    """Frees the packed weights of a network, such as those of a device that it has left."""
    for layer in network.modules():
        if isinstance(layer, PackingLinear):
            layer._packed.clear()


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


def _apply_gelu(x: Tensor) -> Tensor:
    """Replaces a float32 tensor (..., D) by its GELU in the tanh form, and returns it.

    With u = sqrt(2 / pi) (x + 0.044715 x^3), 0.5 x (1 + tanh u) = x sigmoid(2 u). Operations on rows that stay in the
    cache take two thirds of the time of torch's GELU.
    """
    scale = torch.tensor(_GELU_SCALE)
    for rows in torch.split(x.view(-1, x.shape[-1]), _ROWS_IN_CACHE):
        rows.mul_(torch.addcmul(scale, rows, rows, value=_GELU_SCALE * 0.044715).mul_(rows).sigmoid_())
    return x


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
    found = []
    if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]  # torch: untyped
        found.append(torch.float32)
    if has_bfloat16("cpu"):
        found.append(torch.bfloat16)
    return tuple(found)


def _pack(weight: Tensor) -> Tensor:
    """Packs a weight (out, in) or a part of it, float32 or bfloat16."""
    if weight.dtype == torch.bfloat16:
        blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return blocks
    panels: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), _USUAL_ROWS)
    return panels
