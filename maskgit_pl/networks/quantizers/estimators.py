"""Gradients through the choice of a code: straight-through, or the rotation trick."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_choice
from maskgit_pl.networks.quantizers.base import straight_through

__all__ = ["GradientEstimator", "check_estimator", "estimate", "rotate_to_codes"]

GradientEstimator = Literal["straight-through", "rotation"]


def check_estimator(value: object) -> None:
    """Checks the name of a gradient estimator.

    Raises:
        ValueError: if it is unknown.
    """
    check_choice("gradient_estimator", value, get_args(GradientEstimator))


def estimate(rows: Tensor, codes: Tensor, estimator: GradientEstimator) -> Tensor:
    """Returns the codes (M, D) with a gradient for the rows (M, D), and none for the codes."""
    return rotate_to_codes(rows, codes) if estimator == "rotation" else straight_through(rows, codes)


def rotate_to_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Returns the codes as a rotation and scaling of the rows, which are constants of the gradient.

    q = (|q| / |e|) R e,  R e = e - 2 r (r . e) + 2 q' (e' . e),  e' = e / |e|, q' = q / |q|, r = (e' + q') / |e' + q'|

    The gradient of e is that of q, rotated by the angle between them: its angle to e is its angle to q.

    Args:
        rows: (M, D) float32, the features e.
        codes: (M, D) float32, the codes q.

    Returns:
        (M, D) float32, equal to the codes.

    Source: Fifty et al., arXiv:2410.06424, section 4.2.
    """
    codes = codes.detach()
    with torch.no_grad():
        unit, target = F.normalize(rows, dim=1), F.normalize(codes, dim=1)
        middle = F.normalize(unit + target, dim=1)
        scale = codes.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)
    along_middle = (rows * middle).sum(1, keepdim=True)
    along_unit = (rows * unit).sum(1, keepdim=True)
    turned: Tensor = scale * (rows - 2 * middle * along_middle + 2 * target * along_unit)
    return turned + (codes - turned).detach()  # without rounding errors, and the code where a feature is 0
