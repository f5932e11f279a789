"""The rules that say whether the training of a tokenizer is healthy, and what to change if it is not.

``health.HealthMonitor`` applies them during training, ``maskgit inspect`` to the logs of a run. Imports no torch, so
that a recipe is checked without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from maskgit_pl.checks import check_integer, check_number

__all__ = ["HealthConfig", "HealthContext", "Problem", "attainable_codes", "find_problems"]

_SHORTEST_GRACE, _LONGEST_GRACE = 200, 5000  # steps
_RESTART_BELOW = 0.2  # of recipes/tokenizer/base.yaml, where all codes are used


@dataclass(frozen=True)
class HealthConfig:
    """The healthy ranges of the training of a tokenizer, and when a value outside of them is reported.

    Args:
        least_usage: Smallest healthy codebook usage, in [0, 1], of what uniform use of all codes would give. A
            collapsed codebook uses a few percent of its codes; a healthy one uses nearly all.
        least_perplexity: Smallest healthy perplexity, in [0, 1], of what uniform use would give. Some codes are always
            more frequent (background), so it is lower than the usage.
        largest_distance: Largest healthy commitment distance, > 0, in units of the feature norm, for quantizers with a
            codebook. At 1 the nearest code is as far from a feature as the origin is: the codes explain nothing.
        least_discriminator_accuracy: Smallest healthy accuracy of the discriminator, in [0, 1]. It is 0.5 if images
            cannot be told apart; lower values mean that its training is unstable.
        largest_discriminator_accuracy: Largest healthy accuracy of the discriminator, in [0, 1]. A discriminator that
            is always right leaves the generator nearly no gradient.
        dead_after: A code is dead if no training batch has used it for this number of steps, >= 1. The number is
            raised until uniform use would use each code 10 times.
        grace_steps: Steps without alarms at the beginning, and after the first step of the discriminator, >= 0. None:
            5 % of the run, at least 200 and at most 5,000, since the warm-up changes features faster than codes.
        patience: Number of measurements in a row outside of a range before an alarm, >= 1, since single
            measurements are noisy.

    Raises:
        ValueError: if a number is out of range.
    """

    least_usage: float = 0.3
    least_perplexity: float = 0.1
    largest_distance: float = 1.0
    least_discriminator_accuracy: float = 0.3
    largest_discriminator_accuracy: float = 0.98
    dead_after: int = 100
    grace_steps: int | None = None
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("least_usage", "least_perplexity", "least_discriminator_accuracy"):
            check_number(name, getattr(self, name), "[0, 1]")
        check_number("largest_discriminator_accuracy", self.largest_discriminator_accuracy, "[0, 1]")
        check_number("largest_distance", self.largest_distance, "(0, inf)")
        check_integer("dead_after", self.dead_after, "[1, 2**53)")
        check_integer("patience", self.patience, "[1, 1000000]")
        if self.grace_steps is not None:
            check_integer("grace_steps", self.grace_steps, "[0, 2**53)")
        if self.least_discriminator_accuracy > self.largest_discriminator_accuracy:
            raise ValueError(
                "least_discriminator_accuracy must be <= largest_discriminator_accuracy "
                f"({self.largest_discriminator_accuracy}), got {self.least_discriminator_accuracy}"
            )

    def grace(self, max_steps: int) -> int:
        """Returns the number of steps without alarms in a run of ``max_steps`` steps."""
        if self.grace_steps is not None:
            return self.grace_steps
        return min(max(max_steps // 20, _SHORTEST_GRACE), _LONGEST_GRACE)

    def dead_steps(self, codebook_size: int, tokens_per_step: int) -> int:
        """Returns the number of steps after which an unused code is dead.

        Args:
            codebook_size: K, number of codes.
            tokens_per_step: Number of tokens of a global batch, >= 1.
        """
        return max(self.dead_after, -(-10 * codebook_size // tokens_per_step))


@dataclass(frozen=True)
class HealthContext:
    """The settings of a run that its health depends on.

    Args:
        codebook_size: K, number of codes.
        quantizer: Name of the quantizer.
        options: Options of the quantizer by name.
        has_codebook: True if the quantizer stores its codes as vectors, in the space of the features.
        learning_rate: Peak of the learning rate; None if unknown.
        start_step: First step of the discriminator; None without one.
        known_quantizers: Names of all quantizers, for advice.
    """

    codebook_size: int
    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    has_codebook: bool = True
    learning_rate: float | None = None
    start_step: int | None = None
    known_quantizers: Sequence[str] = ()


@dataclass(frozen=True)
class Problem:
    """A value outside of its healthy range.

    Args:
        cause: Key of the problem, such as ``codebook_usage``; each is reported once.
        metric: Name of the measurement.
        value: The measured value.
        limit: The end of the range that it is beyond.
        text: The problem in one sentence without a period.
        advice: Changes that may cure it, the most promising first.
    """

    cause: str
    metric: str
    value: float
    limit: float
    text: str
    advice: Sequence[str]


def attainable_codes(codebook_size: int, num_tokens: float) -> float:
    """Returns the expected number of different codes among tokens that are drawn uniformly.

    K (1 - (1 - 1/K)^n)

    Args:
        codebook_size: K, number of codes, >= 1.
        num_tokens: n, number of tokens, >= 0.
    """
    return float(codebook_size * (1 - (1 - 1 / codebook_size) ** num_tokens))


def find_problems(
    metrics: Mapping[str, float], config: HealthConfig, context: HealthContext, *, num_tokens: float
) -> list[Problem]:
    """Compares measurements with their healthy ranges.

    Args:
        metrics: Measurements by name without ``train/`` or ``val/``; missing ones are not judged.
        config: The ranges.
        context: Settings of the run.
        num_tokens: Number of tokens that usage and perplexity were measured on.
    """
    rules = (_find_unused_codes, _find_distant_codes, _find_discriminator)
    return [problem for rule in rules for problem in rule(metrics, config, context, num_tokens)]


def _find_unused_codes(
    metrics: Mapping[str, float], config: HealthConfig, context: HealthContext, num_tokens: float
) -> Iterator[Problem]:
    size = context.codebook_size
    attainable = attainable_codes(size, num_tokens)
    limit = config.least_usage * attainable / size
    usage = metrics.get("codebook_usage")
    if usage is not None and usage < limit:
        text = f"only {usage * size:.0f} of {size} codes are in use ({usage:.1%}, healthy: at least {limit:.1%})"
        yield Problem("codebook_usage", "codebook_usage", usage, limit, text, _advise_on_codes(context))
    limit = max(1.0, config.least_perplexity * attainable)
    perplexity = metrics.get("perplexity")
    if perplexity is not None and perplexity < limit:
        text = (
            f"the tokens are distributed like {perplexity:.1f} equally frequent codes of {size} (perplexity, healthy: "
            f"at least {limit:.1f}), so a few codes describe nearly everything"
        )
        yield Problem("perplexity", "perplexity", perplexity, limit, text, _advise_on_codes(context))


def _find_distant_codes(
    metrics: Mapping[str, float], config: HealthConfig, context: HealthContext, num_tokens: float
) -> Iterator[Problem]:
    distance, norm = metrics.get("commitment_distance"), metrics.get("feature_norm")
    if distance is None or norm is None or not context.has_codebook:
        return
    if distance > config.largest_distance * norm:
        limit = config.largest_distance * norm
        text = (
            f"the features are {distance:.3g} away from their codes on average (healthy: at most {limit:.3g}, for a "
            f"feature norm of {norm:.3g}), so the codes explain nothing of them"
        )
        commitment = _number(context.options.get("commitment"))
        advice = [f"raise model.network.quantizer.commitment (now {commitment:g})"] if commitment is not None else []
        yield Problem(
            "commitment_distance", "commitment_distance", distance, limit, text, [*advice, *_lower_rate(context)]
        )


def _find_discriminator(
    metrics: Mapping[str, float], config: HealthConfig, context: HealthContext, num_tokens: float
) -> Iterator[Problem]:
    accuracy = metrics.get("discriminator_accuracy")
    if accuracy is None:
        return
    name = "discriminator_accuracy"
    if accuracy > config.largest_discriminator_accuracy:
        limit = config.largest_discriminator_accuracy
        text = (
            f"the discriminator is right on {accuracy:.1%} of the images (healthy: at most {limit:.1%}), so the "
            "generator learns nearly nothing from it"
        )
        start = f" (now {context.start_step})" if context.start_step is not None else ""
        advice = [
            f"start it later: raise model.adversarial.start_step{start}",
            "raise model.adversarial.r1_weight, or set model.adversarial.lecam_weight above 0",
            "use a smaller discriminator (model.adversarial.discriminator)",
        ]
        yield Problem("discriminator_wins", name, accuracy, limit, text, advice)
    if accuracy < config.least_discriminator_accuracy:
        limit = config.least_discriminator_accuracy
        text = (
            f"the discriminator is right on only {accuracy:.1%} of the images (healthy: at least {limit:.1%}; "
            "guessing gives 50 %), so its training is unstable"
        )
        advice = [
            *_lower_rate(context),
            "lower model.adversarial.weight, or set weight_rule: adaptive",
            "lower model.adversarial.r1_weight",
        ]
        yield Problem("discriminator_fails", name, accuracy, limit, text, advice)


def _advise_on_codes(context: HealthContext) -> list[str]:
    """Returns the changes that bring unused codes back, for the quantizer of the run."""
    key, advice = "model.network.quantizer", []
    restart, entropy = (_number(context.options.get(name)) for name in ("restart_below", "entropy_weight"))
    if restart is not None and restart < _RESTART_BELOW:
        advice.append(
            f"raise {key}.restart_below (now {restart:g}; {_RESTART_BELOW} replaces codes that fewer than a fifth of "
            "their share of features use)"
        )
    others = [name for name in ("simvq", "fsq") if name in context.known_quantizers and name != context.quantizer]
    if context.quantizer != "ema":
        others.insert(0, f"{{name: ema, restart_below: {_RESTART_BELOW}}}")
    if others and context.has_codebook:
        advice.append(f"use {key} {' or '.join(others)}, which keeps its codes in use")
    if entropy == 0:
        advice.append(f"set {key}.entropy_weight above 0 (0.1 in the released configuration)")
    advice += _lower_rate(context)
    advice.append("use a smaller model.network.codebook_size or code_dim")
    return advice


def _lower_rate(context: HealthContext) -> list[str]:
    now = f" (now {context.learning_rate:g})" if context.learning_rate is not None else ""
    return [f"lower model.optimizer.learning_rate.peak{now}"]


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
