"""Rejection sampling: of more images than are wanted, keep those that a classifier assigns to their class most surely.

The images of a class that are generated are its candidates; the fraction that is kept is the acceptance rate.
A classifier that selects images must not judge them: class agreement and distances in its own features are
then better than the images are. ``evaluation.generation.generate_accepted`` and ``maskgit sample --accept-rate``
use this.

Source: Razavi et al. (VQ-VAE-2), arXiv:1906.00446, section on classifier-based rejection sampling; MaskGIT
reports FID 4.02 (256 px) and 4.46 (512 px) with acceptance rate 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.networks.feature_networks import FrozenClassifier, load_classifier, weights_digest

_ROUNDING = 1e-9  # 21 / 0.7 is 30.000000000000004 in floating point
_BATCH = 50  # images that are classified at a time


@dataclass(frozen=True)
class Acceptance:
    """The rule by which candidates are kept: the most probable fraction of each class.

    Args:
        rate: Fraction of the candidates of a class that is kept, in (0, 1].
        classifier: Classifier whose probability of the requested class ranks the candidates.
        name: Name of the classifier for records and messages, such as its folder.

    Raises:
        ValueError: if ``rate`` is out of range.
    """

    rate: float
    classifier: FrozenClassifier
    name: str = "classifier"

    def __post_init__(self) -> None:
        check_number("accept_rate", self.rate, "(0, 1]")

    @classmethod
    def load(cls, folder: Path | str, rate: float, *, device: torch.device | str = "cpu") -> Acceptance:
        """Reads the classifier of a folder that ``maskgit train-classifier`` or an evaluation wrote.

        Raises:
            FileNotFoundError: if there are no weights.
            ValueError: if the folder holds no classifier. See also the class.
        """
        return cls(rate, load_classifier(Path(folder)).to(device), str(folder))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 in hex of the layers and weights of the classifier."""
        return weights_digest(self.classifier)

    def check_classes(self, class_names: Sequence[str], labels: Sequence[int] = ()) -> None:
        """Checks that the classifier can rank images of a model.

        Args:
            class_names: Classes of the model, which must be those of the classifier, in the same order.
            labels: Labels of the images, which must not be "no class".

        Raises:
            ValueError: if a class is not one of the classifier.
        """
        if tuple(class_names) != self.classifier.class_names:
            raise ValueError(
                f"classifier {self.name} must know the classes of the model {list(class_names[:10])}, got "
                f"{list(self.classifier.class_names[:10])}; train one on the model's data with "
                "`maskgit train-classifier --data DATA`"
            )
        if any(label >= len(class_names) for label in labels):
            raise ValueError("classes must not be None with accept_rate, which ranks by the class; name a class")

    def num_candidates(self, count: int) -> int:
        """Returns how many candidates of a class are generated to keep ``count`` of them."""
        return max(count, math.ceil(count / self.rate - _ROUNDING))

    @torch.no_grad()
    def log_probs(self, images: Tensor, labels: Tensor) -> Tensor:
        """Computes log p(requested class | image).

        Args:
            images: (n, C, H, W) uint8.
            labels: (n,) int64 in [0, num_classes).

        Returns:
            (n,) float32 on the CPU.
        """
        device = next(self.classifier.parameters()).device
        logits = [self.classifier(part.to(device)).logits.float().cpu() for part in torch.split(images, _BATCH)]
        return F.log_softmax(torch.cat(logits), dim=1).gather(1, labels.cpu().unsqueeze(1)).squeeze(1)

    def choose(self, log_probs: Tensor, labels: Tensor, counts: Mapping[int, int]) -> Tensor:
        """Chooses the most probable candidates of each class; of equal ones the first.

        Args:
            log_probs: (n,) float: see ``log_probs``.
            labels: (n,) int64: class of each candidate.
            counts: Number of candidates to keep by class.

        Returns:
            Indices of the kept candidates in ascending order, int64.
        """
        kept = []
        for label, count in counts.items():
            rows = (labels == label).nonzero().squeeze(1)
            kept.append(rows[log_probs[rows].argsort(descending=True, stable=True)[:count]])
        return torch.cat(kept).sort().values
