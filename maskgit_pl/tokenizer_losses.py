"""The losses of stage 1, and their gradients at the reconstructed image.

Used by ``Tokenizer``, which adds these gradients and propagates the sum once through the generator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskgit_pl import losses
from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.training.tokenizer_losses import AdversarialConfig, PerceptualConfig

__all__ = ["AdversarialStep", "SimilarityLoss", "gradient_at", "gradient_norm"]


class SimilarityLoss:
    """The weighted sum of the reconstruction loss and the perceptual loss.

    It is not an ``nn.Module``, so the frozen perceptual network stays out of checkpoints.

    Args:
        reconstruction_loss: ``l2`` or ``l1``.
        reconstruction_weight: Its factor.
        perceptual: Network and weight of the perceptual loss; None for no perceptual loss.

    Raises:
        ValueError: if the weights of the perceptual network cannot be read.
    """

    def __init__(
        self,
        reconstruction_loss: losses.ReconstructionLoss,
        perceptual: PerceptualConfig | None,
        *,
        reconstruction_weight: float = 1.0,
    ) -> None:
        self.reconstruction_loss = reconstruction_loss
        self.reconstruction_weight = reconstruction_weight
        self.perceptual = perceptual
        self.network: nn.Module | None = None if perceptual is None else perceptual.create_network()

    def gradient(self, image: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the gradient of the weighted sum. Each loss is differentiated once.

        Args:
            image: (B, C, H, W) float32 reconstruction in [0, 1], a leaf that requires a gradient.
            images: (B, C, H, W) float32 in [0, 1].

        Returns:
            Gradient at ``image``, (B, C, H, W) float32, and detached scalars by name: the losses without their weights
            (``reconstruction``, ``perceptual``), and the norms of their weighted gradients (``gradient/NAME``).
        """
        loss = losses.reconstruction_loss(image, images, kind=self.reconstruction_loss)
        gradient = gradient_at(image, self.reconstruction_weight * loss)
        metrics = {"reconstruction": loss.detach(), "gradient/reconstruction": gradient_norm(gradient)}
        if self.perceptual is not None and self.network is not None:
            distance = self.network(image, images).mean()
            part = gradient_at(image, self.perceptual.weight * distance)
            metrics |= {"perceptual": distance.detach(), "gradient/perceptual": gradient_norm(part)}
            gradient = gradient + part
        return gradient, metrics


@dataclass
class AdversarialStep:
    """The adversarial losses of one micro-batch.

    Both losses use the weights before the step. One forward pass of the discriminator on the reconstructions therefore
    serves both, and accumulation does not change the result.

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
        loss = losses.generator_loss(self.fake_logits, kind=self.config.loss)
        # The discriminator's loss needs the same graph again.
        gradient = gradient_at(image, loss, retain_graph=True)
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
            self.metrics["adaptive_weight"] = losses.adaptive_weight(similarity_part, adversarial_part)
            weight = weight * self.metrics["adaptive_weight"]
        gradient = weight * gradient
        self.metrics |= {
            "generator": loss.detach(),
            "adversarial_weight": weight,
            "gradient/adversarial": gradient_norm(gradient),
        }
        return gradient

    def discriminator_loss(self, lecam_means: Tensor) -> Tensor:
        """Computes the discriminator's loss with its penalties.

        Args:
            lecam_means: (2,) float32: moving averages of the logits of real images and of reconstructions.

        Returns:
            Scalar float32 with a graph.
        """
        config = self.config
        loss = losses.discriminator_loss(self.real_logits, self.fake_logits, kind=config.loss)
        self.metrics["discriminator"] = loss.detach()
        real, fake = (self.real_logits > 0).float().mean(), (self.fake_logits < 0).float().mean()
        self.metrics |= {
            "discriminator_accuracy": (real + fake) / 2,
            "discriminator_accuracy/real": real,
            "discriminator_accuracy/fake": fake,
        }
        if self.real.requires_grad:
            penalty = losses.r1_penalty(self.real_logits, self.real)
            self.metrics["r1"] = penalty.detach()
            # The penalty is computed in every ``r1_every``-th step only, so it counts that many times.
            loss = loss + config.r1_weight * config.r1_every * penalty
        if config.lecam_weight > 0:
            real_mean, fake_mean = lecam_means.clone()
            lecam = losses.lecam_loss(self.real_logits, self.fake_logits, real_mean=real_mean, fake_mean=fake_mean)
            self.metrics["lecam"] = lecam.detach()
            loss = loss + config.lecam_weight * lecam
        return loss


def gradient_at(image: Tensor, loss: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Computes the gradient of a scalar loss with respect to an image, in float32."""
    (gradient,) = torch.autograd.grad(loss, image, retain_graph=retain_graph)
    return gradient.float()


def gradient_norm(gradient: Tensor) -> Tensor:
    """Computes the root mean square over images of the norm of the gradient of an image's own loss.

    The gradient g of a mean over B images is 1/B of those of their own losses: sqrt(1/B sum_b |B g_b|^2) = sqrt(B) |g|.
    The value does not depend on the size of the micro-batch, so that runs and losses can be compared.

    Args:
        gradient: (B, C, H, W) float32: gradient of a mean over images.

    Returns:
        Scalar float32.
    """
    norm: Tensor = torch.linalg.vector_norm(gradient) * len(gradient) ** 0.5
    return norm.detach()
