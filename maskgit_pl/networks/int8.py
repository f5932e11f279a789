"""The transformer with 8-bit linear layers, for a processor: approximate, and a forward pass in two thirds of the time.

Weights are rounded once, with a scale for each output; inputs at each call, with a scale and an offset for each token,
so that an image's logits do not depend on the rest of its batch. What takes little time stays float32: embeddings,
norms, attention itself, the vocabulary head.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from maskgit_pl.networks.autoregressive import build_transformer
from maskgit_pl.networks.transformer import Transformer

__all__ = ["Int8Linear", "quantized"]

_LARGEST_INPUT = 255
# Without VNNI instructions a processor adds two products of an input and a weight in 16 bits, and cuts off what is too
# large: 2 x 255 x 127 is, 2 x 255 x 63 is not.
_LARGEST_WEIGHT = 63
_SMALLEST_SCALE = 1e-30


class Int8Linear(nn.Module):
    """A linear layer with a weight of 8 bits, whose input is rounded to 8 bits, token by token, at each call.

    With an input x = low + scale u of whole numbers u: W x = scale (W u) + low (the sums of W's rows).

    Args:
        weight: (out, in) float.
        bias: (out,) float.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        weight = weight.detach().float()
        self.scales = (weight.abs().amax(1) / _LARGEST_WEIGHT).clamp(min=_SMALLEST_SCALE)
        rounded = (weight / self.scales.unsqueeze(1)).round()
        self.row_sums = rounded.sum(1) * self.scales
        self.bias = bias.detach().float().clone()
        self.zeros = torch.zeros_like(self.scales, dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) float32 -> (..., out) float32."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # one pass of both is slower
        scale = (high - low).div_(_LARGEST_INPUT).clamp_(min=_SMALLEST_SCALE)
        steps = scale.reciprocal()
        whole = torch.addcmul(0.5 - low * steps, x, steps).to(torch.uint8)  # rounded down: at most 255
        product = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, 0, self.packed, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(self.bias, low, self.row_sums).addcmul_(product, scale)


class Int8QueryKeyValue(nn.Module):
    """A ``transformer_block.QKVProjection`` in two parts, for the block that computes queries of some positions only.

    Args:
        weight: (3 D, D) float.
        bias: (3 D,) float.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        width = weight.shape[1]
        self.query = Int8Linear(weight[:width], bias[:width])
        self.key_value = Int8Linear(weight[width:], bias[width:])

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, 3 D)."""
        return torch.cat([self.query(x), self.key_value(x)], dim=-1)


AnyTransformer = TypeVar("AnyTransformer", bound=Transformer)


def quantized(network: AnyTransformer) -> AnyTransformer:
    """Copies a network for inference, whose blocks compute with 8-bit linear layers; the network stays as it is.

    The copy cannot be saved, copied or moved to another device.

    Args:
        network: On the processor.

    Raises:
        ValueError: The network is elsewhere, or this torch has no 8-bit products for a processor.
    """
    device = network.head_bias.device
    if device.type != "cpu":
        raise ValueError(f"int8: the network must be on the CPU, got one on {device}; move it, or use bfloat16")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch: untyped
        raise ValueError("int8: torch must be built with oneDNN, got one without; decode in float32")
    with torch.device("meta"):
        copy = cast("AnyTransformer", build_transformer(network.config))
    last = f"blocks.{network.config.depth - 1}.qkv"
    for name, module in network.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            made = Int8QueryKeyValue if name == last else Int8Linear
            copy.set_submodule(name, made(module.weight, module.bias))
    weights = network.state_dict()
    copy.load_state_dict({name: weights[name].float().clone() for name in copy.state_dict()}, assign=True)
    return copy.eval().requires_grad_(requires_grad=False)
