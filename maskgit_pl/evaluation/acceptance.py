"""Rejection sampling: of more images than are wanted, keep those that a judge prefers.

The images of a class that are generated are its candidates; the fraction that is kept is the acceptance rate. The
judge is a classifier, which prefers those that it assigns to their class most surely, or networks that are trained to
tell the tokens of candidates from real ones. What selects images must not measure them: class agreement and distances
in the features of the classifier, or ``two_sample``, are then better than the images are.
Used by ``maskgit sample --accept-rate``.

Source: Razavi et al. (VQ-VAE-2), arXiv:1906.00446, section on classifier-based rejection sampling; MaskGIT
reports FID 4.02 (256 px) and 4.46 (512 px) with acceptance rate 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.data import ShardData
from maskgit_pl.evaluation.likelihood import encode_real_grids
from maskgit_pl.evaluation.reference import ArrayFile, SampleFile, open_samples, split_digest
from maskgit_pl.evaluation.two_sample import LEAST_GRIDS, rate_grids
from maskgit_pl.files import write_atomically
from maskgit_pl.networks.classifiers import FrozenClassifier, load_classifier, weights_digest
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.bulk import (
    BulkOptions,
    BulkPlan,
    BulkResult,
    generate_many,
    is_finished,
    make_plan,
    write_samples,
)
from maskgit_pl.pretrained.networks import PretrainedTokenizer

_ROUNDING = 1e-9  # 21 / 0.7 is 30.000000000000004 in floating point
_BATCH = 50  # images that are classified, and copied, at a time
_MOST_REAL = 10_000  # train images that candidates are compared with


@dataclass(frozen=True)
class ClassJudge:
    """Ranks images by the probability of the requested class that a classifier gives them.

    Args:
        classifier: The classifier.
        name: Its name for messages, such as its folder.
    """

    classifier: FrozenClassifier
    name: str = "classifier"

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> ClassJudge:
        """Reads the classifier of a folder that ``maskgit train-classifier`` wrote."""
        return cls(load_classifier(Path(folder)).to(device), str(folder))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 in hex of the layers and weights of the classifier."""
        return weights_digest(self.classifier)

    def check(self, class_names: Sequence[str], num_candidates: int) -> None:
        """Checks that the classes of the model are those of the classifier, in the same order."""
        if tuple(class_names) != self.classifier.class_names:
            raise ValueError(
                f"classifier {self.name} must know the classes of the model {list(class_names[:10])}, got "
                f"{list(self.classifier.class_names[:10])}; train one on the model's data with "
                "`maskgit train-classifier --data DATA`"
            )

    @torch.no_grad()
    def log_probs(self, samples: SampleFile, tokens: Tensor) -> Tensor:
        """Computes log p(requested class | image) of each candidate, (n,) float32 on the CPU."""
        assert samples.labels is not None  # generate_many writes them
        device, log_probs = next(self.classifier.parameters()).device, []
        for rows in torch.split(torch.arange(len(tokens)), _BATCH):
            logits = self.classifier(samples.read(rows).to(device)).logits.float().cpu()
            log_probs.append(F.log_softmax(logits, dim=1).gather(1, samples.labels[rows, None]).squeeze(1))
        return torch.cat(log_probs)


@dataclass(frozen=True)
class TokenJudge:
    """Ranks candidates by how real their tokens look to networks that are trained on the spot; see ``rate_grids``.

    They learn from the candidates, each of which is rated by a network that was not trained on it, and from random
    images of the train split, since a later evaluation compares with the val split. A copy of a train image looks
    real to them.

    Args:
        tokenizer: Tokenizer of the candidates.
        data: Data of the training.
        name: Name for messages.
    """

    tokenizer: PretrainedTokenizer
    data: ShardData
    name: str = "two_sample"

    @cached_property
    def digest(self) -> str:
        """The name and the digest of the train split; the tokenizer is part of each plan."""
        return f"two_sample:{split_digest(self.data, 'train')}"

    def check(self, class_names: Sequence[str], num_candidates: int) -> None:
        """Checks that there are enough candidates to learn from; ``open_data`` has checked the classes."""
        if num_candidates < LEAST_GRIDS:
            raise ValueError(
                f"num_images must give at least {LEAST_GRIDS} candidates to learn from with two_sample, got "
                f"{num_candidates}; generate more, or choose by a classifier"
            )

    def log_probs(self, samples: SampleFile, tokens: Tensor) -> Tensor:
        """Computes log p(real | tokens, class) of each candidate, (n,) float32 on the CPU."""
        assert samples.labels is not None  # generate_many writes them
        limit = min(2 * len(tokens), _MOST_REAL)  # random images: a class may have few of them
        real = encode_real_grids(self.tokenizer, self.data, split="train", limit=limit)
        return rate_grids(real.with_sampled(tokens), samples.labels)


Judge: TypeAlias = ClassJudge | TokenJudge  # or any class with their name, digest, check and log_probs


@dataclass(frozen=True)
class Acceptance:
    """The rule by which candidates are kept: the fraction of each class that a judge prefers.

    Args:
        rate: Fraction of the candidates of a class that is kept, in (0, 1].
        judge: What ranks the candidates.
    """

    rate: float
    judge: Judge

    def __post_init__(self) -> None:
        check_number("accept_rate", self.rate, "(0, 1]")

    def num_candidates(self, num_images: int, num_classes: int) -> int:
        """Returns how many candidates of all classes are generated to keep ``num_images`` of them."""
        count, rest = divmod(num_images, num_classes)
        if rest:
            raise ValueError(
                f"num_images must be a multiple of {num_classes}, the number of classes, with accept_rate, got "
                f"{num_images}"
            )
        return num_classes * max(count, math.ceil(count / self.rate - _ROUNDING))


def generate_accepted(
    pipe: MaskGIT,
    file: Path | str,
    options: BulkOptions,
    acceptance: Acceptance,
    *,
    on_images: Callable[[int], object] = lambda count: None,
) -> BulkResult:
    """Generates candidates into ``FILE.candidates.npz``, and writes those that are accepted to a file.

    1. Generates the candidates with ``generate_many``: several processes share them.
    2. The process that finds all of them complete has the judge score them.
    3. It writes the best of each class to the file, with their ``seeds`` and ``log_probs``, and deletes the candidates.

    Args:
        pipe: Model that generates the images.
        file: Path that ends in ``.npz``.
        options: See ``generate_many``; ``num_images`` is the number of accepted images.
        acceptance: Judge and acceptance rate.
        on_images: See ``generate_many``; it counts candidates.

    Returns:
        The result of ``generate_many`` for the candidates.
    """
    file = Path(file)
    plan = make_plan(pipe, options)
    if any(label >= len(pipe.class_names) for label in plan.classes):
        raise ValueError("classes must not be None with accept_rate, which ranks by the class; name a class")
    count = acceptance.num_candidates(options.num_images, len(plan.classes))
    acceptance.judge.check(pipe.class_names, count)
    candidates = file.with_name(f"{file.stem}.candidates.npz")
    plan = replace(plan, accept_rate=acceptance.rate, classifier=acceptance.judge.digest)
    if is_finished(file, plan):
        return BulkResult(0)
    made = replace(options, num_images=count, keep_tokens=True)
    result = generate_many(pipe, candidates, made, on_images=on_images)
    if result.missing_parts == 0:
        try:
            _write_accepted(file, plan, candidates, acceptance.judge, keep_tokens=options.keep_tokens)
        except (ValueError, OSError):
            if not is_finished(file, plan):  # True if another process has written the file in the meantime
                raise
        candidates.unlink(missing_ok=True)
    return result


def _write_accepted(file: Path, plan: BulkPlan, candidates: Path, judge: Judge, *, keep_tokens: bool) -> None:
    stored = ArrayFile(candidates, thing="samples")
    samples = open_samples(stored, channels=plan.image[2])
    assert samples.labels is not None  # generate_many writes them
    tokens = torch.from_numpy(stored.read("tokens", (len(samples.labels), None), np.integer).astype(np.int64))
    log_probs = judge.log_probs(samples, tokens)
    kept = choose(log_probs, samples.labels, plan.count // len(plan.classes))
    parts = (samples.images[part.numpy()] for part in torch.split(kept, _BATCH))
    arrays = {"seeds": (plan.seed + kept).numpy(), "log_probs": log_probs[kept].numpy().astype(np.float32)}
    if keep_tokens:
        arrays["tokens"] = tokens[kept].numpy().astype(np.int32)
    with write_atomically(file) as stream:
        write_samples(stream, plan, parts, samples.labels[kept].numpy(), **arrays)


def choose(log_probs: Tensor, labels: Tensor, count: int) -> Tensor:
    """Chooses the most probable candidates of each class; of equal ones the first.

    Args:
        log_probs: (n,) float: of each candidate; see ``ClassJudge.log_probs``.
        labels: (n,) int64: class of each candidate.
        count: Number of candidates to keep of each class.

    Returns:
        Indices of the kept candidates in ascending order, int64.
    """
    kept = []
    for label in set(labels.tolist()):
        rows = (labels == label).nonzero().squeeze(1)
        kept.append(rows[log_probs[rows].argsort(descending=True, stable=True)[:count]])
    return torch.cat(kept).sort().values
