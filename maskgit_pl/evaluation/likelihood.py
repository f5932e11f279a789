"""How likely a transformer finds the tokens of real images: the paper's masked likelihood, a bound, the exact one.

Each image's value is a float64 number that depends on the image, its place among the images and the seed alone. Several
ranks share the batches, which are the same on any number of ranks, and gather the values in the order of the images: a
result is the same to the last bit on 1 and on 8 of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.data import ShardData
from maskgit_pl.distributed import gather_rows
from maskgit_pl.evaluation.features import iter_row_batches
from maskgit_pl.evaluation.reference import iter_real_batches
from maskgit_pl.imaging import to_unit_range
from maskgit_pl.masking import MaskSampler, random_mask
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.randomness import random_bits
from maskgit_pl.schedules import MaskSchedule

__all__ = ["Estimate", "ImageLikelihood", "MaskDraws", "encode_real_images", "exact_nll", "masked_nll", "negative_elbo"]

MaskedPredictor: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
AutoregressiveNetwork: TypeAlias = Callable[[Tensor, Tensor], Tensor]
OnImages: TypeAlias = Callable[[int], object]
_WORDS = 2**32


@dataclass(frozen=True)
class MaskDraws:
    """The masks that each image is measured with.

    Args:
        count: Masks of an image, at least 1.
        seed: In [0, 2**32).
    """

    count: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over images.

    Args:
        mean: Of the images' values.
        standard_error: Their standard deviation by the square root of their count: what other images and other draws
            would change.
    """

    mean: float
    standard_error: float

    @classmethod
    def from_values(cls, values: Tensor) -> Estimate:
        """Computes the estimate of (n,) float64 values, n at least 2."""
        return cls(float(values.mean()), float(values.std()) / math.sqrt(len(values)))

    def scale(self, factor: float) -> Estimate:
        """Returns the estimate in another unit."""
        return Estimate(factor * self.mean, abs(factor) * self.standard_error)


@dataclass(frozen=True)
class ImageLikelihood:
    """The negative log-likelihood of images' tokens, exact or a bound from above; smaller is better.

    Args:
        nats: Per image.
        num_tokens: N, tokens of an image.
    """

    nats: Estimate
    num_tokens: int

    @property
    def bits_per_image(self) -> Estimate:
        """Bits that a code of an image's tokens needs."""
        return self.nats.scale(1 / math.log(2))

    @property
    def bits_per_token(self) -> Estimate:
        """The same of a token; uniform guesses need log2 K."""
        return self.nats.scale(1 / (math.log(2) * self.num_tokens))


def masked_nll(
    network: MaskedPredictor,
    tokens: Tensor,
    labels: Tensor,
    *,
    mask_schedule: MaskSchedule,
    mask_token_id: int,
    draws: MaskDraws = MaskDraws(),  # frozen
    batch_size: int = 100,
    on_images: OnImages = lambda count: None,
) -> Estimate:
    """Computes the masked negative log-likelihood: nats of a masked token, given the visible ones and the class.

    E over images, r ~ U(0, 1) and sets M of ceil(gamma(r) N) positions of 1 / |M| sum over i in M of
    -log p(y_i | y outside M, class): the mean over rows of the row's mean over its masked tokens, which is what
    training minimises, without label smoothing and with the softmax over the K codes alone. The r of an image's draws
    are stratified. Two schedules take their means over different masks, so the smaller number is not the better model:
    for that see ``negative_elbo``.

    Args:
        network: ``(tokens (B, N), labels (B,), mask (B, N) bool) -> logits (masked tokens, K)``, row after row, as
            ``MaskedTransformer`` in evaluation mode.
        tokens: (n, N) int64 in [0, K), on the network's device, n at least 2.
        labels: (n,) int64, on the same device.
        mask_schedule: gamma, the model's own.
        mask_token_id: What stands at masked positions.
        draws: Masks of an image, and their seed.
        batch_size: Images at a time; the same on all ranks.
        on_images: Called with the number of images that this rank has done.

    Raises:
        ValueError: if there are fewer than two images, the number of labels differs, or a number is out of range.

    Source: paper, Table 3 ("NLL") and the training objective; the released code's loss for the mean over rows.
    """
    _check(tokens, labels, draws=draws.count, batch_size=batch_size)
    sampler = MaskSampler(mask_schedule, draws.seed)

    def mask(index: Tensor, draw: int) -> Tensor:
        draw_of_row = torch.full_like(index, draw)
        place = {"index": index, "epoch": draw_of_row, "position": index * draws.count + draw_of_row}
        return sampler.mask(tokens.shape[1], **place, global_batch=draws.count)

    values = _masked_row_nll(
        network, tokens, labels, mask, mask_token_id, draws=draws.count, batch_size=batch_size, on_images=on_images
    )
    return Estimate.from_values(values)


def negative_elbo(
    network: MaskedPredictor,
    tokens: Tensor,
    labels: Tensor,
    *,
    mask_token_id: int,
    draws: MaskDraws = MaskDraws(),  # frozen
    batch_size: int = 100,
    on_images: OnImages = lambda count: None,
) -> ImageLikelihood:
    """Computes the order-agnostic bound: -log p(x | class) is at most this, in nats of an image.

    log p(x) >= E over t ~ U{1..N} and orders s of N / (N - t + 1) sum over k >= t of log p(x_s(k) | x_s(<t)), the
    likelihood of a model that uncovers one token after the other in a random order. With m = N - t + 1 masked tokens
    this is N times the row's mean over them, m uniform on {1..N}: N times ``masked_nll`` of the linear schedule,
    whatever schedule the model was trained with, so models of all schedules compare. It is exact where the network's
    conditionals are those of one joint distribution. The t of an image's draws are stratified.

    Args:
        network: See ``masked_nll``.
        tokens: (n, N) int64 in [0, K), on the network's device, n at least 2.
        labels: (n,) int64, on the same device.
        mask_token_id: What stands at masked positions.
        draws: Pairs (t, s) of an image, and their seed; N and its multiples take each t equally often.
        batch_size: Images at a time; the same on all ranks.
        on_images: Called with the number of images that this rank has done.

    Raises:
        ValueError: see ``masked_nll``.

    Source: Uria et al., arXiv:1310.1757; Hoogeboom et al., arXiv:2110.02037, eq. 4 and 5.
    """
    _check(tokens, labels, draws=draws.count, batch_size=batch_size)
    num_tokens = tokens.shape[1]

    def mask(index: Tensor, draw: int) -> Tensor:
        word = random_bits("likelihood/masked", seed=draws.seed, index=index, epoch=draw)[:, 0]
        count = 1 + (draw * _WORDS + word) * num_tokens // (draws.count * _WORDS)  # (B,) in [1, N], by integers alone
        return random_mask(count, num_tokens, seed=draws.seed, index=index, epoch=draw)

    values = _masked_row_nll(
        network, tokens, labels, mask, mask_token_id, draws=draws.count, batch_size=batch_size, on_images=on_images
    )
    return ImageLikelihood(Estimate.from_values(num_tokens * values), num_tokens)


def exact_nll(
    network: AutoregressiveNetwork,
    tokens: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 100,
    on_images: OnImages = lambda count: None,
) -> ImageLikelihood:
    """Computes the exact negative log-likelihood of a network that predicts each token from those before it.

    Args:
        network: ``(tokens (B, N), labels (B,)) -> logits (B, N, K)``; those of token i see the class and tokens before
            i alone.
        tokens: (n, N) int64 in [0, K), on the network's device, n at least 2.
        labels: (n,) int64, on the same device.
        batch_size: Images at a time; the same on all ranks.
        on_images: Called with the number of images that this rank has done.

    Raises:
        ValueError: see ``masked_nll``.
    """
    _check(tokens, labels, batch_size=batch_size)

    def nll(index: Tensor) -> Tensor:
        rows = tokens[index]
        logits = network(rows, labels[index])
        return F.cross_entropy(logits.float().transpose(1, 2), rows, reduction="none").cpu().double().sum(1)

    values = _map_images(nll, len(tokens), batch_size=batch_size, on_images=on_images)
    return ImageLikelihood(Estimate.from_values(values), tokens.shape[1])


@torch.inference_mode()
def encode_real_images(
    pipe: MaskGIT, data: ShardData, *, limit: int | None = None, batch_size: int = 100
) -> tuple[Tensor, Tensor]:
    """Computes tokens and labels of the val split, by the model's tokenizer; the ranks share the work.

    Args:
        pipe: The model.
        data: The real images, of the tokenizer's size.
        limit: So many images, drawn at random, always the same ones; None for all, in their order.
        batch_size: Images at a time.

    Returns:
        (n, N) int64 and (n,) int64, on the model's device, the same on all ranks.
    """
    tokens = [torch.empty(0, pipe.tokenizer.grid[0] * pipe.tokenizer.grid[1], dtype=torch.int64)]
    labels, index = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for batch in iter_real_batches(data, "val", num_images=limit, shuffled=True, batch_size=batch_size):
        tokens.append(pipe.tokenizer.network.encode(to_unit_range(batch.content.to(pipe.device))).cpu())
        labels.append(batch.labels)
        index.append(batch.position)
    whole = [gather_rows(torch.cat(rows), torch.cat(index)).to(pipe.device) for rows in (tokens, labels)]
    return whole[0], whole[1]


def _check(tokens: Tensor, labels: Tensor, **numbers: int) -> None:
    if tokens.ndim != 2 or len(tokens) < 2 or labels.shape != tokens.shape[:1]:
        raise ValueError(
            "likelihood: tokens (n, N) of at least 2 images and a label for each are needed, got "
            f"{tuple(tokens.shape)} and {tuple(labels.shape)}"
        )
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"likelihood {name}: at least 1 is needed, got {number}")


def _masked_row_nll(
    network: MaskedPredictor,
    tokens: Tensor,
    labels: Tensor,
    mask_of: Callable[[Tensor, int], Tensor],
    mask_token_id: int,
    *,
    draws: int,
    batch_size: int,
    on_images: OnImages,
) -> Tensor:
    """Computes (n,) float64: of each image the mean over its draws of the mean nats of a masked token."""

    def nll(index: Tensor) -> Tensor:
        rows, total = tokens[index], torch.zeros(len(index), dtype=torch.float64)
        for draw in range(draws):
            mask = mask_of(index, draw).to(rows.device)
            logits = network(rows.masked_fill(mask, mask_token_id), labels[index], mask)
            of_token = F.cross_entropy(logits.float(), rows[mask], reduction="none").cpu().double()
            row_of_token, masked = mask.nonzero()[:, 0].cpu(), mask.sum(1).cpu()
            total += torch.bincount(row_of_token, weights=of_token, minlength=len(index)) / masked
        return total / draws

    return _map_images(nll, len(tokens), batch_size=batch_size, on_images=on_images)


@torch.inference_mode()
def _map_images(values_of: Callable[[Tensor], Tensor], count: int, *, batch_size: int, on_images: OnImages) -> Tensor:
    """Computes (count,) float64: the values of all images, from functions of the rows (B,) int64 of a batch."""
    mine = [torch.arange(rows.start, rows.stop) for rows in iter_row_batches(count, batch_size=batch_size)]
    values = [torch.empty(0, dtype=torch.float64)]
    for index in mine:
        values.append(values_of(index))
        on_images(len(index))
    return gather_rows(torch.cat(values), torch.cat([torch.empty(0, dtype=torch.int64), *mine]))
