"""The health of a tokenizer: measurements during training, their healthy ranges, and what to change outside of them.

``HealthMonitor`` knows which codes the training batches have used (steps of the code):

1. A forward hook of the quantizer counts the tokens of each micro-batch, and notes the step at which a code was used.
2. At the Trainer's logging steps, the ranks add up their counts, and the measurements go to all loggers.
3. ``find_problems`` compares the measurements with their ranges; ``maskgit inspect`` does it with the logs of a
   run, which also have the accuracy of the discriminator. A value that stays outside gives one warning in each
   process. Training continues.

Counts are saved in checkpoints, so a resumed run has the same measurements.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from maskgit_pl.distributed import max_over_ranks, rank_and_world, sum_over_ranks
from maskgit_pl.networks.quantizers import Quantizer, QuantizerOutput

log = logging.getLogger(__name__)

_LOWER_RATE = "lower model.optimizer.learning_rate.peak"
_USE_CODES = [  # what brings unused codes back; the first value is that of recipes/tokenizer/base.yaml
    "use model.network.quantizer {name: ema, restart_below: 0.2}, simvq or fsq, which keep their codes in use",
    "set entropy_weight of model.network.quantizer above 0 (0.1 in the released configuration)",
    _LOWER_RATE,
    "use a smaller model.network.codebook_size or code_dim",
]


LEAST_USAGE = 0.3
"""Smallest healthy codebook usage, of that of uniform tokens. A collapsed codebook uses a few percent."""

LEAST_PERPLEXITY = 0.1
"""Smallest healthy perplexity, of that of uniform tokens. Some codes (background) are more frequent."""

DISCRIMINATOR_ACCURACY = (0.3, 0.98)
"""Smallest and largest healthy accuracy of the discriminator. It is 0.5 if images cannot be told apart. Below the first
its training is unstable; one that is always right leaves the generator nearly no gradient."""

DEAD_AFTER = 100
"""A code is dead after so many steps without use, or when uniform tokens would have used it 10 times."""

PATIENCE = 3
"""Number of measurements in a row outside of a range before an alarm, since single measurements are noisy."""

GRACE = (100, 5000)
"""Smallest and largest number of steps without alarms; see ``grace_steps``."""


def grace_steps(max_steps: int) -> int:
    """Returns the number of steps without alarms at the beginning.

    They are 5 % of the run, within ``GRACE``, since the warm-up changes features faster than codes.
    """
    least, most = GRACE
    return min(max(max_steps // 20, least), most)


@dataclass(frozen=True)
class Problem:
    """A value outside of its healthy range.

    Args:
        cause: Key of the problem, such as ``codebook_usage``; each is reported once.
        value: The measured value.
        text: The problem in one sentence without a period.
        advice: Changes that may cure it, the most promising first.
    """

    cause: str
    value: float
    text: str
    advice: Sequence[str]


def attainable_codes(codebook_size: int, num_tokens: float) -> float:
    """Returns the expected number of different codes, K (1 - (1 - 1/K)^n), among n tokens that are drawn uniformly."""
    return float(codebook_size * (1 - (1 - 1 / codebook_size) ** num_tokens))


def find_problems(metrics: Mapping[str, float], *, codebook_size: int, num_tokens: float) -> Iterator[Problem]:
    """Compares measurements with their healthy ranges.

    Args:
        metrics: Measurements by name without ``train/`` or ``val/``; missing ones are not judged.
        codebook_size: K, number of codes.
        num_tokens: Number of tokens that usage and perplexity were measured on.
    """
    attainable = attainable_codes(codebook_size, num_tokens)

    value, limit = metrics.get("codebook_usage", math.inf), LEAST_USAGE * attainable / codebook_size
    if value < limit:
        codes = f"{value * codebook_size:.0f} of {codebook_size} codes"
        text = f"only {codes} are in use ({value:.1%}, healthy: at least {limit:.1%})"
        yield Problem("codebook_usage", value, text, _USE_CODES)

    value, limit = metrics.get("perplexity", math.inf), max(1.0, LEAST_PERPLEXITY * attainable)
    if value < limit:
        text = (
            f"the tokens are distributed like {value:.1f} equally frequent codes of {codebook_size} (perplexity, "
            f"healthy: at least {limit:.1f}), so a few codes describe nearly everything"
        )
        yield Problem("perplexity", value, text, _USE_CODES)

    value, (least, limit) = metrics.get("discriminator_accuracy", 0.5), DISCRIMINATOR_ACCURACY
    if value > limit:
        text = (
            f"the discriminator is right on {value:.1%} of the images (healthy: at most {limit:.1%}), so the generator "
            "learns nearly nothing from it"
        )
        advice = [
            "start it later: raise model.adversarial.start_step",
            "raise model.adversarial.r1_weight, or set model.adversarial.lecam_weight above 0",
            "use a smaller discriminator (model.adversarial.discriminator)",
        ]
        yield Problem("discriminator_wins", value, text, advice)
    if value < least:
        text = (
            f"the discriminator is right on only {value:.1%} of the images (healthy: at least {least:.1%}; guessing "
            "gives 50 %), so its training is unstable"
        )
        advice = [_LOWER_RATE, "lower model.adversarial.weight or r1_weight, or set its weight_rule: adaptive"]
        yield Problem("discriminator_fails", value, text, advice)


def measure_usage(counts: Tensor) -> dict[str, Tensor]:
    """Computes the use of a codebook: the fraction of codes that occur, and the perplexity of their distribution.

    perplexity = exp(-sum_k p_k log p_k), with p_k the fraction of tokens that are code k

    Args:
        counts: (K,) float64: number of tokens of each code.

    Returns:
        ``codebook_usage`` in [0, 1] and ``perplexity`` in [1, K], scalars float64.
    """
    shares = counts / counts.sum().clamp(min=1)
    return {"codebook_usage": (counts > 0).double().mean(), "perplexity": torch.special.entr(shares).sum().exp()}


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
        """Adds the tokens, int64 in [0, K), of a micro-batch of a step, which is counted from 1."""
        flat = tokens.flatten()
        self.counts, self.last_used = self.counts.to(flat.device), self.last_used.to(flat.device)
        # No bincount: it waits for the device to learn the largest token.
        self.counts.index_add_(0, flat, torch.ones_like(flat))
        self.last_used.index_fill_(0, flat, step)

    def state(self) -> dict[str, Tensor]:
        """Returns counts and last uses over all ranks; must be called on every rank."""
        return {"counts": sum_over_ranks(self.counts), "last_used": max_over_ranks(self.last_used)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores ``state``.

        Rank 0 takes the counts of all ranks, so their sum stays the same for any number of ranks.
        """
        self.counts = state["counts"].clone() if rank_and_world()[0] == 0 else torch.zeros_like(self.counts)
        self.last_used = state["last_used"].clone()

    def measure(self, step: int, *, dead_after: int) -> tuple[dict[str, float], int]:
        """Measures the use of the codes after ``step`` steps over all ranks; must be called on every rank.

        Returns:
            Measurements by name: ``codebook_usage`` in [0, 1] and ``perplexity`` in [1, K] of the counted tokens,
            and ``dead_codes``. Second, the number of counted tokens.
        """
        state = self.state()
        counts, dead = state["counts"].double(), step - state["last_used"] >= dead_after
        measurements = {**measure_usage(counts), "dead_codes": dead.double().sum()}
        return {name: float(value) for name, value in measurements.items()}, int(counts.sum())


class HealthMonitor(Callback):
    """A callback that logs the health of a tokenizer, and warns if it leaves its healthy ranges.

    Logged as ``train/NAME``: the measurements of ``CodeHistory.measure``.

    Attributes:
        reported: The causes that this process has reported, each with its problem.
    """

    history: CodeHistory

    def __init__(self) -> None:
        self.reported: dict[str, Problem] = {}
        self._streaks: dict[str, int] = {}  # measurements in a row outside of a range, by cause
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._num_tokens = 0  # of the last micro-batch
        self._measured_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts to observe the quantizer."""
        quantizer: Quantizer = pl_module.network.quantizer  # type: ignore[union-attr, assignment]  # of a tokenizer
        self.history = CodeHistory(quantizer.codebook_size)

        def observe(module: nn.Module, inputs: Any, output: QuantizerOutput) -> None:
            # 1. A frozen quantizer stays in evaluation mode, and is observed too.
            if torch.is_grad_enabled() and pl_module.training:
                self._num_tokens = output.tokens.numel()
                self.history.add(output.tokens, trainer.global_step + 1)

        self._hook = quantizer.register_forward_hook(observe)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops to observe the quantizer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # A micro-batch that ends no step leaves global_step as it is.
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # added at run time
        if not is_logged or trainer.global_step <= self._measured_step:
            return
        self._measured_step = step = trainer.global_step
        # 2. Measure on all ranks, and log.
        codebook_size = len(self.history.counts)
        tokens_per_step = self._num_tokens * getattr(pl_module, "accumulation", 1) * trainer.world_size
        dead_after = max(DEAD_AFTER, -(-10 * codebook_size // tokens_per_step))
        metrics, num_tokens = self.history.measure(step, dead_after=dead_after)
        self.history.counts.zero_()
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step=step)
        # 3. Judge.
        if trainer.is_global_zero and step > grace_steps(int(trainer.max_steps)):
            problems = find_problems(metrics, codebook_size=codebook_size, num_tokens=num_tokens)
            self._judge(step, {problem.cause: problem for problem in problems})

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts; must be called on every rank."""
        return self.history.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores ``state_dict``."""
        self.history.load(state_dict)

    def _judge(self, step: int, problems: Mapping[str, Problem]) -> None:
        """Reports each cause that has been outside of its range for ``PATIENCE`` measurements."""
        self._streaks = {cause: self._streaks.get(cause, 0) + 1 for cause in problems}
        for cause, streak in self._streaks.items():
            if streak >= PATIENCE and cause not in self.reported:
                problem = self.reported[cause] = problems[cause]
                advice = "; or ".join(problem.advice)
                log.warning("step %d: health: %s. Try: %s. Training continues", step, problem.text, advice)
