"""A test of two samples: how well a network that is trained on the spot tells sampled token grids from real ones.

Distances in the features of a fixed network do not see what that network ignores, and a decoding that was chosen by
them has been fitted to it. This network is new in each measurement, and nothing was chosen by it, unless images were
(``acceptance.TokenJudge``).

Source: Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", arXiv:1610.06545.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Lock
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.evaluation.classifier import use_threads
from maskgit_pl.evaluation.metrics import MOST_GRIDS, TokenGrids
from maskgit_pl.processes import available_cores

_SEEDS = (0, 1)  # of the trainings, which test on different grids
LEAST_GRIDS = 200  # grids of each kind; the quarter that is tested has a standard error of 5 % then
_TESTED = 4  # one grid in four is tested, the others train
_EPOCHS, _BATCH, _RATE, _WEIGHT_DECAY, _WIDTH = 12, 100, 2e-3, 0.05, 64
_DIMENSIONS = 8  # of code vectors that are made of neighbours
_REPLACED = 0.2  # share of the tokens that the planted fault replaces
_FOUND = 0.6  # area under the curve with which the planted fault counts as found
_RANDOM = Lock()  # of torch's generator, which all threads share
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


def two_sample(grids: TokenGrids, labels: Tensor) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Trains a network twice to tell sampled grids from real ones, as many of each kind and class, at most 2000.

    Every call gives the same result. It is comparable only with the same number of grids: more of them show more.

    Args:
        grids: The grids.
        labels: (n,) int64: requested classes.

    Returns:
        Mean and standard deviation over the trainings of the accuracy, and of the area under the ROC curve; None if
        there are fewer than 200 pairs of grids of a class, or the network is blind.
    """
    sampled, real = _pair(labels[: len(grids.sampled)], grids.real_labels)
    if len(real) < LEAST_GRIDS:
        return None
    if not _finds_replaced_tokens(grids.real, grids.real_labels, grids.codes, len(real)):
        advice = f"raise --num-images, at most to {MOST_GRIDS}"
        _log.warning("two_sample is blind: %d real grids do not show replaced tokens; %s", len(real), advice)
        return None
    pairs = grids.real[real], grids.sampled[sampled], grids.real_labels[real]
    tell_apart = partial(_tell_apart, *pairs, grids.codes)
    results = torch.tensor(_side_by_side(tell_apart, _SEEDS), dtype=torch.float64)
    (accuracy, area), (spread, spread_of_area) = results.mean(0).tolist(), results.std(0, correction=0).tolist()
    return (accuracy, spread), (area, spread_of_area)


def rate_grids(grids: TokenGrids, labels: Tensor) -> Tensor:
    """Computes how probably each sampled grid is a real one, by networks that were not trained on it.

    A network that has learnt a grid as a sampled one rates how well it knows it by heart. So there are four: network q
    is trained on the grids whose index is not q modulo 4, with as many real ones of each class, and rates the others.

    Args:
        grids: The grids; ``sampled`` are all that are rated.
        labels: (k,) int64: requested classes.

    Returns:
        (k,) float32: log p(real).

    Raises:
        ValueError: if there are fewer than 200 pairs of grids of a class, or the network is blind; see ``two_sample``.
    """
    rows, real = _pair(labels, grids.real_labels)
    if len(real) < LEAST_GRIDS or not _finds_replaced_tokens(grids.real, grids.real_labels, grids.codes, len(real)):
        raise ValueError(
            f"two_sample must find replaced tokens in the real grids that it learns from, got {len(real)} that do not "
            "show them; raise --num-images, or choose by a classifier"
        )
    folds = torch.arange(len(labels)) % _TESTED
    sizes = int(labels.max()) + 1, int(max(grids.real.max(), grids.sampled.max())) + 1

    def train(fold: int) -> _Judge:
        others = folds[rows] != fold
        pairs = grids.real[real[others]], grids.sampled[rows[others]], labels[rows[others]]
        return _train_judge(*pairs, grids.codes, sizes, fold)

    logits = torch.empty(len(labels))
    for fold, judge in enumerate(_side_by_side(train, range(_TESTED))):
        for part in torch.split((folds == fold).nonzero()[:, 0], _BATCH):
            with torch.no_grad():
                logits[part] = judge(grids.sampled[part], labels[part])
    return F.logsigmoid(logits)


def _side_by_side(work: Callable[[int], _Result], seeds: Iterable[int]) -> list[_Result]:
    """Returns the results of ``work``, one on each core at a time: a network so small gains nothing from threads."""
    workers = ThreadPoolExecutor(available_cores(), initializer=torch.set_num_threads, initargs=(1,))
    with use_threads(1), workers:
        return list(workers.map(work, seeds))


def _pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows of pairs of the same class, in a random order, from (n,) and (m,) int64 classes."""
    pairs = []
    for label in torch.unique(first):
        rows = [(labels == label).nonzero()[:, 0] for labels in (first, second)]
        count = min(map(len, rows))
        pairs.append(torch.stack([of_kind[:count] for of_kind in rows]))
    joined = torch.cat(pairs, 1)
    order = torch.randperm(joined.shape[1], generator=torch.Generator().manual_seed(0))
    return joined[0, order], joined[1, order]


@lru_cache(maxsize=1)  # a search or an evaluation compares several sets of images with the same real grids
def _finds_replaced_tokens(real: Tensor, labels: Tensor, codes: Tensor | None, count: int) -> bool:
    """Returns True if the network tells ``count`` real grids from the same ones with a planted fault.

    The fault: each token is, with probability 0.2, that of another grid at the same place. The cache
    compares tensors by identity.
    """
    pairs = real[:count], replace_tokens(real[:count], _REPLACED), labels[:count]
    ((_, area),) = _side_by_side(partial(_tell_apart, *pairs, codes), [0])
    return area >= _FOUND


def replace_tokens(grids: Tensor, share: float, *, seed: int = 0) -> Tensor:
    """Replaces each token of (n, *grid) int64 grids, with a probability, by that of a random one at the same place."""
    generator = torch.Generator().manual_seed(seed)
    donors = torch.rand(grids.shape, generator=generator).argsort(0)
    return torch.where(torch.rand(grids.shape, generator=generator) < share, grids.gather(0, donors), grids)


def neighbour_vectors(grids: Tensor, num_codes: int) -> Tensor:
    """Computes vectors of unknown codes: codes are alike that have the same neighbours in (n, *grid) int64 grids.

    These are the principal directions of the positive pointwise mutual information of neighbours. Vectors that the
    network learns itself do not do: 2000 grids of 7 x 7 tokens of 256 codes did not suffice to find the planted fault.

    Returns:
        (num_codes, d) float32, where d is 8, or ``num_codes`` if that is less.

    Source: Levy and Goldberg, "Neural word embedding as implicit matrix factorization", NIPS 2014.
    """
    neighbours = [
        torch.stack([grids.narrow(axis, start, grids.shape[axis] - 1).flatten() for start in (0, 1)])
        for axis in range(1, grids.ndim)
    ]
    pairs = torch.cat([*neighbours, *(each.flip(0) for each in neighbours)], 1)  # (2, P): in both orders
    keys, counts = torch.unique(pairs[0] * num_codes + pairs[1], return_counts=True)
    places, of_code = torch.stack([keys // num_codes, keys % num_codes]), torch.bincount(pairs[0], minlength=num_codes)
    information = (counts * pairs.shape[1] / of_code[places].prod(0)).log().clamp(min=0)
    matrix = torch.sparse_coo_tensor(places, information, (num_codes, num_codes), check_invariants=True)
    directions, sizes, _ = torch.svd_lowrank(matrix, min(_DIMENSIONS, num_codes), niter=4)
    return directions * sizes


class _Judge(nn.Module):
    """A small convolutional network that tells two kinds of token grids, of one to three axes, apart by their class.

    It sees (K, D) float code vectors: with vectors of its own, it would have to learn which codes look alike.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, num_classes: int, axes: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.register_buffer("codes", (codes - codes.mean(0)) / codes.std().clamp(min=1e-6))
        self.code = nn.Linear(codes.shape[1], _WIDTH)
        self.label = nn.Embedding(num_classes, _WIDTH)
        nn.init.zeros_(self.label.weight)  # a class that only tested grids have adds no noise
        self.convolutions = nn.ModuleList(convolution(_WIDTH, _WIDTH, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(2 * _WIDTH, 1)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns (B,) float logits of "real" for (B, *grid) int64 tokens and (B,) int64 classes."""
        hidden = self.code(F.embedding(tokens, self.codes)).movedim(-1, 1)  # (B, W, *grid)
        hidden = F.relu(hidden + self.label(labels).reshape(len(labels), -1, *[1] * (tokens.ndim - 1)))
        first, second, last = self.convolutions
        hidden = F.relu(first(hidden))
        hidden = hidden + F.relu(second(hidden))
        hidden = F.relu(last(hidden)).flatten(2)  # (B, W, N)
        return self.head(torch.cat([hidden.mean(2), hidden.amax(2)], 1)).squeeze(1)  # type: ignore[no-any-return]


def _tell_apart(real: Tensor, sampled: Tensor, labels: Tensor, codes: Tensor | None, seed: int) -> tuple[float, float]:
    """Returns accuracy and area under the ROC curve of a network for pairs of (n, *grid) grids with (n,) classes.

    It is trained on three quarters of the pairs, and tested on the quarter ``seed``, in [0, 4).
    """
    tested = torch.arange(len(labels)) % _TESTED == seed
    sizes = int(labels.max()) + 1, int(max(real.max(), sampled.max())) + 1
    judge = _train_judge(real[~tested], sampled[~tested], labels[~tested], codes, sizes, seed)
    with torch.no_grad():
        of_real, of_sampled = (judge(grids[tested], labels[tested]) for grids in (real, sampled))
    accuracy = ((of_real > 0).double().mean() + (of_sampled <= 0).double().mean()) / 2
    above = (of_real[:, None] > of_sampled).double() + 0.5 * (of_real[:, None] == of_sampled).double()
    return float(accuracy), float(above.mean())


def _train_judge(
    real: Tensor, sampled: Tensor, labels: Tensor, codes: Tensor | None, sizes: tuple[int, int], seed: int
) -> _Judge:
    """Returns a network that was trained to tell pairs of (n, *grid) grids with (n,) classes apart.

    ``sizes`` are the numbers of classes, and of codes whose vectors are unknown, that it is shown later.
    """
    tokens, classes = torch.cat([real, sampled]), labels.repeat(2)
    count = len(classes)
    is_real = (torch.arange(count) < count // 2).float()
    with _RANDOM, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if codes is None:  # of both kinds, so that the vectors tell nothing
            codes = neighbour_vectors(tokens, sizes[1])
        judge = _Judge(codes, sizes[0], real.ndim - 1)
        batches = [rows for _ in range(_EPOCHS) for rows in torch.split(torch.randperm(count), _BATCH)]
    optimizer = torch.optim.AdamW(judge.parameters(), _RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=len(batches))
    for rows in batches:
        loss = F.binary_cross_entropy_with_logits(judge(tokens[rows], classes[rows]), is_real[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
        optimizer.step()
        schedule.step()
    return judge
