"""The configuration of stage 1, the group ``model`` of its recipe. Imports no Lightning."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from maskgit_pl.checks import (
    MAY_CHANGE,
    ImageSize,
    check_image_size,
    check_number,
    check_seed,
    height_width,
)
from maskgit_pl.networks.blocks import ActivationCheckpointing
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.tokenizer.adversarial import AdversarialConfig
from maskgit_pl.tokenizer.losses import TokenizerLoss, tokenizer_losses
from maskgit_pl.training.optimizers import OptimizerConfig

Part = Literal["encoder", "quantizer", "decoder"]


@dataclass(frozen=True)
class TokenizerConfig:
    """The configuration of ``Tokenizer``: network, losses, optimizer and execution.

    Args:
        network: Sizes of the VQGAN.
        image_size: Side of square images, or (height, width), in pixels, each in [1, 16384].
        optimizer: Optimizer of the generator; the discriminator has one of the same configuration.
        losses: The terms of the loss at the reconstructed image, at least one: names or mappings of registered
            tokenizer losses; in Python also objects. The released configuration has ``l2`` and ``perceptual``.
        adversarial: The adversarial loss and its discriminator; None for none.
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
    losses: tuple[str | dict[str, Any], ...] = ("l2",)
    adversarial: AdversarialConfig | None = None
    freeze: tuple[Part, ...] = ()
    gradient_clip: float | None = None
    ema_decay: float = 0.999
    flip_probability: float = 0.0
    seed: int = field(default=0, metadata=MAY_CHANGE)  # that of data is compared instead
    activation_checkpointing: ActivationCheckpointing = field(default="none", metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", check_image_size("image_size", self.image_size, "[1, 16384]"))
        check_number("ema_decay", self.ema_decay, "[0, 1)")
        check_number("flip_probability", self.flip_probability, "[0, 1]")
        check_seed("seed", self.seed)
        if self.gradient_clip is not None:
            check_number("gradient_clip", self.gradient_clip, "(0, inf)")
        object.__setattr__(self, "freeze", tuple(self.freeze))
        object.__setattr__(self, "losses", tuple(map(tokenizer_losses.spec, self.losses)))
        if not self.losses:
            raise ValueError("losses must name at least one term, got none; l2 compares the pixels")
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
        terms: dict[str, TokenizerLoss] = {}
        for spec in self.losses:
            term, name = tokenizer_losses.build(spec), str(spec["name"] if isinstance(spec, dict) else spec)
            number = 1
            while (key := name if number == 1 else f"{name}-{number}") in terms:
                number += 1
            terms[key] = term
        return terms
