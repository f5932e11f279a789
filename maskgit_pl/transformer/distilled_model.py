"""The module of a distillation: the student that trains, and its teacher. See ``distillation``."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.data.batches import Batch
from maskgit_pl.decoding.decoder import SeededNoise, draw_start
from maskgit_pl.decoding.guidance import guidance_schedules, step_progress
from maskgit_pl.decoding.predictors import ClassPredictor, start_from
from maskgit_pl.pretrained.networks import PretrainedTransformer, load_transformer
from maskgit_pl.randomness import random_bits
from maskgit_pl.schedules import num_masked
from maskgit_pl.training.optimizers import parameter_groups
from maskgit_pl.training.strategies import shard_blocks
from maskgit_pl.transformer.distillation import DistillationConfig, RollOut
from maskgit_pl.transformer.losses import StepLosses
from maskgit_pl.transformer.mvtm import MaskedTokenModel

_SHARED = ("codebook_size", "num_classes", "grid", "condition_dim", "null_label", "mask_token_id")  # with the teacher
_COLDEST = 1e-3  # sampling temperature of a teacher that takes the likeliest codes


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
        """Does nothing: ``evaluation.quality_monitor.QualityMonitor`` measures images of the student."""

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
