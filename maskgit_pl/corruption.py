"""Corruption of visible tokens in training: some are replaced by wrong codes, and the network predicts the original.

Decoding makes mistakes that training on true tokens never shows. A network that has seen wrong tokens gives them low
probabilities, which selectors such as ``p2`` use to correct them. Used by ``mvtm.MaskedTokenModel``. Your own
corruption is a registered frozen dataclass::

    @corruptions.register("zero")
    @dataclass(frozen=True)
    class Zero(Corruption):
        fraction: float = 0.1

        def codes(self, tokens, replaced, uniform, *, codebook_size, predict):
            return torch.zeros_like(tokens[replaced])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from maskgit_pl.checks import check_number, shorten
from maskgit_pl.decoding.noise import draw_codes
from maskgit_pl.randomness import random_uniform
from maskgit_pl.registry import Registry

__all__ = ["Corruption", "corruptions"]

Predict: TypeAlias = Callable[[Tensor], Tensor]


class Corruption(ABC):
    """A rule that replaces visible tokens. Subclasses are frozen dataclasses.

    Attributes:
        fraction: Probability that a visible token is replaced, in (0, 1).
    """

    fraction: float

    @abstractmethod
    def codes(
        self, tokens: Tensor, replaced: Tensor, uniform: Tensor, *, codebook_size: int, predict: Predict
    ) -> Tensor:
        """Returns the new codes, (R,) int64 in [0, K), image after image.

        Args:
            tokens: (B, N) int64 in [0, K): the true tokens.
            replaced: (B, N) bool: the R positions to replace.
            uniform: (R,) float32 in (0, 1): random numbers, a function of (seed, sample, epoch, position).
            codebook_size: K.
            predict: Computes the logits (R, K) of the replaced positions, which the network sees masked in addition to
                the mask. It costs a forward pass.
        """

    def draw(self, mask: Tensor, *, seed: int, index: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the positions to replace.

        Args:
            mask: (B, N) bool, True = masked; masked tokens are not replaced.
            seed: Seed in [0, 2**32).
            index: (B,) int64: sample index.
            epoch: (B,) int64.

        Returns:
            (B, N) bool, True = replaced, and (R,) float32, the random numbers of ``codes``.
        """
        chance, codes = random_uniform(
            ["corruption", "corruption/codes"], seed=seed, index=index, epoch=epoch, count=mask.shape[1]
        )  # (B, N) each
        replaced = (chance < self.fraction) & ~mask
        return replaced, codes[replaced]

    def corrupt(
        self, tokens: Tensor, replaced: Tensor, uniform: Tensor, *, codebook_size: int, predict: Predict
    ) -> Tensor:
        """Returns the tokens (B, N) int64 with new codes where ``replaced``; a new code may be the true one.

        Args:
            tokens: (B, N) int64 in [0, K).
            replaced: (B, N) bool, from ``draw``.
            uniform: (R,) float32, from ``draw``.
            codebook_size: K.
            predict: (B, N) bool, the positions to replace -> their logits (R, K).
        """
        new = self.codes(tokens, replaced, uniform, codebook_size=codebook_size, predict=predict)
        return tokens.masked_scatter(replaced, new)


def check_corruption(name: str, corruption: Corruption) -> None:
    """Checks the contract of a corruption on four tokens of two images.

    Raises:
        ValueError: if the corruption breaks the contract. The message has the name, the rule and the value.
    """
    if not isinstance(corruption, Corruption):
        raise ValueError(f"corruption {name!r} must be a Corruption, got {shorten(corruption)}")
    check_number(f"corruption {name!r}: fraction", getattr(corruption, "fraction", None), "(0, 1)")
    tokens, replaced = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[True, False], [True, True]])
    uniform = torch.tensor([0.1, 0.5, 0.9])
    codes = corruption.codes(
        tokens, replaced, uniform, codebook_size=3, predict=lambda at: torch.zeros(int(at.sum()), 3)
    )
    if not isinstance(codes, Tensor) or codes.shape != (3,) or codes.dtype != torch.int64:
        seen = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else shorten(codes)
        raise ValueError(f"corruption {name!r}: the codes must be an int64 tensor (R,), got {seen}")
    if not bool(((codes >= 0) & (codes < 3)).all()):
        raise ValueError(f"corruption {name!r}: the codes must lie in [0, K), got {codes.tolist()} for K = 3")


corruptions: Registry[Corruption] = Registry("corruption", "maskgit_pl.corruptions", check=check_corruption)


@corruptions.register("uniform")
@dataclass(frozen=True)
class UniformCorruption(Corruption):
    """Codes that are uniform over the codebook.

    Args:
        fraction: Probability that a visible token is replaced, in (0, 1).

    Source: random replacement of BERT, arXiv:1810.04805; for token editing, LLaDA2.1, arXiv:2602.08676. NLD-Image,
    arXiv:2606.29814, edits the tokens of images; its training was not reproduced.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, "(0, 1)")

    def codes(
        self, tokens: Tensor, replaced: Tensor, uniform: Tensor, *, codebook_size: int, predict: Predict
    ) -> Tensor:
        return (uniform * codebook_size).long().clamp(max=codebook_size - 1)


@corruptions.register("model")
@dataclass(frozen=True)
class ModelCorruption(Corruption):
    """Codes that the model draws for these positions: mistakes of the kind that decoding makes.

    The averaged network, which is the one that is sampled, sees the replaced positions masked in addition to the mask.
    It costs an additional forward pass without gradients.

    Args:
        fraction: Probability that a visible token is replaced, in (0, 1).

    Source: the idea of ProSeCo, Schiff et al., arXiv:2602.11590, which instead fills all masked tokens with the most
    likely codes, and adds a second loss on that sequence.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, "(0, 1)")

    def codes(
        self, tokens: Tensor, replaced: Tensor, uniform: Tensor, *, codebook_size: int, predict: Predict
    ) -> Tensor:
        return draw_codes(predict(replaced).float(), uniform)
