"""The configuration of stage 1: the VQGAN, its losses and its training. ``tokenizer.Tokenizer`` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from maskgit_pl.checks import check_choice, check_integer, check_number, check_seed
from maskgit_pl.image_format import ImageSize, check_image_size, height_width
from maskgit_pl.losses import AdversarialLoss, ReconstructionLoss
from maskgit_pl.networks.discriminator import DiscriminatorConfig
from maskgit_pl.networks.discriminators import build_discriminator
from maskgit_pl.networks.perceptual import PerceptualOutput, build_perceptual, create_distance
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.training.compile_and_checkpointing import ActivationCheckpointing
from maskgit_pl.training.optimizers import OptimizerConfig

__all__ = ["AdversarialConfig", "MemoryFormat", "Part", "PerceptualConfig", "TokenizerConfig"]

MemoryFormat = Literal["contiguous", "channels_last"]
Part = Literal["encoder", "quantizer", "decoder"]


@dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual loss: weight x mean distance of a pretrained network.

    The distance is LPIPS, or the mean squared difference of a feature network's outputs.

    Args:
        network: Name or mapping: ``lpips``, or a registered feature network.
        weight: Factor of the loss, in (0, 1e6].
        output: Output of a feature network that is compared: the classifier's ``logits`` (released configuration) or
            the pooled ``features``.

    Raises:
        ValueError: if the weight is out of range, or the network is unknown.

    Source: released configuration: ResNet-50 logits at 224 px, 0.1.
    """

    network: str | Mapping[str, Any]
    weight: float = 0.1
    output: PerceptualOutput = "logits"

    def __post_init__(self) -> None:
        check_number("perceptual weight", self.weight, "(0, 1e6]")
        # Checks the name and the arguments. create_network reads the weights.
        build_perceptual(self.network, self.output)

    @property
    def min_image_size(self) -> int:
        """The smallest side of an image that the network supports, in pixels."""
        return getattr(build_perceptual(self.network, self.output), "min_image_size", 1)

    def create_network(self) -> nn.Module:
        """Builds the frozen network: two (B, C, H, W) float images in [0, 1] to distances (B,).

        Raises:
            ValueError: if its weights cannot be read.
        """
        try:
            return create_distance(self.network, self.output)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"model.perceptual.network: {error}; set --model.perceptual.network.weights FILE, or train without "
                "it by --model.perceptual=null"
            ) from error


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial loss and its discriminator. The defaults are the released configuration's.

    Args:
        discriminator: Name or mapping of a registered discriminator, or its built configuration; without a name:
            ``stylegan``.
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

    discriminator: DiscriminatorConfig | str | Mapping[str, Any] = field(default_factory=DiscriminatorConfig)
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
        discriminator = build_discriminator(self.discriminator)
        if self.r1_weight > 0 and getattr(discriminator, "mixes_images", False):
            raise ValueError(
                f"adversarial r1_weight must be 0 with a discriminator that normalises over the batch, got "
                f"{self.r1_weight}; R1 needs logits that depend on one image each: set r1_weight 0, or norm group"
            )

    def has_started(self, step: int) -> bool:
        """Returns whether the networks have an adversarial loss at a step."""
        return step >= self.start_step

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
        freeze: Parts of the network that keep their weights and codes, such as ``[encoder, quantizer]`` for a new
            decoder of old tokens: no gradient, no optimizer state, no update of the codebook's statistics.
        gradient_clip: Largest gradient norm of each network, > 0; None for no clipping.
        ema_decay: Decay of the averaged weights that are evaluated and exported, in [0, 1).
        flip_probability: Probability that a training image is mirrored left to right, in [0, 1].
        seed: Seed of flips and of the restarts of dead codes, in [0, 2**32).
        memory_format: Layout of images and convolution weights; ``channels_last`` is faster on most GPUs.
        activation_checkpointing: ``blocks`` saves memory: the blocks of encoder and decoder run again in the backward
            pass.

    Raises:
        ValueError: if a number is out of range or a word is unknown.
    """

    network: VQGANConfig
    image_size: ImageSize
    optimizer: OptimizerConfig
    reconstruction_loss: ReconstructionLoss = "l2"
    reconstruction_weight: float = 1.0
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    freeze: tuple[Part, ...] = ()
    gradient_clip: float | None = None
    ema_decay: float = 0.999
    flip_probability: float = 0.0
    seed: int = 0
    memory_format: MemoryFormat = "contiguous"
    activation_checkpointing: ActivationCheckpointing = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", check_image_size("image_size", self.image_size, "[1, 16384]"))
        check_choice("reconstruction_loss", self.reconstruction_loss, get_args(ReconstructionLoss))
        check_number("reconstruction_weight", self.reconstruction_weight, "[0, 1e6]")
        check_number("ema_decay", self.ema_decay, "[0, 1)")
        check_number("flip_probability", self.flip_probability, "[0, 1]")
        check_seed("seed", self.seed)
        check_choice("memory_format", self.memory_format, get_args(MemoryFormat))
        check_choice("activation_checkpointing", self.activation_checkpointing, get_args(ActivationCheckpointing))
        if self.gradient_clip is not None:
            check_number("gradient_clip", self.gradient_clip, "(0, inf)")
        object.__setattr__(self, "freeze", tuple(self.freeze))
        self._check_freeze()
        shorter = min(height_width(self.image_size))
        if self.perceptual is not None and shorter < self.perceptual.min_image_size:
            raise ValueError(
                f"image_size must be >= {self.perceptual.min_image_size} with this perceptual network, got "
                f"{shorter}; set another model.perceptual.network, or null for model.perceptual"
            )

    def _check_freeze(self) -> None:
        parts = get_args(Part)
        for part in self.freeze:
            check_choice("freeze", part, parts)
        if len(set(self.freeze)) < len(self.freeze) or len(self.freeze) == len(parts):
            raise ValueError(
                f"freeze must be one or two different parts of {', '.join(parts)}, got {list(self.freeze)}; leave out "
                "what is to be trained"
            )
        if "decoder" in self.freeze and self.adversarial is not None and self.adversarial.weight_rule == "adaptive":
            raise ValueError(
                f"freeze must not hold the decoder with adversarial weight_rule 'adaptive', got {list(self.freeze)}; "
                "that weight is measured at the decoder's last layer: set model.adversarial.weight_rule to fixed"
            )
