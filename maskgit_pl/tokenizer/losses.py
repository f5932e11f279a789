"""The terms of the loss of stage 1, by name, and their gradients at the reconstructed image.

Used by ``tokenizer.Tokenizer``, which adds these gradients and propagates the sum once through the generator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskgit_pl.checks import check_number
from maskgit_pl.networks.features import build_perceptual, create_distance
from maskgit_pl.networks.quantizers import WEIGHTS
from maskgit_pl.registry import Registry, derives_from


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

            def __call__(self, inputs: LossInputs, network: None) -> Tensor:
                return (inputs.reconstruction.diff(dim=-1) - inputs.images.diff(dim=-1)).abs().mean()

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
                f"model.losses.perceptual.network: {error}; set --model.losses.perceptual.network.weights FILE, or "
                "train without it by --model.losses.perceptual=null"
            ) from error

    def __call__(self, inputs: LossInputs, network: nn.Module) -> Tensor:
        distances: Tensor = network(inputs.reconstruction, inputs.images)
        return distances.mean()


class LossTerms:
    """The weighted sum of the terms at the reconstructed image, by their names in the logs.

    It is not an ``nn.Module``, so the frozen networks of the terms stay out of checkpoints.
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
        if at_image is None:
            raise ValueError(f"losses must depend on the reconstruction, got {', '.join(self.terms)}; add l2")
        return at_image, at_features, metrics
