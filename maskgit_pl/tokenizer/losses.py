"""The configuration of stage 1, its losses, and their gradients at the reconstructed image.

Used by ``tokenizer.Tokenizer``, which adds these gradients and propagates the sum once through the generator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from maskgit_pl.checks import (
    ImageSize,
    check_image_size,
    check_integer,
    check_number,
    check_seed,
    height_width,
)
from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.networks.discriminators import discriminators
from maskgit_pl.networks.features import build_perceptual, create_distance
from maskgit_pl.networks.quantizers import WEIGHTS
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.training.optimizers import OptimizerConfig
from maskgit_pl.training.strategies import ActivationCheckpointing
from maskgit_pl.transformer import losses
from maskgit_pl.transformer.losses import AdversarialLoss

Part = Literal["encoder", "quantizer", "decoder"]


class LossInputs(NamedTuple):
    """The tensors of one micro-batch that the terms of the loss are computed from.

    Args:
        images: (B, C, H, W) float32 in [0, 1]: the real images.
        reconstruction: (B, C, H, W) float32, not clipped; it requires a gradient.
        features: (B, D, h, w) float: the output of the encoder, before the quantizer; it requires a gradient.
        step: Step of the training, from 0.
    """

    images: Tensor
    reconstruction: Tensor
    features: Tensor
    step: int


class TokenizerLoss(ABC):
    """A term of the loss of stage 1. Subclasses are frozen dataclasses.

    A complete one::

        @tokenizer_losses.register("edges")
        @dataclass(frozen=True)
        class Edges(TokenizerLoss):
            weight: float = 1.0

            def __call__(self, given: LossInputs, network: None) -> Tensor:
                return (given.reconstruction.diff(dim=-1) - given.images.diff(dim=-1)).abs().mean()

    Attributes:
        weight: Factor of the term, in [0, 1e6].
    """

    weight: float

    @property
    def min_image_size(self) -> int:
        """The smallest side of an image that the term supports, in pixels."""
        return 1

    def create_network(self) -> Any:
        """Builds the frozen network of the term, which is moved to the device and stays out of checkpoints, or None."""
        return None

    @abstractmethod
    def __call__(self, inputs: LossInputs, network: Any) -> Tensor:
        """Computes the term without its weight, a scalar float32: a mean over images.

        Args:
            inputs: Images, reconstructions and features.
            network: The network of ``create_network``, or None.
        """


def _check_term(name: str, term: TokenizerLoss) -> None:
    derives_from(TokenizerLoss)(name, term)
    check_number(f"tokenizer loss {name!r}: weight", getattr(term, "weight", None), WEIGHTS)


tokenizer_losses: Registry[TokenizerLoss] = Registry("tokenizer loss", "maskgit_pl.tokenizer_losses", check=_check_term)


@tokenizer_losses.register("l2")
@dataclass(frozen=True)
class SquaredError(TokenizerLoss):
    """The mean squared difference of images. Source: released configuration."""

    weight: float = 1.0

    def __call__(self, inputs: LossInputs, network: None) -> Tensor:
        return (inputs.reconstruction - inputs.images).square().mean()


@tokenizer_losses.register("l1")
@dataclass(frozen=True)
class AbsoluteError(TokenizerLoss):
    """The mean absolute difference of images. Source: taming-transformers, ``VQLPIPSWithDiscriminator``."""

    weight: float = 1.0

    def __call__(self, inputs: LossInputs, network: None) -> Tensor:
        return (inputs.reconstruction - inputs.images).abs().mean()


@tokenizer_losses.register("perceptual")
@dataclass(frozen=True)
class PerceptualConfig(TokenizerLoss):
    """The mean distance of images in a pretrained network: LPIPS, or the mean squared difference of logits.

    Args:
        network: Name or mapping: ``lpips``, or a registered feature network.
        weight: Factor of the loss, in (0, 1e6].

    Raises:
        ValueError: if the weight is out of range, or the network is unknown.

    Source: released configuration: ResNet-50 logits at 224 px, 0.1.
    """

    network: str | Mapping[str, Any]
    weight: float = 0.1

    def __post_init__(self) -> None:
        check_number("perceptual weight", self.weight, "(0, 1e6]")
        # Checks the name and the arguments. create_network reads the weights.
        build_perceptual(self.network)

    @property
    def min_image_size(self) -> int:
        """The smallest side of an image that the network supports, in pixels."""
        return getattr(build_perceptual(self.network), "min_image_size", 1)

    def create_network(self) -> nn.Module:
        """Builds the frozen network: two (B, C, H, W) float images in [0, 1] to distances (B,)."""
        try:
            return create_distance(self.network)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"model.perceptual.network: {error}; set --model.perceptual.network.weights FILE, or train without "
                "it by --model.perceptual=null"
            ) from error

    def __call__(self, inputs: LossInputs, network: nn.Module) -> Tensor:
        distances: Tensor = network(inputs.reconstruction, inputs.images)
        return distances.mean()


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

    Raises:
        ValueError: if a number is out of range.
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


@dataclass(frozen=True)
class TokenizerConfig:
    """The configuration of ``Tokenizer``: network, losses, optimizer and execution.

    Args:
        network: Sizes of the VQGAN.
        image_size: Side of square images, or (height, width), in pixels, each in [1, 16384].
        optimizer: Optimizer of the generator; the discriminator has one of the same configuration.
        reconstruction_loss: ``l2`` (released configuration) or ``l1``.
        reconstruction_weight: Its factor, in [0, 1e6].
        perceptual: The perceptual loss; None for none.
        adversarial: The adversarial loss and its discriminator; None for none.
        losses: Further terms of the loss: names or mappings of registered tokenizer losses; in Python also objects.
        freeze: Parts of the network that keep their weights and codes, such as ``[encoder, quantizer]`` for a new
            decoder of old tokens: no gradient, no optimizer state, no update of the codebook's statistics.
        gradient_clip: Largest gradient norm of each network, > 0; None for no clipping.
        ema_decay: Decay of the averaged weights that are evaluated and exported, in [0, 1).
        flip_probability: Probability that a training image is mirrored left to right, in [0, 1].
        seed: Seed of flips and of the restarts of dead codes, in [0, 2**32).
        activation_checkpointing: ``blocks`` saves memory: the blocks of encoder and decoder run again in the
            backward pass.

    Raises:
        ValueError: if a number is out of range or a word is unknown.
    """

    network: VQGANConfig
    image_size: ImageSize
    optimizer: OptimizerConfig
    reconstruction_loss: Literal["l2", "l1"] = "l2"
    reconstruction_weight: float = 1.0
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    losses: tuple[str | dict[str, Any], ...] = ()
    freeze: tuple[Part, ...] = ()
    gradient_clip: float | None = None
    ema_decay: float = 0.999
    flip_probability: float = 0.0
    seed: int = 0
    activation_checkpointing: ActivationCheckpointing = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", check_image_size("image_size", self.image_size, "[1, 16384]"))
        check_number("reconstruction_weight", self.reconstruction_weight, "[0, 1e6]")
        check_number("ema_decay", self.ema_decay, "[0, 1)")
        check_number("flip_probability", self.flip_probability, "[0, 1]")
        check_seed("seed", self.seed)
        if self.gradient_clip is not None:
            check_number("gradient_clip", self.gradient_clip, "(0, inf)")
        object.__setattr__(self, "freeze", tuple(self.freeze))
        object.__setattr__(self, "losses", tuple(map(tokenizer_losses.spec, self.losses)))
        if "decoder" in self.freeze and self.adversarial is not None and self.adversarial.weight_rule == "adaptive":
            raise ValueError(
                f"freeze must not hold the decoder with adversarial weight_rule 'adaptive', got {list(self.freeze)}; "
                "that weight is measured at the decoder's last layer: set model.adversarial.weight_rule to fixed"
            )
        shorter = min(height_width(self.image_size))
        for name, term in self.terms.items():
            if shorter < term.min_image_size:
                raise ValueError(
                    f"image_size must be >= {term.min_image_size} with the loss {name!r}, got {shorter}; leave the "
                    "loss out, or set another network for it"
                )

    @cached_property
    def terms(self) -> dict[str, TokenizerLoss]:
        """The terms of the loss at the reconstructed image, by their names in the logs."""
        weight = float(self.reconstruction_weight)
        terms = {"reconstruction": tokenizer_losses.build({"name": self.reconstruction_loss, "weight": weight})}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual
        for spec in self.losses:
            term, name = tokenizer_losses.build(spec), str(spec["name"] if isinstance(spec, dict) else spec)
            number = 1
            while (key := name if number == 1 else f"{name}-{number}") in terms:
                number += 1
            terms[key] = term
        return terms


class LossTerms:
    """The weighted sum of the terms at the reconstructed image, by their names in the logs.

    It is not an ``nn.Module``, so the frozen networks of the terms stay out of checkpoints.

    Raises:
        ValueError: if the weights of a network cannot be read.
    """

    def __init__(self, terms: Mapping[str, TokenizerLoss]) -> None:
        self.terms = dict(terms)
        self.networks = {name: term.create_network() for name, term in terms.items()}

    def to(self, device: torch.device) -> None:
        """Moves the networks of the terms to a device."""
        for network in self.networks.values():
            if isinstance(network, nn.Module):
                network.to(device)

    def gradients(self, inputs: LossInputs) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Computes the gradients of the weighted sum. Each term is differentiated once.

        Args:
            inputs: Images, and reconstruction and features as leaves that require a gradient.

        Returns:
            Gradient at the reconstruction, (B, C, H, W) float32; that at the features, (B, D, h, w) float,
            None if no term uses them; and the terms by name, detached and without their weights.
        """
        leaves, metrics = (inputs.reconstruction, inputs.features), {}
        at_image, at_features = None, None
        for name, term in self.terms.items():
            loss = term(inputs, self.networks[name])
            metrics[name] = loss.detach()
            if not loss.requires_grad:  # such as 0 before the step at which a term begins
                continue
            parts = torch.autograd.grad(term.weight * loss, leaves, allow_unused=True)
            if parts[0] is not None:
                at_image = parts[0] if at_image is None else at_image + parts[0]
            if parts[1] is not None:
                at_features = parts[1] if at_features is None else at_features + parts[1]
        assert at_image is not None  # of the reconstruction loss
        return at_image, at_features, metrics


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
        loss = losses.generator_loss(self.fake_logits, kind=self.config.loss)
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
            self.metrics["adaptive_weight"] = losses.adaptive_weight(similarity_part, adversarial_part)
            weight = weight * self.metrics["adaptive_weight"]
        self.metrics |= {"generator": loss.detach(), "adversarial_weight": weight}
        return weight * gradient

    def discriminator_loss(self, lecam_means: Tensor) -> Tensor:
        """Computes the discriminator's loss with its penalties, scalar float32 with a graph.

        Args:
            lecam_means: (2,) float32: moving averages of the logits of real images and of reconstructions.
        """
        config = self.config
        loss = losses.discriminator_loss(self.real_logits, self.fake_logits, kind=config.loss)
        self.metrics["discriminator"] = loss.detach()
        real, fake = (self.real_logits > 0).float().mean(), (self.fake_logits < 0).float().mean()
        self.metrics["discriminator_accuracy"] = (real + fake) / 2
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
