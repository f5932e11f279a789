"""Corruptions: functions from the tokens of an image to the input of the network, and their registry.

They are used in training, and where a method asks for it, in decoding. ``transformer.mvtm`` holds one, and hands the
same object to ``ParallelDecoder``. Yours is a registered frozen dataclass::

    @corruptions.register("noisy")
    @dataclass(frozen=True)
    class Noisy(Corruption):
        def __call__(self, tokens, mask, uniform, *, codebook_size, mask_token_id):
            codes = (uniform("codes") * codebook_size).long()
            return codes.where(uniform("which") < 0.1, tokens).masked_fill(mask, mask_token_id)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.text import shorten

__all__ = ["Corruption", "Mask", "Uniform", "corruptions"]

Uniform: TypeAlias = Callable[[str], Tensor]
"""Name of a stream -> uniform numbers (B, N) float32 in (0, 1), which depend on the samples only."""


class Corruption(ABC):
    """A function from the tokens of an image to the input of the network. Subclasses are frozen dataclasses.

    It is applied in the training step, after the masks are drawn. Which tokens the loss predicts is set by the mask and
    the objective: with ``visible_weight`` above 0 the network learns to mend changed tokens, too.

    Attributes:
        in_decoding: True if validation and each decoding step show corrupted tokens, too. It is then stored with the
            weights.
    """

    in_decoding: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, tokens: Tensor, mask: Tensor, uniform: Uniform, *, codebook_size: int, mask_token_id: int
    ) -> Tensor:
        """Returns what the network sees, (B, N) int64: codes, or ids of mask tokens.

        Args:
            tokens: (B, N) int64 in [0, K): the tokens; in decoding, the mask token where ``mask`` is True.
            mask: (B, N) bool, True = masked.
            uniform: Random numbers: a function of seed, sample and epoch, or of seed and step in decoding.
            codebook_size: K.
            mask_token_id: Id of the mask token, the last row of the embedding.
        """


def _check_corruption(name: str, corruption: Corruption) -> None:
    """Checks that a corruption hides the masked tokens of two images and gives integers of their shape."""
    derives_from(Corruption)(name, corruption)
    tokens, mask = torch.zeros(2, 6, dtype=torch.int64), torch.arange(12).view(2, 6) % 3 > 0
    seen = corruption(tokens, mask, lambda stream: torch.full((2, 6), 0.5), codebook_size=4, mask_token_id=99)
    if seen.dtype != torch.int64 or seen.shape != (2, 6) or bool(((seen < 4) & mask).any()):
        raise ValueError(
            f"corruption {name!r}: masked tokens must be mask tokens, and all (2, 6) int64, got {shorten(seen)}"
        )


corruptions: Registry[Corruption] = Registry(
    "corruption",
    "maskgit_pl.corruptions",
    check=_check_corruption,
    modules=("maskgit_pl.contrib.random_tokens",),
)


@corruptions.register("mask")
@dataclass(frozen=True)
class Mask(Corruption):
    """The mask token in place of the masked tokens. All others are shown. Source: paper, training objective."""

    def __call__(
        self, tokens: Tensor, mask: Tensor, uniform: Uniform, *, codebook_size: int, mask_token_id: int
    ) -> Tensor:
        return tokens.masked_fill(mask, mask_token_id)
