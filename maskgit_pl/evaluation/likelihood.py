"""Likelihoods of the tokens of real images: the paper's masked NLL, the order-agnostic bound, and the exact NLL.

Each function returns one float64 value per image, which depends only on the image, its index and the seed. The ranks
share the batches, whose contents do not depend on the number of ranks: results are bit-exact for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.data import ShardData
from maskgit_pl.data.manifest import Split
from maskgit_pl.evaluation.extractors import gather_rows, iter_row_batches
from maskgit_pl.evaluation.metrics import MOST_GRIDS, TokenGrids
from maskgit_pl.evaluation.reference import iter_real_batches
from maskgit_pl.masking import MaskSampler, UniformPositions, true_positions
from maskgit_pl.networks.backbone import Backbone
from maskgit_pl.networks.vqgan import to_unit_range
from maskgit_pl.pretrained.networks import PretrainedTokenizer
from maskgit_pl.randomness import random_bits

AutoregressiveNetwork: TypeAlias = Callable[[Tensor, Tensor], Tensor]
OnImages: TypeAlias = Callable[[int], object]
_WORDS = 2**32  # number of values of a random 32-bit word


def masked_nll(
    network: Backbone,
    tokens: Tensor,
    labels: Tensor,
    vectors: Tensor | None = None,
    *,
    sampler: MaskSampler,
    draws: int = 4,
    batch_size: int = 100,
    on_images: OnImages = lambda count: None,
) -> Tensor:
    """Computes the masked negative log-likelihood in nats per masked token.

    ::

        NLL = E over images, r ~ U(0, 1) and random sets M of ceil(gamma(r) N) positions of
              1 / |M| sum over i in M of -log p(y_i | tokens outside M, class)

    This is the training loss without label smoothing: the mean over images of the mean over their masked tokens, with a
    softmax over the K codes. The r of the masks of an image are stratified. Values of two schedules are means over
    different masks, so that a lower value does not mean a better model; use ``negative_elbo`` to compare them.

    Args:
        network: Network with bidirectional attention.
        tokens: (n, N) int64 in [0, K), on the network's device.
        labels: (n,) int64, on the same device.
        vectors: (n, C) float, on the same device; None for a network without vectors.
        sampler: Sampler of masks with the schedule gamma of the model and a seed.
        draws: Masks per image.
        batch_size: Images per batch, the same on all ranks.
        on_images: Called after each batch of this rank with its number of images.

    Returns:
        (n,) float64: NLL of each image in nats per masked token.

    Source: paper, Table 3 ("NLL") and the training objective; the loss of the released code for the mean over rows.
    """

    def mask(index: Tensor, draw: int) -> Tensor:
        # The sampler stratifies r over the positions of a global batch. Here the draws of one image form that
        # batch, and each draw is an epoch, so that its mask differs.
        draw_of_row = torch.full_like(index, draw)
        position = index * draws + draw_of_row
        return sampler.mask(tokens.shape[1], index=index, epoch=draw_of_row, position=position, global_batch=draws)

    return _masked_row_nll(
        network, tokens, labels, vectors, mask, draws=draws, batch_size=batch_size, on_images=on_images
    )


def negative_elbo(
    network: Backbone,
    tokens: Tensor,
    labels: Tensor,
    vectors: Tensor | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 100,
    on_images: OnImages = lambda count: None,
) -> Tensor:
    """Computes the order-agnostic bound, an upper bound of -log p(x | class) in nats per image.

    It is the likelihood of a model that decides one token after another in a random order s::

        log p(x) >= E over t ~ U{1..N} and orders s of
                    N / (N - t + 1) sum over k >= t of log p(x_s(k) | x_s(<t))

    With m = N - t + 1 masked tokens, this is N times the mean over them, where m is uniform on {1..N}: N
    times ``masked_nll`` of the linear schedule. It does not depend on the schedule of the training, so that
    models of all schedules are comparable. The bound is exact if the conditionals of the network belong to
    one joint distribution. The t of the draws of an image are stratified.

    The arguments are those of ``masked_nll``. ``draws`` is the number of pairs (t, s) per image, of which a multiple of
    N takes each t equally often, and ``seed`` their seed, in [0, 2**32).

    Returns:
        (n,) float64: the bound of each image, in nats.

    Source: Uria et al., arXiv:1310.1757; Hoogeboom et al., arXiv:2110.02037, eq. 4 and 5.
    """
    num_tokens = tokens.shape[1]

    def mask(index: Tensor, draw: int) -> Tensor:
        word = random_bits("likelihood/masked", seed=seed, index=index, epoch=draw)[:, 0]
        # Draw j of J takes u in [j / J, (j + 1) / J), and m = 1 + floor(u N). Integers have no rounding errors.
        count = 1 + (draw * _WORDS + word) * num_tokens // (draws * _WORDS)  # (B,) in [1, N]
        return UniformPositions().mask(count, num_tokens, seed=seed, index=index, epoch=draw)

    return num_tokens * _masked_row_nll(
        network, tokens, labels, vectors, mask, draws=draws, batch_size=batch_size, on_images=on_images
    )


def exact_nll(
    network: AutoregressiveNetwork,
    tokens: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 100,
    on_images: OnImages = lambda count: None,
) -> Tensor:
    """Computes the exact negative log-likelihood of a network that predicts each token from those before it.

    The network is ``(tokens (B, N), labels (B,)) -> logits (B, N, K)``, where the logits of token i depend only on the
    class and on tokens before i. See ``masked_nll`` for the other arguments.

    Returns:
        (n,) float64: -log p(x | class) = sum over i of -log p(x_i | x_<i, class) of each image, in nats.
    """

    def nll(index: Tensor) -> Tensor:
        rows = tokens[index]
        logits = network(rows, labels[index])  # (B, N, K); cross_entropy wants the classes in dimension 1
        return F.cross_entropy(logits.float().transpose(1, 2), rows, reduction="none").cpu().double().sum(1)

    return _map_images(nll, len(tokens), batch_size=batch_size, on_images=on_images)


@torch.inference_mode()
def encode_real_images(
    tokenizer: PretrainedTokenizer | None,
    data: ShardData,
    *,
    split: Split = "val",
    limit: int | None = None,
    batch_size: int = 100,
) -> tuple[Tensor, Tensor]:
    """Encodes images of a split with a tokenizer; the ranks share the work.

    ``limit`` is a number of random images, the same in every call; None for all, in order. Without a tokenizer, the
    data are tokens already.

    Returns:
        (n, N) int64 tokens and (n,) int64 labels, on the tokenizer's device or the CPU, the same on all ranks.
    """
    device = torch.device("cpu") if tokenizer is None else next(tokenizer.network.parameters()).device

    def encode(content: Tensor) -> Tensor:
        return content if tokenizer is None else tokenizer.network.encode(to_unit_range(content.to(device)))

    rows = gather_rows([
        {"index": batch.position, "tokens": encode(batch.content).cpu(), "labels": batch.labels}
        for batch in iter_real_batches(data, split, num_images=limit, batch_size=batch_size)
    ])  # fmt: skip
    return rows["tokens"].to(device), rows["labels"].to(device)


def encode_real_grids(
    tokenizer: PretrainedTokenizer | None,
    data: ShardData,
    *,
    split: Split = "val",
    limit: int = MOST_GRIDS,
    batch_size: int = 100,
) -> TokenGrids:
    """Encodes images of a split for metrics of tokens; its generated grids are the real ones at first."""
    tokens, labels = encode_real_images(tokenizer, data, split=split, limit=limit, batch_size=batch_size)
    if tokenizer is None:
        assert data.summary.tokens is not None
        grids = tokens.reshape(len(tokens), *data.summary.tokens[0])
        return TokenGrids(grids, grids, labels, None)
    grids, quantizer = tokens.cpu().reshape(len(tokens), *tokenizer.grid), tokenizer.network.quantizer
    with torch.no_grad():
        codes = quantizer.lookup(torch.arange(quantizer.codebook_size, device=tokens.device)).float().cpu()
    return TokenGrids(grids, grids, labels.cpu(), codes)


def _masked_row_nll(
    network: Backbone,
    tokens: Tensor,
    labels: Tensor,
    vectors: Tensor | None,
    mask_of: Callable[[Tensor, int], Tensor],
    *,
    draws: int,
    batch_size: int,
    on_images: OnImages,
) -> Tensor:
    """Computes (n,) float64: for each image, the mean over its masks of the mean NLL of the masked tokens, in nats."""

    def nll(index: Tensor) -> Tensor:
        rows, total = tokens[index], torch.zeros(len(index), dtype=torch.float64)
        vectors_of_rows = None if vectors is None else vectors[index]
        for draw in range(draws):
            mask = mask_of(index, draw).to(rows.device)  # (B, N)
            masked_rows = rows.masked_fill(mask, network.config.mask_token_id)
            logits = network.forward_selected(masked_rows, labels[index], true_positions(mask), vectors=vectors_of_rows)
            # One value per masked token, image after image; the sums per image are float64, independent of the device.
            of_token = F.cross_entropy(logits.float(), rows[mask], reduction="none").cpu().double()
            row_of_token, masked = mask.nonzero()[:, 0].cpu(), mask.sum(1).cpu()
            total += torch.bincount(row_of_token, weights=of_token, minlength=len(index)) / masked
        return total / draws

    return _map_images(nll, len(tokens), batch_size=batch_size, on_images=on_images)


@torch.inference_mode()
def _map_images(values_of: Callable[[Tensor], Tensor], count: int, *, batch_size: int, on_images: OnImages) -> Tensor:
    """Computes the (count,) float64 values of all images from (B,) int64 indices; the ranks share the batches."""
    batches = []
    for rows in iter_row_batches(count, batch_size=batch_size):
        index = torch.arange(rows.start, rows.stop)
        batches.append({"index": index, "values": values_of(index)})
        on_images(len(index))
    return gather_rows(batches)["values"]
