"""The adversarial losses of stage 1 and their configuration. Used by ``tokenizer.Tokenizer``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.networks.discriminators import discriminators

AdversarialLoss = Literal["hinge", "non-saturating"]


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial loss and its discriminator. The defaults are the released configuration's.

    Args:
        discriminator: Name, mapping or object of a registered discriminator.
        loss: ``non-saturating`` or ``hinge``.
        weight: Factor of the generator's loss, in [0, 1e6].
        weight_rule: ``fixed`` uses ``weight`` itself. ``adaptive`` multiplies it by |gradient of the other losses| /
            |gradient of the adversarial loss| at the decoder's last layer, over the micro-batch of all ranks.
        start_step: First step with a discriminator; before it, neither network has an adversarial loss.
        warmup_steps: Steps from ``start_step`` in which the factor of the generator's loss rises linearly from 0, >= 0.
        r1_weight: Factor of the R1 penalty on real images, in [0, 1e6].
        r1_every: Steps from one R1 penalty to the next, >= 1; each penalty is multiplied by it.
        lecam_weight: Factor of the LeCam regularisation, in [0, 1e6].
    """

    discriminator: str | Mapping[str, Any] = "stylegan"
    loss: AdversarialLoss = "non-saturating"
    weight: float = 0.1
    weight_rule: Literal["fixed", "adaptive"] = "fixed"
    start_step: int = 0
    warmup_steps: int = 0
    r1_weight: float = 10.0
    r1_every: int = 1
    lecam_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "r1_weight", "lecam_weight"):
            check_number(f"adversarial {name}", getattr(self, name), "[0, 1e6]")
        check_integer("adversarial start_step", self.start_step, "[0, inf)")
        check_integer("adversarial warmup_steps", self.warmup_steps, "[0, inf)")
        check_integer("adversarial r1_every", self.r1_every, "[1, inf)")
        discriminator = discriminators.build(discriminators.spec(self.discriminator))
        object.__setattr__(self, "discriminator", discriminators.spec(discriminator))  # one form, with all values
        if self.r1_weight > 0 and getattr(discriminator, "mixes_images", False):
            raise ValueError(
                f"adversarial r1_weight must be 0 with a discriminator that normalises over the batch, got "
                f"{self.r1_weight}; R1 needs logits that depend on one image each: set r1_weight 0, or norm group"
            )

    def weight_at(self, step: int) -> float:
        """Returns the factor of the generator's adversarial loss at a step, from ``start_step`` on."""
        if step >= self.start_step + self.warmup_steps:
            return self.weight
        return self.weight * (step - self.start_step) / self.warmup_steps

    def has_r1_penalty(self, step: int) -> bool:
        """Returns whether the discriminator's loss has the R1 penalty at a step."""
        return self.r1_weight > 0 and step % self.r1_every == 0


@dataclass
class AdversarialStep:
    """The adversarial losses of one micro-batch.

    Both losses use the weights before the step. One forward pass of the discriminator on the reconstructions
    therefore serves both, and accumulation does not change the result.

    Args:
        config: Losses and their weights.
        real: (B, C, H, W) float32 real images; they require a gradient in steps with an R1 penalty.
        real_logits: (B, ...) float: logits of ``real``.
        fake_logits: (B, ...) float: logits of the reconstructions.
        weight: Factor of the generator's loss at this step.

    Attributes:
        metrics: Detached scalars by name, added by the methods.
    """

    config: AdversarialConfig
    real: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    weight: float
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mean_logits(self) -> Tensor:
        """The mean logit of real images and of reconstructions, (2,) float32, detached."""
        return torch.stack([logits.detach().float().mean() for logits in (self.real_logits, self.fake_logits)])

    def generator_gradient(
        self, image: Tensor, *, reconstruction: Tensor, similarity: Tensor, last_layer: Tensor
    ) -> Tensor:
        """Computes the weighted gradient of the generator's adversarial loss.

        Args:
            image: (B, C, H, W): the detached reconstruction, from which ``fake_logits`` were computed.
            reconstruction: (B, C, H, W): the reconstruction with the generator's graph.
            similarity: (B, C, H, W) float32: gradient of the other losses at ``image``.
            last_layer: Weight of the decoder's last layer, for the adaptive weight.

        Returns:
            (B, C, H, W) float32.
        """
        loss = generator_loss(self.fake_logits, kind=self.config.loss)
        # The discriminator's loss needs the same graph again.
        gradient = torch.autograd.grad(loss, image, retain_graph=True)[0].float()
        weight = torch.tensor(self.weight, device=gradient.device)
        if self.config.weight_rule == "adaptive":
            # Autograd runs only from the image to the last layer, once for each of the two gradients.
            gradients = torch.stack(
                [
                    torch.autograd.grad(reconstruction, last_layer, part.to(reconstruction.dtype), retain_graph=True)[0]
                    for part in (similarity, gradient)
                ]
            )
            similarity_part, adversarial_part = mean_over_ranks(gradients)
            self.metrics["adaptive_weight"] = adaptive_weight(similarity_part, adversarial_part)
            weight = weight * self.metrics["adaptive_weight"]
        self.metrics |= {"generator": loss.detach(), "adversarial_weight": weight}
        return weight * gradient

    def discriminator_loss(self, lecam_means: Tensor) -> Tensor:
        """Computes the discriminator's loss with its penalties, scalar float32 with a graph.

        Args:
            lecam_means: (2,) float32: moving averages of the logits of real images and of reconstructions.
        """
        config = self.config
        loss = discriminator_loss(self.real_logits, self.fake_logits, kind=config.loss)
        self.metrics["discriminator"] = loss.detach()
        real, fake = (self.real_logits > 0).float().mean(), (self.fake_logits < 0).float().mean()
        self.metrics["discriminator_accuracy"] = (real + fake) / 2
        if self.real.requires_grad:
            penalty = r1_penalty(self.real_logits, self.real)
            self.metrics["r1"] = penalty.detach()
            # The penalty is computed in every ``r1_every``-th step only, so it counts that many times.
            loss = loss + config.r1_weight * config.r1_every * penalty
        if config.lecam_weight > 0:
            real_mean, fake_mean = lecam_means.clone()
            lecam = lecam_loss(self.real_logits, self.fake_logits, real_mean=real_mean, fake_mean=fake_mean)
            self.metrics["lecam"] = lecam.detach()
            loss = loss + config.lecam_weight * lecam
        return loss


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, *, kind: AdversarialLoss) -> Tensor:
    """Computes the loss of the discriminator.

    hinge: mean max(0, 1 - real) + mean max(0, 1 + fake); non-saturating: mean softplus(-real) + mean softplus(fake).

    Args:
        real_logits: (B, ...) float: logits of real images.
        fake_logits: (B, ...) float: logits of reconstructions.
        kind: ``"hinge"`` or ``"non-saturating"``.

    Source: released code, ``losses.py``.
    """
    real, fake = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake_logits: Tensor, *, kind: AdversarialLoss) -> Tensor:
    """Computes the adversarial loss of the generator from the logits (B, ...) of reconstructions, scalar float32.

    hinge: -mean fake; non-saturating: mean softplus(-fake). Source: released code, ``losses.py``.
    """
    fake = fake_logits.float()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """Computes the R1 penalty: the mean squared norm of the gradient of the logits at real images, without 1/2.

    Args:
        real_logits: (B, ...) float, computed from ``images``; several logits of an image count as their mean.
        images: (B, C, H, W) float that requires a gradient.

    Returns:
        Scalar float32 with a graph, to be multiplied by its weight.

    Source: Mescheder et al., arXiv:1801.04406; without 1/2 as in the released code.
    """
    # A logit depends on its own image only, so the gradient of the sum holds the gradient of each logit.
    logits = real_logits.float().flatten(1).mean(1)  # (B,)
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


def lecam_loss(real_logits: Tensor, fake_logits: Tensor, *, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Computes the LeCam regularisation, which pulls logits towards the mean of the other side.

    mean max(0, real - fake_mean)^2 + mean max(0, real_mean - fake)^2

    Args:
        real_logits: (B, ...) float: logits of real images.
        fake_logits: (B, ...) float: logits of reconstructions.
        real_mean: Scalar: moving average of the logits of real images.
        fake_mean: Scalar: moving average of the logits of reconstructions.

    Returns:
        Scalar float32.

    Source: Tseng et al., arXiv:2104.03310, as in the MAGVIT code.
    """
    real, fake = real_logits.float(), fake_logits.float()
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Computes the adaptive weight |reconstruction gradient| / (|adversarial gradient| + 1e-4), clamped to [0, 1e4].

    Args:
        reconstruction_gradient: Gradient of the other losses with respect to the decoder's last layer.
        adversarial_gradient: Gradient of the adversarial loss with respect to that layer, of the same shape.

    Returns:
        Scalar float32, detached.

    Source: Esser et al., arXiv:2012.09841, eq. 7, with the constants of its code.
    """
    norm = torch.linalg.vector_norm
    ratio: Tensor = norm(reconstruction_gradient.float()) / (norm(adversarial_gradient.float()) + 1e-4)
    return ratio.clamp(0, 1e4).detach()
