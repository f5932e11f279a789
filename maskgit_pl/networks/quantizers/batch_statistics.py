"""Statistics and random choices over the rows of a global batch, equal for any number of ranks and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from maskgit_pl.distributed import rank_and_world, sum_over_ranks
from maskgit_pl.networks.quantizers.base import squared_distances
from maskgit_pl.randomness import permutation, random_bits

__all__ = ["code_statistics", "global_choice", "kmeans"]

_ITERATIONS = 10  # of k-means; that of lucidrains/vector-quantize-pytorch


def code_statistics(tokens: Tensor, rows: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Returns the number of rows of each code in the global batch, (K,), and their sum, (K, D)."""
    statistics = rows.new_zeros(codebook_size, rows.shape[1] + 1)  # sums and counts: one all-reduce for both
    statistics[:, :-1].index_add_(0, tokens, rows)
    statistics[:, -1] = torch.bincount(tokens, minlength=codebook_size)
    statistics = sum_over_ranks(statistics)
    return statistics[:, -1].clone(), statistics[:, :-1]


def global_choice(rows: Tensor, micro_batches: int, count: int, *, seed: int, step: int) -> Tensor:
    """Draws ``count`` rows of the global batch, the same for every number of ranks and of micro-batches."""
    total = rows.shape[0] * rank_and_world()[1]
    chosen = random_bits("restart", seed=seed, index=0, epoch=step, count=count)[0] % total
    return _rows_at(chosen, rows, micro_batches)


def kmeans(rows: Tensor, micro_batches: int, count: int, *, seed: int, step: int) -> Tensor:
    """Computes the centers of ``count`` clusters of the rows of the global batch, by Lloyd's algorithm.

    1. Start from different rows, drawn by a counter-based permutation; from repeated ones if there are too few.
    2. Assign each row to its nearest center, and move each center to the mean of its rows, 10 times. A center without
       rows stays.

    Args:
        rows: (A M, D) float32, the rows of this rank's A micro-batches.
        micro_batches: A.
        count: K.
        seed: Seed of the choice.
        step: Number of the step.

    Returns:
        (K, D) float32, the same on each rank.

    Source: Lloyd, "Least squares quantization in PCM", 1982.
    """
    # 1.
    total = rows.shape[0] * rank_and_world()[1]
    places = permutation(torch.arange(count) % total, total, stream="kmeans", seed=seed, epoch=step)
    centers = _rows_at(places, rows, micro_batches)
    # 2.
    for _ in range(_ITERATIONS):
        # Distances of one micro-batch at a time: the training held as many.
        parts = [squared_distances(part, centers).argmin(1) for part in rows.chunk(micro_batches)]
        counts, sums = code_statistics(torch.cat(parts), rows, count)
        means = sums / counts.clamp(min=1).unsqueeze(1)
        centers = torch.where(counts.unsqueeze(1) > 0, means, centers)
    return centers


def _rows_at(chosen: Tensor, rows: Tensor, micro_batches: int) -> Tensor:
    """Returns the rows at places (count,) of the global batch, (count, D) on each rank.

    1. With W ranks and M rows a micro-batch, row j of micro-batch a on rank r is at (a W + r) M + j: the order in which
       the data module deals samples out.
    2. Each rank takes its own rows at these places, and zeros for those of other ranks.
    3. The sum over ranks is the result.
    """
    # 1.
    (rank, ranks), size = rank_and_world(), rows.shape[0] // micro_batches
    micro_batch, owner, row = chosen // (size * ranks), chosen // size % ranks, chosen % size
    # 2.
    local = rows[(micro_batch * size + row).to(rows.device)]  # (count, D)
    # 3.
    return local if ranks == 1 else sum_over_ranks(local * (owner == rank).to(local).unsqueeze(1))
