"""A frozen timm classifier with its input normalisation, and the output that all feature networks share.

Does not import the registry in ``features``, so that other networks can import this module.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import override

from maskgit_pl.networks.weights import tensors_digest

__all__ = ["FeatureNetwork", "FeatureOutput", "FrozenNetwork", "weights_digest"]

_SPATIAL_NUMBERS = 2023  # ADM's evaluator: 7 channels x 17 x 17 places


class FeatureOutput(NamedTuple):
    """The output of a feature network.

    Attributes:
        features: (B, F) float, pooled, before the classifier.
        logits: (B, C) float.
        spatial: (B, S) float, S at most 2023: some channels of a feature map, place by place, for sFID; None if the
            network has no map.
    """

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None


class FrozenNetwork(nn.Module):
    """A network that is never trained: its weights take no gradients, and it stays in evaluation mode."""

    def freeze(self) -> None:
        """Freezes the weights; the last call of ``__init__``, when all modules exist."""
        self.requires_grad_(requires_grad=False)
        self.eval()

    @override
    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(mode=False)


class FeatureNetwork(FrozenNetwork):
    """A frozen timm classifier with its input normalisation; gradients reach the images.

    Args:
        model: A timm model with ``forward_features``, ``forward_head`` and ``get_classifier``.
        size: Side in pixels to which images are resized.
        mean: Mean of each colour in the model's training, for pixels in [0, 1].
        std: Standard deviation of each colour in the model's training.
    """

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor  # (1, 3, 1, 1)

    def __init__(self, model: nn.Module, *, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.freeze()

    def extra_repr(self) -> str:
        return f"size={self.size}"

    def forward(self, images: Tensor) -> FeatureOutput:
        """Returns features, logits and the first channels of the last map.

        Args:
            images: (B, 1 or 3, H, W), uint8 or float in [0, 1]; grey images are repeated to three colours.
        """
        # Float32: the resize below has no bfloat16 kernel on a CPU.
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        model: Any = self.model  # timm's methods, which nn.Module's type does not have
        last = model.forward_features((x - self.mean) / self.std)
        features = model.forward_head(last, pre_logits=True)
        channels_last = getattr(model, "output_fmt", None) == "NHWC"
        return FeatureOutput(features, model.get_classifier()(features), _spatial(last, channels_last=channels_last))


def _spatial(last: Tensor, *, channels_last: bool) -> Tensor | None:
    """Returns the first channels of the last map, at most 2023 numbers, channel fastest: (B, S); None without a map."""
    if last.ndim != 4:  # tokens of a transformer
        return None
    last = last if channels_last else rearrange(last, "b c h w -> b h w c")
    # As many whole channels as fit into ADM's size, in its order: height, width, channel.
    channels = _SPATIAL_NUMBERS // (last.shape[1] * last.shape[2])
    return last[..., :channels].flatten(1) if channels else None


def weights_digest(network: nn.Module) -> str:
    """Returns the sha256 of a network's layers, weights and buffers; equal digests mean equal features."""
    named = sorted([*network.named_parameters(), *network.named_buffers()])
    return tensors_digest(named, prefix=repr(network))
