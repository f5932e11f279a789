"""The losses of both stages as pure functions, computed in float32."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.networks.quantizers import entropy_loss

__all__ = [
    "AdversarialLoss",
    "ReconstructionLoss",
    "adaptive_weight",
    "discriminator_loss",
    "entropy_loss",
    "generator_loss",
    "lecam_loss",
    "masked_cross_entropy",
    "r1_penalty",
    "reconstruction_loss",
]

AdversarialLoss = Literal["hinge", "non-saturating"]
ReconstructionLoss = Literal["l2", "l1"]


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, rows: Tensor, *, num_rows: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Computes the cross-entropy at masked positions.

    loss = mean over rows of (sum over the row's masked tokens / their count)

    The mean over rows, not over tokens, makes the loss of a global batch equal for every division into ranks and
    micro-batches. A row without a masked token adds 0 to the sum and still counts in the mean.

    Args:
        logits: (M, V) float, at the masked positions of all rows.
        targets: (M,) int64 in [0, V).
        rows: (M,) int64 in [0, num_rows), the row of each masked position.
        num_rows: B, rows of the batch.
        label_smoothing: s in [0, 1): the target is (1 - s) one-hot + s / V over all V, as torch's.

    Returns:
        Scalar float32 loss, and the (M,) float32 negative log-likelihoods without smoothing, detached.

    Source: released code, ``weighted_sequence_cross_entropy`` (there a row without weight gives NaN).
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    nll = -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)  # (M,)
    losses = nll
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * nll - label_smoothing * log_probabilities.mean(-1)
    counts = torch.bincount(rows, minlength=num_rows)
    loss = (losses / counts[rows]).sum() / num_rows
    return loss, nll.detach()


def reconstruction_loss(reconstruction: Tensor, images: Tensor, *, kind: ReconstructionLoss) -> Tensor:
    """Computes the mean squared (``l2``, released) or absolute (``l1``) difference of images: scalar float32."""
    difference = reconstruction.float() - images.float()
    return difference.square().mean() if kind == "l2" else difference.abs().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, *, kind: AdversarialLoss) -> Tensor:
    """Computes the loss of the discriminator from (B, 1) logits: scalar float32.

    hinge: mean max(0, 1 - real) + mean max(0, 1 + fake); non-saturating: mean softplus(-real) + mean softplus(fake).

    Source: released code, ``losses.py``.
    """
    real, fake = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake_logits: Tensor, *, kind: AdversarialLoss) -> Tensor:
    """Computes the adversarial loss of the generator from (B, 1) logits: scalar float32.

    hinge: -mean fake; non-saturating: mean softplus(-fake).

    Source: released code, ``losses.py``.
    """
    fake = fake_logits.float()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """Computes the mean over the batch of the squared norm of the logits' gradient at real images, without 1/2.

    Args:
        real_logits: (B, 1), computed from ``images``.
        images: (B, C, H, W) that requires a gradient.

    Returns:
        Scalar float32 with a graph, to be multiplied by its cost.

    Source: Mescheder et al., arXiv:1801.04406; without 1/2 as in the released code.
    """
    (gradient,) = torch.autograd.grad(real_logits.float().sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


def lecam_loss(real_logits: Tensor, fake_logits: Tensor, *, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Computes the LeCam regularisation, which holds logits near the mean of the other side: scalar float32.

    mean max(0, real - fake_mean)^2 + mean max(0, real_mean - fake)^2

    Args:
        real_logits: (B, 1) of real images.
        fake_logits: (B, 1) of reconstructions.
        real_mean: Scalar, moving average of the real logits.
        fake_mean: Scalar, moving average of the logits of reconstructions.

    Source: Tseng et al., arXiv:2104.03310, as in the MAGVIT code.
    """
    real, fake = real_logits.float(), fake_logits.float()
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Computes |reconstruction gradient| / (|adversarial gradient| + 1e-4), clamped to [0, 1e4]: scalar float32.

    Args:
        reconstruction_gradient: Gradient of the other losses at the decoder's last layer.
        adversarial_gradient: Gradient of the adversarial loss there, of the same shape.

    Source: Esser et al., arXiv:2012.09841, eq. 7, with the constants of its code.
    """
    norm = torch.linalg.vector_norm
    ratio: Tensor = norm(reconstruction_gradient.float()) / (norm(adversarial_gradient.float()) + 1e-4)
    return ratio.clamp(0, 1e4).detach()
