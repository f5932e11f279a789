"""The InceptionV3 of published FIDs and Inception scores. ``features.InceptionSpec`` loads its weights.

The blocks are those of torch-fidelity, whose import takes a second, so this module is imported where it is used.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from maskgit_pl.networks.feature_networks import FeatureOutput, FrozenNetwork

__all__ = ["Inception"]

_SPATIAL_LAYER, _SPATIAL_CHANNELS = "Mixed_6d", 7
_INCEPTION_SIZE = 299


class Inception(FrozenNetwork, nn.Sequential):
    """The InceptionV3 of TensorFlow's graph of 2015-12-05, frozen; gradients reach the images.

    ``features`` are the 2048 numbers of the last pooling. ``logits`` are the 1008 logits without bias, which define IS.
    ``spatial`` are the first 7 channels of the 1 x 1 branch of Mixed_6d at its 17 x 17 places, channel fastest.

    The blocks are torch-fidelity's. Its constructor unpickles the weight file, so the network is built here; a test
    compares both bit by bit. ``features.InceptionSpec`` loads the weights.

    Source: torch_fidelity.FeatureExtractorInceptionV3; spatial: openai/guided-diffusion, evaluations/evaluator.py
    (``mixed_6/conv:0``, ``[..., :7]`` of height x width x channels, which statistics made there keep).
    """

    fc: nn.Linear

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                Conv2d_1a_3x3=BasicConv2d(3, 32, kernel_size=3, stride=2),
                Conv2d_2a_3x3=BasicConv2d(32, 32, kernel_size=3),
                Conv2d_2b_3x3=BasicConv2d(32, 64, kernel_size=3, padding=1),
                MaxPool_1=nn.MaxPool2d(kernel_size=3, stride=2),
                Conv2d_3b_1x1=BasicConv2d(64, 80, kernel_size=1),
                Conv2d_4a_3x3=BasicConv2d(80, 192, kernel_size=3),
                MaxPool_2=nn.MaxPool2d(kernel_size=3, stride=2),
                Mixed_5b=InceptionA(192, pool_features=32),
                Mixed_5c=InceptionA(256, pool_features=64),
                Mixed_5d=InceptionA(288, pool_features=64),
                Mixed_6a=InceptionB(288),
                Mixed_6b=InceptionC(768, channels_7x7=128),
                Mixed_6c=InceptionC(768, channels_7x7=160),
                Mixed_6d=InceptionC(768, channels_7x7=160),
                Mixed_6e=InceptionC(768, channels_7x7=192),
                Mixed_7a=InceptionD(768),
                Mixed_7b=InceptionE_1(1280),
                Mixed_7c=InceptionE_2(2048),
                AvgPool=nn.AdaptiveAvgPool2d(output_size=(1, 1)),
                fc=nn.Linear(2048, 1008),
            )
        )
        self.freeze()

    def forward(self, images: Tensor) -> FeatureOutput:
        """Returns features (B, 2048), logits (B, 1008) and spatial (B, 2023).

        Args:
            images: (B, 1 or 3, H, W), uint8 or float in [0, 1].
        """
        x = images.float() if images.dtype == torch.uint8 else images.float() * 255
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(_INCEPTION_SIZE, _INCEPTION_SIZE), align_corners=False)
        x = (x - 128) / 128  # not 127.5: the graph's own normalisation
        for name, layer in list(self.named_children())[:-1]:  # all but fc, which has no bias here
            if name == _SPATIAL_LAYER:
                branch = layer.get_submodule("branch1x1")(x)[:, :_SPATIAL_CHANNELS]  # (B, 7, 17, 17)
            x = layer(x)
        features = x.flatten(1)  # (B, 2048)
        return FeatureOutput(features, features @ self.fc.weight.T, rearrange(branch, "b c h w -> b (h w c)"))
