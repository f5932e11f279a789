"""Rejection sampling: of more images than are wanted, keep those that a classifier assigns to their class most surely.

The images of a class that are generated are its candidates; the fraction that is kept is the acceptance rate.
A classifier that selects images must not judge them: class agreement and distances in its own features are
then better than the images are. Used by ``maskgit sample --accept-rate``.

Source: Razavi et al. (VQ-VAE-2), arXiv:1906.00446, section on classifier-based rejection sampling; MaskGIT
reports FID 4.02 (256 px) and 4.46 (512 px) with acceptance rate 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.evaluation.reference import SampleFile, open_samples
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

_ROUNDING = 1e-9  # 21 / 0.7 is 30.000000000000004 in floating point
_BATCH = 50  # images that are classified, and copied, at a time


@dataclass(frozen=True)
class Acceptance:
    """The rule by which candidates are kept: the most probable fraction of each class.

    Args:
        rate: Fraction of the candidates of a class that is kept, in (0, 1].
        classifier: Classifier whose probability of the requested class ranks the candidates.
        name: Name of the classifier for records and messages, such as its folder.
    """

    rate: float
    classifier: FrozenClassifier
    name: str = "classifier"

    def __post_init__(self) -> None:
        check_number("accept_rate", self.rate, "(0, 1]")

    @classmethod
    def load(cls, folder: Path | str, rate: float, *, device: torch.device | str = "cpu") -> Acceptance:
        """Reads the classifier of a folder that ``maskgit train-classifier`` wrote."""
        return cls(rate, load_classifier(Path(folder)).to(device), str(folder))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 in hex of the layers and weights of the classifier."""
        return weights_digest(self.classifier)

    def check_classes(self, class_names: Sequence[str], labels: Sequence[int]) -> None:
        """Checks that the classifier can rank images of a model.

        Args:
            class_names: Classes of the model, which must be those of the classifier, in the same order.
            labels: Labels of the images, which must not be "no class".
        """
        if tuple(class_names) != self.classifier.class_names:
            raise ValueError(
                f"classifier {self.name} must know the classes of the model {list(class_names[:10])}, got "
                f"{list(self.classifier.class_names[:10])}; train one on the model's data with "
                "`maskgit train-classifier --data DATA`"
            )
        if any(label >= len(class_names) for label in labels):
            raise ValueError("classes must not be None with accept_rate, which ranks by the class; name a class")

    def num_candidates(self, num_images: int, num_classes: int) -> int:
        """Returns how many candidates of all classes are generated to keep ``num_images`` of them."""
        count, rest = divmod(num_images, num_classes)
        if rest:
            raise ValueError(
                f"num_images must be a multiple of {num_classes}, the number of classes, with accept_rate, got "
                f"{num_images}"
            )
        return num_classes * max(count, math.ceil(count / self.rate - _ROUNDING))

    @torch.no_grad()
    def log_probs(self, images: Tensor, labels: Tensor) -> Tensor:
        """Computes log p(requested class | image) of a batch.

        Args:
            images: (n, C, H, W) uint8.
            labels: (n,) int64 in [0, num_classes).

        Returns:
            (n,) float32 on the CPU.
        """
        device = next(self.classifier.parameters()).device
        logits = self.classifier(images.to(device)).logits.float().cpu()
        return F.log_softmax(logits, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)


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
    2. The process that finds all of them complete scores them with the classifier.
    3. It writes the best of each class to the file, with their ``seeds`` and ``log_probs``, and deletes the candidates.

    Args:
        pipe: Model that generates the images.
        file: Path that ends in ``.npz``.
        options: See ``generate_many``; ``num_images`` is the number of accepted images.
        acceptance: Classifier and acceptance rate.
        on_images: See ``generate_many``; it counts candidates.

    Returns:
        The result of ``generate_many`` for the candidates.
    """
    file = Path(file)
    plan = make_plan(pipe, options)
    acceptance.check_classes(pipe.class_names, plan.classes)
    count = acceptance.num_candidates(options.num_images, len(plan.classes))
    candidates = file.with_name(f"{file.stem}.candidates.npz")
    plan = replace(plan, accept_rate=acceptance.rate, classifier=acceptance.digest)
    if is_finished(file, plan):
        return BulkResult(0)
    result = generate_many(pipe, candidates, replace(options, num_images=count), on_images=on_images)
    if result.missing_parts == 0:
        try:
            _write_accepted(file, plan, open_samples(candidates, channels=plan.image[2]), acceptance)
        except (ValueError, OSError):
            if not is_finished(file, plan):  # True if another process has written the file in the meantime
                raise
        candidates.unlink(missing_ok=True)
    return result


def _write_accepted(file: Path, plan: BulkPlan, samples: SampleFile, acceptance: Acceptance) -> None:
    assert samples.labels is not None  # generate_many writes them
    rows = torch.split(torch.arange(len(samples.labels)), _BATCH)
    log_probs = torch.cat([acceptance.log_probs(samples.read(part), samples.labels[part]) for part in rows])
    kept = choose(log_probs, samples.labels, plan.count // len(plan.classes))
    parts = (samples.images[part.numpy()] for part in torch.split(kept, _BATCH))
    arrays = {"seeds": (plan.seed + kept).numpy(), "log_probs": log_probs[kept].numpy().astype(np.float32)}
    with write_atomically(file) as stream:
        write_samples(stream, plan, parts, samples.labels[kept].numpy(), **arrays)


def choose(log_probs: Tensor, labels: Tensor, count: int) -> Tensor:
    """Chooses the most probable candidates of each class; of equal ones the first.

    Args:
        log_probs: (n,) float: see ``Acceptance.log_probs``.
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
