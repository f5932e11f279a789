"""The transformer with 8-bit linear layers, for inference on CPUs without bfloat16 instructions: approximate.

Weights are rounded once, with a scale for each output. Inputs are rounded at each call, with a scale and an offset for
each token, so that the logits of an image do not depend on the rest of its batch. Embeddings, norms, attention and the
vocabulary head take little time and stay float32. ``MaskGIT.quantize`` uses ``quantize``.

Products with 8-bit weights are exact on most CPUs, and saturate on those without VNNI instructions. These get 7-bit
weights, so that their images differ from those of other CPUs.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from maskgit_pl.checks import shorten
from maskgit_pl.networks.backbone import Backbone, is_plugin
from maskgit_pl.networks.kernels import PackingLinear
from maskgit_pl.networks.transformer_block import QKVProjection
from maskgit_pl.networks.weights import skeletons

__all__ = ["Int8Linear", "find_largest_weight", "quantize"]

_LARGEST_INPUT = 255
_SMALLEST_SCALE = 1e-30  # of a row of zeros, whose scale would be 0


@cache
def find_largest_weight() -> int:
    """Returns the largest rounded weight: 127 if this CPU multiplies it exactly, else 63.

    Without VNNI instructions a CPU adds two products of input and weight in signed 16 bits, and saturates: 2 x 255 x
    127 is too large, 2 x 255 x 63 = 32,130 is not. The product of the largest numbers shows it; the names of
    instructions do not, since oneDNN can be told not to use them.
    """
    largest, length, outputs = 127, 64, 16
    packed = torch.ops.onednn.qlinear_prepack(torch.full((outputs, length), largest, dtype=torch.int8), None)
    expected = float(_LARGEST_INPUT * largest * length)
    # A single row may take another path than several.
    for rows in (1, 16):
        inputs = torch.full((rows, length), _LARGEST_INPUT, dtype=torch.uint8)
        if (_multiply(inputs, packed, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)) != expected).any():
            return 63
    return largest


def _multiply(inputs: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Returns the products (..., out) float32 of (..., in) uint8 and packed weights, times a scale for each output."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        inputs, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, whose input is rounded to 8 bits, token by token, at each call.

    For an input x = low + scale u with integers u: W x = scale (W u) + low (row sums of W).

    Args:
        weight: (out, in) float.
        bias: (out,) float; None for a layer without bias.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        self.scales = (weight.abs().amax(1) / find_largest_weight()).clamp(min=_SMALLEST_SCALE)
        rounded = (weight / self.scales.unsqueeze(1)).round()
        self.row_sums = rounded.sum(1) * self.scales
        self.bias = torch.zeros_like(self.scales) if bias is None else bias.detach().float().clone()
        self.zeros = torch.zeros_like(self.scales, dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output (..., out) float32 for an input (..., in) float32."""
        # Two passes: torch.aminmax is slower here.
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low).div_(_LARGEST_INPUT).clamp_(min=_SMALLEST_SCALE)
        steps = scale.reciprocal()
        whole = torch.addcmul(0.5 - low * steps, x, steps).to(torch.uint8)  # 0.5 and the cast round; at most 255
        product = _multiply(whole, self.packed, self.scales, self.zeros)
        return torch.addcmul(self.bias, low, self.row_sums).addcmul_(product, scale)


class Int8QKVProjection(nn.Module):
    """A ``transformer_block.QKVProjection`` in two 8-bit parts, for a block that computes some queries only.

    Args:
        weight: (3 D, D) float.
        bias: (3 D,) float; None for a projection without bias.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        embed_dim = weight.shape[1]
        self.query = Int8Linear(weight[:embed_dim], None if bias is None else bias[:embed_dim])
        self.key_value = Int8Linear(weight[embed_dim:], None if bias is None else bias[embed_dim:])

    def forward(self, x: Tensor) -> Tensor:
        """Returns queries, keys and values (B, S, 3 D) of x (B, S, D)."""
        return torch.cat([self.query(x), self.key_value(x)], dim=-1)


_AnyBackbone = TypeVar("_AnyBackbone", bound=Backbone)


def quantize(network: _AnyBackbone) -> _AnyBackbone:
    """Returns a copy of a network for inference, whose blocks have 8-bit linear layers.

    The copy cannot be saved, copied or moved to another device.

    Args:
        network: Network on the CPU; it is not changed.

    Raises:
        ValueError: if the network is on another device, its blocks have no linear layers or use the weights of one
            directly, or torch is built without oneDNN.
    """
    device = next(network.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"int8: the network must be on the CPU, got one on {device}; move it, or use bfloat16")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch: untyped
        raise ValueError("int8: torch must be built with oneDNN, got one without; decode in float32")
    linear = {name: part for name, part in network.blocks.named_modules(prefix="blocks") if isinstance(part, nn.Linear)}
    if not linear:
        raise ValueError(
            f"int8: the blocks of the backbone must have linear layers, got none in {network.config.backbone!r}; "
            "decode in float32 or bfloat16"
        )
    # The skeleton takes no memory; its linear layers are replaced, and the other weights assigned.
    with skeletons():
        copy = cast("_AnyBackbone", network.config.create())
    last = f"blocks.{len(network.blocks) - 1}."
    for name, module in linear.items():
        is_split = isinstance(module, QKVProjection) and name.startswith(last)
        layer = (Int8QKVProjection if is_split else Int8Linear)(module.weight, module.bias)
        has_gelu = isinstance(module, PackingLinear) and module.gelu
        copy.set_submodule(name, nn.Sequential(layer, nn.GELU(approximate="tanh")) if has_gelu else layer)
    weights = network.state_dict()
    copy.load_state_dict({name: weights[name].float().clone() for name in copy.state_dict()}, assign=True)
    copy.eval().requires_grad_(requires_grad=False)
    if is_plugin(network.config):
        _try_out(copy)
    return copy


@torch.inference_mode()
def _try_out(network: Backbone) -> None:
    """Runs a quantized network once.

    Raises:
        ValueError: if a block does more with a linear layer than call it.
    """
    config = network.config
    tokens = torch.full((1, config.num_tokens), config.mask_token_id)
    labels, positions = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    vectors = torch.zeros(1, config.condition_dim) if config.condition_dim else None
    try:
        network.forward_at(tokens, labels, positions, vectors=vectors)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"int8: the blocks of the backbone must only call their linear layers, got {type(error).__name__} in "
            f"{config.backbone!r} ({shorten(str(error))}); decode in float32 or bfloat16"
        ) from error
