"""The callback that measures the health of a tokenizer during training, and warns in plain words.

After each step it knows which codes the training batches have used (steps of the code):

1. A forward hook of the quantizer counts the tokens of each micro-batch, and notes the step at which a code was used.
2. At the Trainer's logging steps, and before a validation, the ranks add up their counts, and the measurements go to
   all loggers.
3. The measurements are compared with their healthy ranges. A value that stays outside is reported once: a warning, and
   an entry of ``health.json`` in the stage folder. Training continues.

Counts and reports are saved in checkpoints, so a resumed run has the same measurements and repeats no report.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from einops import rearrange
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from maskgit_pl.distributed import max_over_ranks, mean_over_ranks, rank_and_world, sum_over_ranks
from maskgit_pl.files import parse_any_json, write_text
from maskgit_pl.networks.quantizers import Quantizer, QuantizerOutput, quantizers
from maskgit_pl.training.health_rules import HealthConfig, HealthContext, Problem, find_problems

__all__ = ["FILE_NAME", "CodeHistory", "HealthMonitor", "measure_vectors"]

log = logging.getLogger(__name__)

FILE_NAME = "health.json"  # in the stage folder


class CodeHistory:
    """The use of each code by the training batches of this rank.

    Args:
        codebook_size: K, number of codes.

    Attributes:
        counts: (K,) int64: number of tokens of each code since the last measurement.
        last_used: (K,) int64: last step whose batch used the code; 0 if none has.
    """

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.last_used = torch.zeros(codebook_size, dtype=torch.int64)

    def add(self, tokens: Tensor, step: int) -> None:
        """Adds the tokens of a micro-batch.

        Args:
            tokens: int64 in [0, K), of any shape.
            step: Step that the micro-batch belongs to, counted from 1.
        """
        flat = tokens.flatten()
        if self.counts.device != flat.device:
            self.counts, self.last_used = self.counts.to(flat.device), self.last_used.to(flat.device)
        # No bincount: it waits for the device to learn the largest token.
        self.counts.index_add_(0, flat, torch.ones_like(flat))
        self.last_used.index_fill_(0, flat, step)

    def state(self) -> dict[str, Tensor]:
        """Returns the counts and the last uses over all ranks; must be called on every rank."""
        return {"counts": sum_over_ranks(self.counts), "last_used": max_over_ranks(self.last_used)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores ``state``.

        Rank 0 takes the counts of all ranks, so their sum stays the same for any number of ranks.
        """
        self.counts = state["counts"].clone() if rank_and_world()[0] == 0 else torch.zeros_like(self.counts)
        self.last_used = state["last_used"].clone()

    def measure(self, step: int, *, dead_after: int) -> tuple[dict[str, float], int]:
        """Measures the use of the codes over all ranks; must be called on every rank.

        Args:
            step: Number of finished steps.
            dead_after: Number of steps after which an unused code is dead.

        Returns:
            Measurements by name: ``codebook_usage`` in [0, 1] and ``perplexity`` in [1, K] of the counted tokens,
            ``dead_codes``, and in steps ``dead_code_age``, the mean age of dead codes, and ``oldest_code_age``. The age
            of a code is the number of steps since a batch used it. Second, the number of counted tokens.
        """
        state = self.state()
        counts, age = state["counts"].double(), (step - state["last_used"]).double()
        dead = age >= dead_after
        shares = counts / counts.sum().clamp(min=1)
        values = [
            counts.sum(),
            (counts > 0).double().mean(),
            torch.special.entr(shares).sum().exp(),
            dead.double().sum(),
            (age * dead).sum() / dead.double().sum().clamp(min=1),
            age.max(),
        ]
        names = ("codebook_usage", "perplexity", "dead_codes", "dead_code_age", "oldest_code_age")
        num_tokens, *found = torch.stack(values).tolist()  # one transfer to the host
        return dict(zip(names, found, strict=True)), int(num_tokens)


class HealthMonitor(Callback):
    """A callback that logs the health of a tokenizer, and warns if it leaves its healthy ranges.

    Logged as ``train/NAME``: the measurements of ``CodeHistory.measure`` and ``measure_vectors``.

    Args:
        folder: Folder of the stage, for ``health.json``.
        config: Healthy ranges; None for no alarms. The measurements are logged in both cases.
    """

    def __init__(self, folder: Path, config: HealthConfig | None = None) -> None:
        self.folder = folder
        self.config = config
        self.history: CodeHistory | None = None
        self.reports: list[dict[str, Any]] = []  # what was reported so far, as in ``health.json``
        self._streaks: dict[str, int] = {}  # measurements in a row outside of a range, by cause
        self._first_judged: int | None = None  # first step with a measurement of the discriminator
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # features and tokens of the last micro-batch
        self._measured_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts to observe the quantizer."""
        if stage != "fit":
            return
        quantizer = cast("_HasQuantizer", pl_module).network.quantizer
        self.history = CodeHistory(quantizer.codebook_size)

        def observe(module: nn.Module, given: Any, output: QuantizerOutput) -> None:
            # A frozen quantizer stays in evaluation mode, and is observed too.
            if not (torch.is_grad_enabled() and pl_module.training):
                return
            # 1.
            assert self.history is not None
            self._last = output.features, output.tokens
            self.history.add(output.tokens, trainer.global_step + 1)

        self._hook = quantizer.register_forward_hook(observe)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops to observe the quantizer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._last = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the reports of another run in the same folder, before the first step."""
        self._measured_step = trainer.global_step
        if not trainer.global_step and trainer.is_global_zero:
            (self.folder / FILE_NAME).unlink(missing_ok=True)  # of another run in the same folder

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Frees the features of the last micro-batch."""
        self._last = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measures and judges at logging steps."""
        # A micro-batch that ends no step leaves global_step as it is.
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # added at run time
        if is_logged and trainer.global_step > self._measured_step:
            self._measured_step = trainer.global_step
            metrics, num_tokens = self._measure(trainer, pl_module)
            assert self.history is not None
            self.history.counts.zero_()
            if self.config is None:
                return
            metrics |= _discriminator_accuracy(trainer, pl_module.device)
            if trainer.is_global_zero:
                self._judge(trainer, metrics, _context_of(pl_module), num_tokens)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures before a validation."""
        # The counts continue, so that a resumed run, which may repeat no validation, has the same ones.
        if not trainer.sanity_checking and trainer.global_step > self._measured_step:
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns counts and reports; must be called on every rank."""
        assert self.history is not None
        reported = {"reports": self.reports, "streaks": self._streaks, "first_judged": self._first_judged}
        return {**self.history.state(), "reported": json.dumps(reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores ``state_dict``."""
        if self.history is not None:
            self.history.load(state_dict)
        reported = parse_any_json(state_dict["reported"], "the health of a checkpoint")
        self.reports, self._streaks = reported["reports"], reported["streaks"]
        self._first_judged = reported["first_judged"]

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> tuple[dict[str, float], int]:
        """Logs the measurements of a step, and returns them with the number of tokens; called on every rank (2)."""
        if self._last is None or self.history is None:
            return {}, 0
        (features, tokens), quantizer = self._last, cast("_HasQuantizer", pl_module).network.quantizer
        tokens_per_step = tokens.numel() * getattr(pl_module, "accumulation", 1) * trainer.world_size
        dead_after = (self.config or HealthConfig()).dead_steps(quantizer.codebook_size, tokens_per_step)
        metrics, num_tokens = self.history.measure(trainer.global_step, dead_after=dead_after)
        metrics |= measure_vectors(quantizer, features, tokens)
        for logger in trainer.loggers:
            named = {f"train/{name}": value for name, value in metrics.items()}
            logger.log_metrics(named, step=trainer.global_step)
        return metrics, num_tokens

    def _judge(self, trainer: Trainer, metrics: Mapping[str, float], context: HealthContext, num_tokens: int) -> None:
        """Reports each cause that has been outside of its range for ``patience`` measurements (3)."""
        assert self.config is not None
        step, grace = trainer.global_step, self.config.grace(int(trainer.max_steps))
        if "discriminator_accuracy" in metrics and self._first_judged is None:
            self._first_judged = step
        problems = {
            problem.cause: problem
            for problem in find_problems(metrics, self.config, context, num_tokens=num_tokens)
            if step > grace + ((self._first_judged or 0) if problem.cause.startswith("discriminator") else 0)
        }
        self._streaks = {cause: self._streaks.get(cause, 0) + 1 for cause in problems}
        known = {report["cause"] for report in self.reports}
        fresh = [
            problem
            for cause, problem in problems.items()
            if cause not in known and self._streaks[cause] >= self.config.patience
        ]
        healed = [each for each in self.reports if each["cause"] not in problems and each["healthy_again"] is None]
        for report in healed:
            report["healthy_again"] = step
            log.info("step %d: health: %s is in its healthy range again", step, report["metric"])
        for problem in fresh:
            self._report(step, problem)
        if fresh or healed:
            self._write()

    def _report(self, step: int, problem: Problem) -> None:
        advice = "; or ".join(problem.advice)
        log.warning("step %d: health: %s. Try: %s. Training continues", step, problem.text, advice)
        self.reports.append({"step": step, "healthy_again": None, **asdict(problem), "advice": list(problem.advice)})

    def _write(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / FILE_NAME, json.dumps(self.reports, indent=2) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s; training continues", self.folder / FILE_NAME, error)


@torch.no_grad()
def measure_vectors(quantizer: Quantizer, features: Tensor, tokens: Tensor) -> dict[str, float]:
    """Measures features and codes of a micro-batch, averaged over the ranks; must be called on every rank.

    Args:
        quantizer: Quantizer with or without parameters; its codes are read with ``lookup``.
        features: (B, D, h, w) float: its input.
        tokens: (B, N) int64 in [0, K): its tokens for them, N = h w.

    Returns:
        Mean L2 norms by name: ``feature_norm`` of the features z, ``codebook_norm`` of all codes, and
        ``commitment_distance`` of z - q, with q the code of each feature.
    """
    rows = rearrange(features, "b d h w -> b (h w) d").float()  # (B, N, D)
    codes = quantizer.lookup(torch.arange(quantizer.codebook_size, device=features.device)).float()  # (K, D)
    distance = (rows - quantizer.lookup(tokens).float()).norm(dim=-1).mean()
    means = torch.stack([rows.norm(dim=-1).mean(), codes.norm(dim=-1).mean(), distance])
    names = ("feature_norm", "codebook_norm", "commitment_distance")
    return dict(zip(names, mean_over_ranks(means).tolist(), strict=True))


def _context_of(module: LightningModule) -> HealthContext:
    """Returns the settings of a tokenizer that its health depends on."""
    config = cast("Any", module).config
    quantizer = cast("_HasQuantizer", module).network.quantizer
    spec = config.network.quantizer
    built = quantizers.build(spec)
    adversarial = config.adversarial
    return HealthContext(
        quantizer.codebook_size,
        spec if isinstance(spec, str) else str(spec.get("name", "")),
        options=asdict(built) if is_dataclass(built) and not isinstance(built, type) else {},
        has_codebook=isinstance(getattr(quantizer, "codebook", None), Tensor),
        learning_rate=config.optimizer.learning_rate.peak,
        start_step=None if adversarial is None else adversarial.start_step,
        known_quantizers=quantizers.names(),
    )


def _discriminator_accuracy(trainer: Trainer, device: torch.device) -> dict[str, float]:
    """Returns the accuracy over real images and reconstructions, if the module logs it; called on every rank.

    A rank logs that of its own micro-batch, and of a few images all are often classified correctly.
    """
    value = trainer.callback_metrics.get("train/discriminator_accuracy")
    return {} if value is None else {"discriminator_accuracy": float(mean_over_ranks(value.to(device)))}


class _Network(Protocol):
    quantizer: Quantizer


class _HasQuantizer(Protocol):
    network: _Network
