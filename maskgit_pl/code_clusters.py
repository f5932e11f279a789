"""Clusters of the codes of a tokenizer, all of one size, for the objective ``cluster_cross_entropy``."""

from __future__ import annotations

import torch
from torch import Tensor

from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.quantizers.base import squared_distances
from maskgit_pl.randomness import permutation

__all__ = ["balanced_clusters", "check_clusters"]

_ITERATIONS = 10


def check_clusters(num_clusters: int, network: BackboneConfig, *, tokenizer: str) -> None:
    """Checks that the codes of a tokenizer can be clustered for a loss.

    Args:
        num_clusters: n, number of clusters.
        network: Configuration of the network that is trained.
        tokenizer: Folder of the tokenizer.

    Raises:
        ValueError: if there is no tokenizer, n does not divide the codebook size, or the network has token groups.
    """
    size = network.codebook_size
    if not tokenizer:
        raise ValueError("tokenizer must be a pretrained folder for an objective with clusters of its codes, got ''")
    if size % num_clusters or size == num_clusters:
        raise ValueError(
            f"objective num_clusters must divide the codebook size {size} and be smaller, got {num_clusters}"
        )
    if network.num_token_groups > 1:
        raise ValueError(
            "network.num_token_groups must be 1 for an objective with clusters of codes, which needs a logit for each "
            f"code, got {network.num_token_groups}; use the objective masked_cross_entropy"
        )


@torch.no_grad()
def balanced_clusters(codes: Tensor, num_clusters: int, *, seed: int) -> Tensor:
    """Divides codes into clusters of equal size, by a balanced k-means.

    1. Start from different codes, drawn by a counter-based permutation.
    2. Assign the codes to the centers, K / n to each, and move each center to the mean of its codes, 10 times.

    Args:
        codes: (K, D) float: the codes.
        num_clusters: n, a divisor of K.
        seed: Seed of the choice, in [0, 2**32).

    Returns:
        (n, K / n) int64 on the CPU: the codes of each cluster, in rising order.

    Source: IAR, arXiv:2501.00880, balanced k-means clustering; its code runs up to 100 iterations on normalized codes.
    """
    codes = codes.detach().cpu().float()
    # 1.
    centers = codes[permutation(torch.arange(num_clusters), len(codes), stream="code-clusters", seed=seed)]
    # 2.
    for _ in range(_ITERATIONS):
        members = _assign(squared_distances(codes, centers)).argsort(stable=True).view(num_clusters, -1)
        centers = codes[members].mean(1)
    return members


def _assign(distances: Tensor) -> Tensor:
    """Assigns K / n codes to each of n centers, nearest ones first.

    In each round every free code asks for its nearest center that is not full, and a center takes those that are
    nearest to it while it has room.

    Args:
        distances: (K, n) float32.

    Returns:
        (K,) int64 in [0, n).
    """
    codebook_size, num_clusters = distances.shape
    room = torch.full((num_clusters,), codebook_size // num_clusters)
    assigned, free = torch.empty(codebook_size, dtype=torch.int64), torch.arange(codebook_size)
    while len(free):
        nearest, center = distances[free].masked_fill(room == 0, torch.inf).min(1)
        order = nearest.argsort(stable=True)
        order = order[center[order].argsort(stable=True)]  # center after center, the nearest codes first
        asked = torch.bincount(center, minlength=num_clusters)
        place = (
            torch.arange(len(free)) - (asked.cumsum(0) - asked)[center[order]]
        )  # of a code in the queue of its center
        taken = order[place < room[center[order]]]
        assigned[free[taken]] = center[taken]
        room -= torch.bincount(center[taken], minlength=num_clusters)
        free = free[torch.ones(len(free), dtype=torch.bool).index_fill(0, taken, value=False)]
    return assigned
