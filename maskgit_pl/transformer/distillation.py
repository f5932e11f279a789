"""Distillation of stage 2: a student learns to generate in one or a few steps what its teacher needs many for.

The teacher is a finished model. Its answer to a partly masked image is the distribution that its decoding draws from:
logits with classifier-free guidance, divided by the sampling temperature. The student has the teacher's network, and
starts from its weights. It needs no guidance, and one pass through the network for each step.

A network that sees mask tokens only gives all images of a class the same logits. So the student sees random codes in
place of some mask tokens in its first step (``DecodingConfig.random_start``), from which it makes an image.

A ``Student`` gives a method its networks, its images (``roll_out``), and the teacher's answers (``teach``). A method is
a registered frozen dataclass that returns the losses of a micro-batch::

    @distillations.register("own")
    @dataclass(frozen=True)
    class Own(Distillation):
        def __call__(self, model: Student, batch: Batch, tokens: Tensor) -> StepLosses:
            ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import MAY_CHANGE, check_choice, check_folder, check_number
from maskgit_pl.data.batches import Batch
from maskgit_pl.decoding.config import DecodingConfig, set_specs
from maskgit_pl.networks.backbone import Backbone
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.transformer.config import MaskedTokenConfig
from maskgit_pl.transformer.losses import StepLosses


class RollOut(NamedTuple):
    """Images that the student has generated up to one of its steps, and the draws of this step."""

    logits: Tensor  # (B, N, K) float32, with a graph: the logits of the step
    tokens: Tensor  # (B, N) int64 in [0, K): all tokens after the step, as if it were the last one
    is_drawn: Tensor  # (B, N) bool, True where the step drew the token; the others are those of earlier steps


class Student(Protocol):
    """The model that a method of distillation trains; ``distilled_model.DistilledModel`` is one.

    Attributes:
        config: The configuration.
        transformer: The network of the student.
        auxiliary: The second network that trains; None if the method needs none.
    """

    config: DistillationConfig
    transformer: Backbone
    auxiliary: Backbone | None

    def roll_out(self, batch: Batch) -> RollOut:
        """Generates images with the student up to a random one of its steps, which has a graph."""

    def teach(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Returns log-probabilities of the teacher, (B, N, K) float32, for tokens (B, N) int64, some masked."""


class Distillation(ABC):
    """A method of distillation. Subclasses are frozen dataclasses.

    Attributes:
        auxiliary_rate: Learning rate of a second network that trains beside the student, ``Student.auxiliary``,
            relative to that of the student; 0 for no such network.
    """

    auxiliary_rate: float = 0.0

    @abstractmethod
    def __call__(self, model: Student, batch: Batch, tokens: Tensor) -> StepLosses:
        """Computes the losses of a micro-batch.

        Args:
            model: The student, the auxiliary network and the teacher.
            batch: The batch with its draws: labels, some of them hidden, and the mask.
            tokens: (B, N) int64 in [0, K): the tokens of real images.

        Returns:
            The loss, and for the logs a value and a hit for each of the M masked tokens.
        """


distillations: Registry[Distillation] = Registry(
    "distillation", "maskgit_pl.distillations", check=derives_from(Distillation)
)


@dataclass(frozen=True)
class DistillationConfig(MaskedTokenConfig):
    """The configuration of ``DistilledModel``: that of ``MaskedTokenModel``, with a teacher.

    ``decoding`` is that of the student; it has no guidance. ``mask_schedule`` must be that of the teacher.

    Args:
        teacher: Path of the teacher, a pretrained transformer folder.
        teacher_decoding: Decoding of the teacher that the student learns; None for the one that was exported with it.
        distillation: Name or mapping of a registered distillation.
    """

    _: KW_ONLY
    teacher: str = field(default="", metadata=MAY_CHANGE)  # a path; the content of the folder is compared instead
    teacher_decoding: DecodingConfig | None = None
    distillation: str | dict[str, Any] = "dimo"

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher", check_folder("teacher", self.teacher))
        super().__post_init__()
        if not self.teacher:
            raise ValueError(
                "teacher must be a pretrained transformer folder, got none; name its model by --pretrained"
            )
        set_specs(self, distillation=distillations)
        for name in ("corruption", "objective"):  # parts of a training that a distillation replaces
            check_choice(f"model.{name}", getattr(self, name), (getattr(DistillationConfig, name),))
        if any(self.decoding.scales()):
            raise ValueError(
                "decoding.guidance must have scale 0, since the student learns the guidance of its teacher, got "
                f"{self.decoding.guidance!r}; leave it out"
            )
        _ = self.method  # built now, so that it is checked

    @cached_property
    def method(self) -> Distillation:
        """The distillation that ``distillation`` names."""
        return distillations.build(self.distillation)


def _mean_over_masks(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over images of the mean of ``values`` (B, N) over the masked tokens of each, scalar."""
    return ((values * mask).sum(1) / mask.sum(1)).mean()


def _log_values(loss: Tensor, target: Tensor, answer: Tensor, batch: Batch) -> StepLosses:
    """Returns the losses of a step, with KL(target || answer) and a hit for each masked token; (B, N, K) log-probs."""
    target, answer = (part.detach().flatten(0, 1)[batch.step_draws.positions] for part in (target, answer))  # (M, K)
    divergences = (target.exp() * (target - answer)).sum(-1)
    return StepLosses(loss, divergences, (target.argmax(-1) == answer.argmax(-1)).float())


@distillations.register("guidance")
@dataclass(frozen=True)
class Guidance(Distillation):
    """The student learns the guided distribution of the teacher in one pass.

        loss = KL(q(. | x_t) || p(. | x_t)),  x_t: a real image with masked tokens, mean over the masked tokens

    q is the teacher's and p the student's distribution. It halves the passes of any number of steps.

    Source: Meng et al., arXiv:2210.03142, section 3.1, with a fixed scale of guidance.
    """

    def __call__(self, model: Student, batch: Batch, tokens: Tensor) -> StepLosses:
        draws, config = batch.step_draws, model.config.network
        seen = tokens.masked_fill(draws.mask, config.mask_token_id)
        target = model.teach(seen, batch)
        logits = model.transformer(seen, draws.labels, vectors=batch.vectors_for(config.condition_dim))
        answer = logits.float().log_softmax(-1)
        loss = _mean_over_masks((target.exp() * (target - answer)).sum(-1), draws.mask)
        return _log_values(loss, target, answer, batch)


@distillations.register("dimo")
@dataclass(frozen=True)
class Dimo(Distillation):
    """The distribution of the student's images moves to that of the teacher's.

    1. The student draws an image x from its logits z.
    2. Tokens of x are masked: x_t. Teacher and auxiliary network answer with q(. | x_t) and p(. | x_t).
    3. The student: loss = <stop(g), z> over the masked tokens, with g = p - q, the gradient of KL(q || p) with respect
       to the logits of p: those of the student move as they would have to.
    4. The auxiliary network follows the student's images: loss = -log p(x | x_t) over the masked tokens.

    Args:
        auxiliary_rate: Learning rate of the auxiliary network relative to that of the student, in (0, 1000]. If it is
            too slow to follow the student, the images of a class become alike.

    Source: Di[M]O, Zhu et al., arXiv:2503.15457, algorithm 1; without its noise on the embeddings.
    """

    auxiliary_rate: float = 5.0

    def __post_init__(self) -> None:
        check_number("auxiliary_rate", self.auxiliary_rate, "(0, 1000]")

    def __call__(self, model: Student, batch: Batch, tokens: Tensor) -> StepLosses:
        draws, config = batch.step_draws, model.config.network
        assert model.auxiliary is not None
        logits, drawn, is_drawn = model.roll_out(batch)  # 1
        seen = drawn.masked_fill(draws.mask, config.mask_token_id)  # 2
        target = model.teach(seen, batch)
        answer = model.auxiliary(seen, draws.labels, vectors=batch.vectors_for(config.condition_dim))
        answer = answer.float().log_softmax(-1)
        gradient = answer.detach().exp() - target.exp()
        pseudo_loss = _mean_over_masks((gradient * logits).sum(-1) * is_drawn, draws.mask)  # 3
        likelihood = _mean_over_masks(F.nll_loss(answer.transpose(1, 2), drawn, reduction="none"), draws.mask)  # 4
        return _log_values(pseudo_loss + likelihood, target, answer, batch)
