"""Distillation of stage 2: a student learns to generate in one or a few steps what its teacher needs many for.

The teacher is a finished model. Its answer to a partly masked image is the distribution that its decoding draws from:
logits with classifier-free guidance, divided by the sampling temperature. The student has the teacher's network, and
starts from its weights. It needs no guidance, and one pass through the network for each step.

A network that sees mask tokens only gives all images of a class the same logits. So the student sees random codes in
place of some mask tokens in its first step (``DecodingConfig.random_start``), from which it makes an image.

``DistilledModel`` gives a method its networks, the images of the student (``roll_out``), and the teacher's answers
(``teach``). A method is a registered frozen dataclass that returns the losses of a micro-batch::

    @distillations.register("own")
    @dataclass(frozen=True)
    class Own(Distillation):
        def __call__(self, model: DistilledModel, batch: Batch, tokens: Tensor) -> StepLosses:
            ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import MAY_CHANGE, check_choice, check_folder, check_number
from maskgit_pl.data.batches import Batch
from maskgit_pl.decoding.config import DecodingConfig, set_specs
from maskgit_pl.decoding.decoder import SeededNoise, draw_start
from maskgit_pl.decoding.guidance import guidance_schedules, step_progress
from maskgit_pl.decoding.predictors import ClassPredictor, start_from
from maskgit_pl.pretrained.networks import PretrainedTransformer, load_transformer
from maskgit_pl.randomness import random_bits
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.schedules import num_masked
from maskgit_pl.training.optimizers import parameter_groups
from maskgit_pl.training.strategies import shard_blocks
from maskgit_pl.transformer.mvtm import MaskedTokenConfig, MaskedTokenModel
from maskgit_pl.transformer.token_model import StepLosses

_SHARED = ("codebook_size", "num_classes", "grid", "condition_dim", "null_label", "mask_token_id")  # with the teacher
_COLDEST = 1e-3  # sampling temperature of a teacher that takes the likeliest codes


class RollOut(NamedTuple):
    """Images that the student has generated up to one of its steps, and the draws of this step."""

    logits: Tensor  # (B, N, K) float32, with a graph: the logits of the step
    tokens: Tensor  # (B, N) int64 in [0, K): all tokens after the step, as if it were the last one
    is_drawn: Tensor  # (B, N) bool, True where the step drew the token; the others are those of earlier steps


class Distillation(ABC):
    """A method of distillation. Subclasses are frozen dataclasses.

    Attributes:
        auxiliary_rate: Learning rate of a second network that trains beside the student, ``DistilledModel.auxiliary``,
            relative to that of the student; 0 for no such network.
    """

    auxiliary_rate: float = 0.0

    @abstractmethod
    def __call__(self, model: DistilledModel, batch: Batch, tokens: Tensor) -> StepLosses:
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


class DistilledModel(MaskedTokenModel):
    """The LightningModule that distils a teacher into a student, ``transformer``.

    Attributes:
        auxiliary: The second network that trains; None if the method needs none.
    """

    config: DistillationConfig
    config_class = DistillationConfig

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(config)
        self.method = config.method
        self.auxiliary = config.network.create() if self.method.auxiliary_rate else None
        self._teacher: PretrainedTransformer | None = None

    @property
    def teacher(self) -> PretrainedTransformer:
        """The frozen teacher on this module's device. It is loaded at its first use and stays out of checkpoints."""
        if self._teacher is None:
            teacher = load_transformer(Path(self.config.teacher))
            teacher.check_tokenizer(self.tokenizer.fingerprint)
            pairs = [("mask_schedule", self.mask_schedule, teacher.schedule_for("distillation"))]
            student, network = self.config.network, teacher.network.config
            pairs += [(f"network.{name}", getattr(student, name), getattr(network, name)) for name in _SHARED]
            for name, value, expected in pairs:
                if value != expected:
                    raise ValueError(f"model.{name} must be {expected}, that of the teacher, got {value}")
            self._teacher = replace(teacher, decoding=self.config.teacher_decoding or teacher.decoding)
        self._teacher.network.to(self.device)
        return self._teacher

    @cached_property
    def _targets(self) -> Tensor:
        """The guidance scale and inverse temperature of the teacher for 0 to N masked tokens, (2, N + 1) float32."""
        decoding, num_tokens = self.teacher.decoding, self.config.network.num_tokens
        guidance = guidance_schedules.build(decoding.guidance)
        sampling = decoding.build_decoder(self.mask_schedule).sampling
        # The step at which the decoding has this number of masked tokens: the first that sees no more.
        progress = torch.linspace(0, 1, 1025)
        left = num_masked(self.mask_schedule(progress, num_tokens), num_tokens, rounding="ceil")
        first = progress[torch.searchsorted(-left, -torch.arange(num_tokens + 1)).clamp(max=1024)]
        steps = (decoding.num_steps * first).clamp(max=decoding.num_steps - 1).tolist()  # between two steps, too
        places = [step_progress(step, decoding.num_steps) for step in steps]
        pairs = [(guidance(place), 1 / max(sampling.temperature_at(place), _COLDEST)) for place in places]
        return torch.tensor(pairs).T.to(self.device)

    @torch.no_grad()
    def teach(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Returns log-probabilities of the teacher, (B, N, K) float32, for tokens (B, N) int64, some masked."""
        network, config = self.teacher.network, self.config.network
        labels, vectors = batch.step_draws.labels, batch.vectors_for(config.condition_dim)
        count = (tokens == config.mask_token_id).sum(1)
        scale, sharpness = self._targets[:, count].unsqueeze(-1).unsqueeze(-1)  # (B, 1, 1) each
        if config.null_label is None:
            logits = network(tokens, labels, vectors=vectors).float()
        else:
            both = torch.cat([labels, torch.full_like(labels, config.null_label)])
            twice = None if vectors is None else vectors.repeat(2, 1)
            conditional, unconditional = network(tokens.repeat(2, 1), both, vectors=twice).float().chunk(2)
            logits = conditional + scale * (conditional - unconditional)
        answer: Tensor = (logits * sharpness).log_softmax(-1)
        return answer

    def draw_step(self) -> int:
        """Returns a random step of the student, in [0, T), the same on all ranks.

        A pass through a sharded network is a collective, so that all ranks must run the same number of steps.
        """
        word = random_bits("distillation/step", seed=self.config.seed, index=0, epoch=self.trainer.global_step)
        return int(word) % self.decoder.num_steps

    def draw_start(self, batch: Batch) -> tuple[Tensor, SeededNoise]:
        """Returns what the student sees in its first step, (B, N) int64, and the noise of its draws."""
        network = self.config.network
        seeds = random_bits("distillation/seed", seed=self.config.seed, index=batch.index, epoch=batch.epoch)[:, 0]
        fraction, mask = self.decoder.random_start, network.mask_token_id
        start = draw_start(seeds, network.num_tokens, fraction, network.codebook_size, mask_token_id=mask)
        return start, SeededNoise(seeds, network.num_tokens)

    def roll_out(self, batch: Batch) -> RollOut:
        """Generates images with the student up to a random one of its steps, which has a graph."""
        network, decoder, draws = self.config.network, self.decoder, batch.step_draws
        vectors, last, mask = batch.vectors_for(network.condition_dim), self.draw_step(), network.mask_token_id
        seen, noise = self.draw_start(batch)
        is_drawn = torch.ones_like(seen, dtype=torch.bool)
        if last:
            predictor = ClassPredictor(self.transformer, draws.labels, vectors)
            steps = decoder.steps(
                start_from(seen, predictor, mask_token_id=mask),
                torch.full_like(seen, mask),
                noise,
                mask_token_id=mask,
                grid=network.grid,
                num_masked=[network.num_tokens] * len(seen),
            )
            step = next(islice(steps, last - 1, None))
            torch.clear_autocast_cache()  # casts of weights made without gradients would cut the graph
            seen, is_drawn = step.tokens.masked_fill(step.still_masked, mask), step.still_masked
        logits = self.transformer(seen, draws.labels, vectors=vectors).float()  # (B, N, K)
        positions = torch.arange(network.num_tokens, device=seen.device).expand_as(seen)
        progress = step_progress(last, decoder.num_steps)
        drawn = decoder.sampling.draw(logits.detach(), noise, positions, step=last, progress=progress)
        return RollOut(logits, drawn.where(is_drawn, seen), is_drawn)

    def _compute_training_losses(self, batch: Batch) -> StepLosses:
        return self.method(self, batch, batch.content)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Does nothing: ``evaluation.distilling.QualityMonitor`` measures images of the student."""

    def on_validation_epoch_end(self) -> None:
        """Does nothing; see ``validation_step``."""

    def start_from(self, folder: Path) -> None:
        """Replaces the initial weights of all networks by those of the teacher. Call it before the first step."""
        super().start_from(folder)
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(self.transformer.state_dict())

    def configure_model(self) -> None:
        """Checks the precision, and shards the networks that train block by block under FSDP2."""
        super().configure_model()
        if self.device_mesh is not None and self.auxiliary is not None:
            mesh, precision = self.device_mesh["data_parallel"], self.trainer.precision
            shard_blocks(self.auxiliary, self.auxiliary.blocks, mesh, precision=precision)

    def trained_groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups of the optimizer: those of the student and of the auxiliary network."""
        groups = super().trained_groups()
        if self.auxiliary is None:
            return groups
        optimizer = self.config.optimizer
        rate = self.method.auxiliary_rate * optimizer.learning_rate.peak
        others = parameter_groups(self.auxiliary, optimizer.weight_decay, prefix="auxiliary.")
        return [*groups, *({**group, "lr": rate} for group in others)]


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

    def __call__(self, model: DistilledModel, batch: Batch, tokens: Tensor) -> StepLosses:
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

    def __call__(self, model: DistilledModel, batch: Batch, tokens: Tensor) -> StepLosses:
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
