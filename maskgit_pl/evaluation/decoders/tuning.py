"""The search for a better way to decode one model: a plain search, judged on held-out data, written down as it goes.

Used by ``maskgit tune``. Trial 0 is the model's own decoding; ``search_space`` says what the others are. Every
measurement goes into the ledger of ``trials``, and one that is there is not made again. The best trials are measured
once more with fresh noise and twice the images, the model's own decoding among them, and the best of those wins, so
that luck does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.classifier import Classifier
from maskgit_pl.evaluation.decoders.search_space import Search, SearchSpace
from maskgit_pl.evaluation.decoders.trials import Ledger
from maskgit_pl.evaluation.protocol import METRICS, Protocol, RealImages, measure_decoding
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.registry import nearest

__all__ = ["METRIC_KEYS", "Found", "Meter", "Trial", "better", "direction", "key_of", "ranked", "search", "shown"]

METRIC_KEYS = {"fid": "fid/classifier", "kid": "kid/classifier", "agreement": "class_agreement"}
_FINALISTS = 3
_FRESH = 1_000_000  # how far the seeds of the second measurement lie from those of the trials


def key_of(metric: str) -> str:
    """The key of a metric in what was measured.

    Raises:
        ValueError: An unknown metric.
    """
    if metric not in METRIC_KEYS:
        raise ValueError(f"--metric {metric!r}: {nearest(metric, METRIC_KEYS)}")
    return METRIC_KEYS[metric]


def better(key: str, value: float, other: float) -> bool:
    """Whether a value of a metric is better than another."""
    return value > other if METRICS[key] else value < other


def direction(key: str) -> str:
    """``higher is better`` or ``lower is better``."""
    return "higher is better" if METRICS[key] else "lower is better"


def shown(key: str, value: float) -> str:
    """A value of a metric, or of what is measured beside it, for people."""
    return {"class_agreement": f"{value:.1%}", "diversity": f"{value:.2f}", "fid/classifier": f"{value:.3f}"}.get(
        key, f"{value:.4f}"
    )


class Meter:
    """Measures decodings, each once; what the ledger knows costs nothing.

    Args:
        pipe: The model.
        classifier: Judges the images.
        real: What distances are measured from.
        ledger: What was measured before.
        batch_size: Images at a time.

    Attributes:
        measured: How many measurements were made, those of the ledger not counted.
    """

    def __init__(
        self, pipe: MaskGIT, classifier: Classifier, real: RealImages, ledger: Ledger, *, batch_size: int
    ) -> None:
        self._pipe, self._classifier, self._real = pipe, classifier, real
        self._ledger, self._batch_size = ledger, batch_size
        self.measured = 0

    def __call__(self, decoding: DecodingConfig, *, num_images: int, seed: int, purpose: str) -> dict[str, Any]:
        """The numbers of ``Samples``; arguments as of ``Ledger.add``."""
        known = self._ledger.find(decoding, num_images=num_images, seed=seed)
        if known is not None:
            return known
        protocol = Protocol(num_images, seed=seed, batch_size=self._batch_size)
        numbers = measure_decoding(self._pipe, self._classifier, self._real, protocol, decoding).numbers()
        self._ledger.add(decoding, numbers, num_images=num_images, seed=seed, purpose=purpose)
        self.measured += 1
        return numbers


@dataclass(frozen=True)
class Trial:
    """A decoding and what was measured of it.

    Args:
        number: 0 is the model's own.
        decoding: How its images were decoded.
        numbers: As of ``Samples.numbers``.
    """

    number: int
    decoding: DecodingConfig
    numbers: dict[str, Any]


def ranked(trials: Sequence[Trial], key: str) -> list[Trial]:
    """Trials by a metric, the best first."""
    return sorted(trials, key=lambda trial: -trial.numbers[key] if METRICS[key] else trial.numbers[key])


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        trials: All trials, in order.
        confirmed: The model's own decoding and the best trials, measured again with fresh noise; trial 0 first.
        winner: The best of ``confirmed``.
        num_images: Images of each of ``confirmed``.
        seed: Of their first image.
    """

    trials: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    winner: Trial
    num_images: int
    seed: int

    @property
    def before(self) -> Trial:
        """The model's own decoding, measured again."""
        return self.confirmed[0]


def search(
    meter: Meter,
    space: SearchSpace,
    *,
    key: str,
    trials: int,
    num_images: int,
    seed: int,
    how: Search = "random",
    seconds: float | None = None,
    current: DecodingConfig | None = None,
    on_trial: Callable[[Trial], object] = lambda trial: None,
) -> Found:
    """Tries decodings, measures the best again, and gives the best of those.

    Args:
        meter: Measures.
        space: What is tried.
        key: Of the metric, as of ``key_of``.
        trials: At most so many, trial 0 included.
        num_images: Images of a trial; twice as many confirm.
        seed: Of the trials, and of their first image: all trials have the same noise.
        how: Random draws or a grid.
        seconds: After so many no further trial begins; None for no limit.
        current: How the model is decoded now, where that is one of the trials: it is measured again with the best.
        on_trial: Called after each trial and each confirmation.
    """
    start, made = time.monotonic(), list[Trial]()
    for number in range(trials):
        decoding = space.trial(number, seed=seed, how=how)
        if decoding is None or (made and seconds is not None and time.monotonic() - start >= seconds):
            break
        numbers = meter(decoding, num_images=num_images, seed=seed, purpose=f"trial {number}")
        made.append(Trial(number, decoding, numbers))
        on_trial(made[-1])
    confirmed = []
    for trial in _finalists(made, key, current):
        purpose = f"confirmation of trial {trial.number}"
        numbers = meter(trial.decoding, num_images=2 * num_images, seed=seed + _FRESH, purpose=purpose)
        confirmed.append(replace(trial, numbers=numbers))
        on_trial(confirmed[-1])
    winner = confirmed[0]
    for trial in confirmed[1:]:
        winner = trial if better(key, trial.numbers[key], winner.numbers[key]) else winner
    return Found(tuple(made), tuple(confirmed), winner, 2 * num_images, seed + _FRESH)


def _finalists(made: Sequence[Trial], key: str, current: DecodingConfig | None) -> list[Trial]:
    """Trial 0, the trial that is in use, and the best others, no decoding twice."""
    others = ranked(made[1:], key)
    chosen = [made[0], *(trial for trial in others if trial.decoding == current)][:2]
    most = len(chosen) + _FINALISTS - sum(trial in others[:_FINALISTS] for trial in chosen)
    for trial in others:
        if len(chosen) < most and all(trial.decoding != other.decoding for other in chosen):
            chosen.append(trial)
    return chosen
