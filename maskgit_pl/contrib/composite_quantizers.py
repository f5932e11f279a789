"""The base of quantizers that consist of several quantizers of k codes each: one flat token, losses, updates, sizes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskgit_pl.networks.quantizers.base import Quantizer, QuantizerOutput, build_sized, quantizers

__all__ = ["CompositeQuantizer", "check_inner", "inner_size"]

_SEED_STEP = 0x9E3779B9  # odd, so that the seeds of the parts are different


class CompositeQuantizer(Quantizer):
    """The base of quantizers of several parts with k codes each, K = k^parts.

    A subclass holds its parts in a ``ModuleList`` and says what each of them quantizes.

    Args:
        parts: The quantizers, all of one K and D. The token is the number in base k of theirs.
        code_dim: D, size of a code.
    """

    def __init__(self, parts: Sequence[Quantizer], *, code_dim: int) -> None:
        super().__init__(codebook_size=parts[0].codebook_size ** len(parts), code_dim=code_dim)
        self._base = parts[0].codebook_size

    @property
    @abstractmethod
    def parts(self) -> nn.ModuleList:
        """The quantizers."""
        raise NotImplementedError

    @property
    def _quantizers(self) -> list[Quantizer]:
        return [cast(Quantizer, part) for part in self.parts]

    def begin_micro_batch(self, *, seed: int, step: int, micro_batch: int) -> None:
        """Tells each part which random numbers its next training forward draws; each has a seed of its own."""
        for number, part in enumerate(self._quantizers):
            part.begin_micro_batch(seed=_seed_of(seed, number), step=step, micro_batch=micro_batch)

    def _update_part(
        self, number: int, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int
    ) -> None:
        """Updates a part from its tokens and features of a global batch; see ``Quantizer.update``."""
        self._quantizers[number].update(tokens, features, seed=_seed_of(seed, number), step=step)

    def _mean_loss(self, outputs: Sequence[QuantizerOutput]) -> Tensor:
        """Returns the mean loss of the parts, and keeps the means of its parts by name in ``losses``."""
        names = dict.fromkeys(name for part in self._quantizers for name in part.losses)
        losses = [[part.losses[name] for part in self._quantizers if name in part.losses] for name in names]
        # A name that only some parts have counts as 0 in the others.
        self.losses = {
            name: torch.stack(values).sum() / len(outputs) for name, values in zip(names, losses, strict=True)
        }
        return torch.stack([output.loss for output in outputs]).mean()

    def _join(self, digits: Sequence[Tensor]) -> Tensor:
        """Returns the flat tokens of the parts' tokens, the lowest digit first."""
        joined = torch.zeros_like(digits[0])
        for number, digit in enumerate(digits):
            joined = joined + digit * self._base**number
        return joined

    def _digits(self, tokens: Tensor) -> list[Tensor]:
        """Returns the parts' tokens of flat tokens, the lowest digit first."""
        return [tokens // self._base**number % self._base for number in range(len(self.parts))]


def check_inner(owner: str, quantizer: str | Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Checks the quantizer of each part of a composite one.

    Args:
        owner: Name of the composite quantizer.
        quantizer: Name or mapping of the parts' quantizer.
        refused: Name of a quantizer that does not fit -> the end of the message.

    Raises:
        ValueError: if it is unknown, has wrong arguments, or does not fit.
    """
    name = quantizer.get("name") if isinstance(quantizer, Mapping) else quantizer
    if isinstance(name, str) and name in refused:
        raise ValueError(f"quantizer of {owner!r} must not be {name!r}{refused[name]}")
    try:
        quantizers.build(quantizer)
    except ValueError as error:
        raise ValueError(f"quantizer must be a registered quantizer and its arguments: {error}") from error


def inner_size(
    owner: str, quantizer: str | Mapping[str, Any], *, parts: tuple[int, str], codebook_size: int, code_dim: int
) -> int:
    """Returns k, the number of codes of each part.

    Args:
        owner: Name of the composite quantizer.
        quantizer: Name or mapping of the parts' quantizer.
        parts: Number of the parts, and what one is called, such as ``(2, "group")``.
        codebook_size: K = k^parts.
        code_dim: Size of a part's code.

    Raises:
        ValueError: if K is no such power, or the parts' quantizer cannot have k codes of this size.
    """
    count, noun = parts
    size: int = max(2, round(codebook_size ** (1 / count)))
    if size**count != codebook_size:
        raise ValueError(
            f"network codebook_size must be k^{count} for quantizer {owner!r} of {count} {noun}s, got "
            f"{codebook_size}; {size**count} = {size}^{count} fits"
        )
    try:
        build_sized(quantizer, codebook_size=size, code_dim=code_dim)
    except ValueError as error:
        raise ValueError(f"each {noun} of quantizer {owner!r} has {size} codes: {error}") from error
    return size


def _seed_of(seed: int, part: int) -> int:
    return (seed + part * _SEED_STEP) % 2**32
