"""What every feature network gives. It stands alone, so that networks and their registry need not know one another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["SPATIAL_NUMBERS", "FeatureOutput"]

SPATIAL_NUMBERS = 2023  # of ADM's evaluator: 7 channels x 17 x 17 places


class FeatureOutput(NamedTuple):
    """What a feature network gives.

    Attributes:
        features: (B, F) float, pooled, before the classifier.
        logits: (B, C) float.
        spatial: (B, S) float, S at most 2023: some channels of a feature map, place by place, for sFID; None where the
            network has no map.
    """

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None
