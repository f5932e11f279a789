"""The masks of training, drawn from the mask schedule that decoding follows too.

``MaskSampler`` is used by ``mvtm.MaskedTokenModel`` and, as ``random_mask``, by ``evaluation.likelihood``. The
distribution of the ratio is one of ``mask_ratios``, the rule for the positions one of ``mask_positions``. ``Draws``
holds everything that a training step draws at random for its samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.mask_positions import Grid, MaskPositions, UniformPositions, random_mask
from maskgit_pl.mask_ratios import MaskRatio, ScheduleRatio
from maskgit_pl.randomness import random_bits, random_uniform
from maskgit_pl.schedules import MaskSchedule, num_masked

__all__ = ["Draws", "MaskSampler", "pad_positions", "random_mask", "true_positions"]


class Draws(NamedTuple):
    """The random draws of a micro-batch of B images of N tokens, a function of its samples.

    They are made on the host, before the batch is copied to the device: there the number of masked tokens is known, so
    that no operation on the device has a size that depends on values, for which the host would wait.

    Args:
        labels: (B,) int64: the labels, some of them replaced by the null label.
        mask: (B, N) bool, True = masked.
        positions: (M,) int64 in [0, B N): the tokens that the network predicts, by their places in the batch, image
            after image; rising, except for padding.
        is_real: (M,) bool, False for positions that only pad to a fixed number; None if there are none.
        replaced: (B, N) bool: visible tokens that a corruption replaces; None without corruption.
        replaced_positions: (R,) int64 in [0, B N), rising: the places of ``replaced``.
        uniform: (R,) float32 in (0, 1): a random number for each replaced token.
        slopes: (B,) float32: see ``MaskSampler.slope``; None if the objective needs none.
    """

    labels: Tensor
    mask: Tensor
    positions: Tensor
    is_real: Tensor | None = None
    replaced: Tensor | None = None
    replaced_positions: Tensor | None = None
    uniform: Tensor | None = None
    slopes: Tensor | None = None

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Draws:
        """Returns a copy on a device; see ``torch.Tensor.to``."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Draws:
        """Returns a copy in pinned memory, from which copies to a GPU do not wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Draws:
        return self._replace(**{name: change(part) for name, part in self._asdict().items() if part is not None})


def true_positions(mask: Tensor) -> Tensor:
    """Returns the places (M,) int64, rising, where a mask (B, N) bool on the host is True; see ``Draws.positions``."""
    return mask.flatten().nonzero().squeeze(1)


def pad_positions(positions: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Pads positions (M,) with zeros to a multiple of a number, so that few sizes occur.

    Returns:
        (M',) int64 positions, and (M',) bool, True where they are not padding.
    """
    more = -len(positions) % multiple
    is_real = torch.arange(len(positions) + more, device=positions.device) < len(positions)
    return F.pad(positions, (0, more)), is_real


@dataclass(frozen=True)
class MaskSampler:
    """A sampler of the masks of masked visual token modeling.

    The steps for each sample:

    1. Draw u, uniform on [0, 1). The u of a global batch of G samples are stratified: u = (pi(slot) + v) / G, with a
       random permutation pi for each step and v uniform on (0, 1). Together they cover [0, 1) evenly, which lowers the
       variance of the gradient.
    2. Compute the mask ratio max(gamma(u), min_mask_ratio), or with another distribution than gamma(u).
    3. Mask ceil(ratio N) positions, chosen uniformly or by another rule.

    The masks depend on (seed, sample, epoch, position) only, so they are equal for every number of ranks.

    Args:
        mask_schedule: gamma: the schedule object that the decoder holds too.
        seed: Seed in [0, 2**32).
        min_mask_ratio: Lower bound of the ratio, in [0, 1]. Ratios below it are raised to it, not rescaled.
        mask_ratio: The distribution of the ratio.
        mask_positions: The rule that chooses the positions.

    Raises:
        ValueError: if ``min_mask_ratio`` is out of range.

    Source: paper, training objective; MAGVIT code for ``min_mask_ratio``.
    """

    mask_schedule: MaskSchedule
    seed: int
    min_mask_ratio: float = 0.0
    mask_ratio: MaskRatio = ScheduleRatio()  # noqa: RUF009  # frozen
    mask_positions: MaskPositions = UniformPositions()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        check_number("min_mask_ratio", self.min_mask_ratio, "[0, 1]")

    def ratio(self, num_tokens: int, *, index: Tensor, epoch: Tensor, position: Tensor, global_batch: int) -> Tensor:
        """Draws mask ratios, (B,) float32 in [0, 1]; see ``mask`` for the arguments."""
        progress = self._draw_progress(index, epoch, position, global_batch)  # 1.
        return self._ratio_at(progress, num_tokens)  # 2.

    def slope(self, num_tokens: int, *, index: Tensor, epoch: Tensor, position: Tensor, global_batch: int) -> Tensor:
        """Computes |d ratio / du| for the ratios of ``ratio``, (B,) float32 >= 0; infinite where the curve is vertical.

        It is the inverse of the density of the ratio, so that a weight of ``slope`` turns an expectation under the
        drawn ratios into one under uniform ratios.

        Raises:
            ValueError: if the ratio cannot be differentiated.
        """
        with torch.enable_grad():
            progress = self._draw_progress(index, epoch, position, global_batch).requires_grad_()
            ratio = self._ratio_at(progress, num_tokens)
            if not ratio.requires_grad:
                raise ValueError(
                    f"mask_ratio must be differentiable for this objective, got {self.mask_ratio} and "
                    f"{self.mask_schedule}; compute the ratio by torch operations on u, or choose another one"
                )
            (slope,) = torch.autograd.grad(ratio.sum(), progress)
        return slope.abs()

    def covers_all_counts(self, num_tokens: int) -> bool:
        """Returns True if every number of masked tokens from 1 to N can be drawn."""
        ends = self._ratio_at(torch.tensor([0.0, 1.0]), num_tokens)
        low, high = (float(end) * num_tokens for end in (ends.min(), ends.max()))
        return low <= 1 and high > num_tokens - 1 + 1e-3  # ceil gives 1 and N

    def _draw_progress(self, index: Tensor, epoch: Tensor, position: Tensor, global_batch: int) -> Tensor:
        """Draws u, (B,) float32 in [0, 1]."""
        stratum = self._draw_stratum(position, global_batch)
        jitter = random_uniform("mask-ratio", seed=self.seed, index=index, epoch=epoch)[:, 0]
        return ((stratum + jitter) / global_batch).clamp(max=1.0)

    def _ratio_at(self, progress: Tensor, num_tokens: int) -> Tensor:
        return self.mask_ratio(progress, self.mask_schedule, num_tokens).clamp(min=self.min_mask_ratio)

    def _draw_stratum(self, position: Tensor, global_batch: int) -> Tensor:
        """Returns pi(slot), (B,) int64 in [0, G): the number of random keys of the step below the key of the slot."""
        # Each rank computes all G keys of the step, so ranks agree on pi without communication.
        step, slot = position // global_batch, position % global_batch
        words = random_bits("mask-ratio/stratum", seed=self.seed, index=0, epoch=step, count=global_batch)
        # The slot as the last digit makes the keys distinct: equal words would otherwise share a stratum.
        keys = words * global_batch + torch.arange(global_batch, device=words.device)  # (B, G)
        return (keys < keys.gather(1, slot.unsqueeze(1))).sum(1)

    def mask(
        self,
        num_tokens: int,
        *,
        index: Tensor,
        epoch: Tensor,
        position: Tensor,
        global_batch: int,
        grid: Grid | None = None,
    ) -> Tensor:
        """Draws the masks of a batch.

        Args:
            num_tokens: N, tokens per image.
            index: (B,) int64 in [0, 2**32): global sample index.
            epoch: (B,) int64 in [0, 2**32): epoch of each sample.
            position: (B,) int64: position in the training stream, step * global_batch + slot.
            global_batch: G, samples per step over all ranks.
            grid: Rows and columns of tokens, for rules that depend on the place.

        Returns:
            (B, N) bool, True = masked; each row has 1 to N masked positions.

        Raises:
            ValueError: if the rule for the positions requires a grid and ``grid`` is None.
        """
        ratio = self.ratio(num_tokens, index=index, epoch=epoch, position=position, global_batch=global_batch)
        count = num_masked(ratio, num_tokens, rounding="ceil")  # 3.
        return self.mask_positions.mask(count, num_tokens, grid=grid, seed=self.seed, index=index, epoch=epoch)
