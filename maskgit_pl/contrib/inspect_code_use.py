"""Measures a tokenizer for its inspection page: use of codes, one picture per code, PSNR by class, worst images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.data import Batch
from maskgit_pl.evaluation.reconstruction import psnr
from maskgit_pl.pretrained import PretrainedTokenizer

__all__ = ["CodeUse", "measure_codes", "picture_codes"]

_NUM_WORST = 8
_MAP = 4  # rows and columns of the token map from which a code is drawn


@dataclass(frozen=True)
class CodeUse:
    """The results of encoding and decoding validation images.

    Args:
        counts: (K,) int64: number of tokens of each code.
        psnr_of_class: PSNR in dB by label.
        worst: (n, C, H, W) uint8: images with the largest error, the worst first.
        worst_reconstructions: (n, C, H, W) uint8: their reconstructions.
        num_images: Number of images.
    """

    counts: Tensor
    psnr_of_class: dict[int, float]
    worst: Tensor
    worst_reconstructions: Tensor
    num_images: int

    @property
    def usage(self) -> float:
        """The fraction of codes that occur."""
        return float((self.counts > 0).double().mean())

    @property
    def perplexity(self) -> float:
        """The perplexity of the code frequencies, in [1, K]."""
        shares = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.special.entr(shares).sum().exp())


def measure_codes(tokenizer: PretrainedTokenizer, batches: Iterable[Batch], *, max_images: int) -> CodeUse:
    """Encodes and decodes images.

    Args:
        tokenizer: The tokenizer, on its device.
        batches: Batches of uint8 images; rows that are not valid are ignored.
        max_images: Largest number of images, >= 1.

    Raises:
        ValueError: if there are no images.
    """
    counts = torch.zeros(tokenizer.network.config.codebook_size, dtype=torch.int64)
    errors, labels = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    worst = reconstructions = None
    worst_errors = torch.empty(0, dtype=torch.float64)
    for batch in batches:
        images = batch.content[batch.valid][: max_images - len(errors)]
        tokens = tokenizer.encode(images)
        decoded = tokenizer.decode(tokens)
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
        found = ((images.double() - decoded.double()) / 255).square().flatten(1).mean(1)  # (B,)
        errors = torch.cat([errors, found])
        labels = torch.cat([labels, batch.labels[batch.valid][: len(images)].cpu()])
        # Only the worst images are kept.
        worst_errors = torch.cat([worst_errors, found])
        worst = images if worst is None else torch.cat([worst, images])
        reconstructions = decoded if reconstructions is None else torch.cat([reconstructions, decoded])
        order = worst_errors.argsort(descending=True)[:_NUM_WORST]
        worst_errors, worst, reconstructions = worst_errors[order], worst[order], reconstructions[order]
        if len(errors) >= max_images:
            break
    if worst is None or reconstructions is None or not len(errors):
        raise ValueError("inspect: there must be at least one validation image, got none; choose others with --data")
    classes = {label: psnr(float(errors[labels == label].mean())) for label in sorted(set(labels.tolist()))}
    return CodeUse(counts, classes, worst, reconstructions, len(errors))


def picture_codes(tokenizer: PretrainedTokenizer, codes: Tensor) -> Tensor:
    """Decodes a small token map that is filled with a code, for each code, and cuts out its middle.

    Args:
        tokenizer: The tokenizer.
        codes: (n,) int64 in [0, K).

    Returns:
        (n, C, S, S) uint8; S is twice the downsampling factor.
    """
    factor = tokenizer.network.config.downsampling_factor
    maps = codes.to(next(tokenizer.network.parameters()).device).unsqueeze(1).repeat(1, _MAP * _MAP)
    pictures = tokenizer.decode(maps, grid=(_MAP, _MAP))
    return pictures[..., factor : 3 * factor, factor : 3 * factor]
