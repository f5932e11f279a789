"""Statistics and random choices over the rows of a global batch, equal for any number of ranks and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from maskgit_pl.distributed import rank_and_world, sum_over_ranks
from maskgit_pl.randomness import random_bits

__all__ = ["code_statistics", "global_choice"]


def code_statistics(tokens: Tensor, rows: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Returns the number of rows of each code in the global batch, (K,), and their sum, (K, D)."""
    statistics = rows.new_zeros(codebook_size, rows.shape[1] + 1)  # sums and counts: one all-reduce for both
    statistics[:, :-1].index_add_(0, tokens, rows)
    statistics[:, -1] = torch.bincount(tokens, minlength=codebook_size)
    statistics = sum_over_ranks(statistics)
    return statistics[:, -1].clone(), statistics[:, :-1]


def global_choice(rows: Tensor, micro_batches: int, count: int, *, seed: int, step: int) -> Tensor:
    """Draws ``count`` rows of the global batch, the same for every number of ranks and of micro-batches.

    1. Draw positions in the global batch. With W ranks and M rows a micro-batch, row j of micro-batch a on rank r is at
       (a W + r) M + j: the order in which the data module deals samples out.
    2. Each rank takes its own rows at these positions, and zeros for those of other ranks.
    3. The sum over ranks is the result.
    """
    # 1.
    (rank, ranks), size = rank_and_world(), rows.shape[0] // micro_batches
    total = rows.shape[0] * ranks
    chosen = random_bits("restart", seed=seed, index=0, epoch=step, count=count)[0] % total
    micro_batch, owner, row = chosen // (size * ranks), chosen // size % ranks, chosen % size
    # 2.
    local = rows[(micro_batch * size + row).to(rows.device)]  # (count, D)
    # 3.
    return local if ranks == 1 else sum_over_ranks(local * (owner == rank).to(local).unsqueeze(1))
