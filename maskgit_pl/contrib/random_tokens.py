"""The corruption ``random_tokens``: some of the visible tokens are wrong, as those of decoding are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.decoding.corruption import Corruption, Uniform, corruptions

__all__ = ["RandomTokens"]


@corruptions.register("random_tokens")
@dataclass(frozen=True)
class RandomTokens(Corruption):
    """Masks tokens, and replaces visible ones by random codes.

    The share of wrong tokens differs between images, uniformly from 0 to ``most``. With the objective's
    ``visible_weight`` above 0, the network learns to tell and to mend them.

    Args:
        most: Largest share of the visible tokens that are replaced, in [0, 1].

    Source: the idea of BIGFix, arXiv:2510.12231, which replaces tokens of its training sequences, too.
    """

    most: float = 0.2

    def __post_init__(self) -> None:
        check_number("most", self.most, "[0, 1]")

    def __call__(
        self, tokens: Tensor, mask: Tensor, uniform: Uniform, *, codebook_size: int, mask_token_id: int
    ) -> Tensor:
        share = self.most * uniform("share")[:, :1]  # (B, 1)
        codes = (uniform("codes") * codebook_size).long().clamp(max=codebook_size - 1)
        return codes.where(uniform("wrong") < share, tokens).masked_fill(mask, mask_token_id)
