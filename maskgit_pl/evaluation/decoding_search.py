"""The search for a better way to decode one model: a plain search, measured on held-out data.

Trial 0 is the model's own decoding; ``search_space`` says what the others are. The best trials are measured once more
with fresh noise and twice the images, the model's own decoding among them, and the best of those wins, so that luck
does not. ``tuning`` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.metric_names import find_metric, is_better

if TYPE_CHECKING:
    from maskgit_pl.evaluation.search_space import Search, SearchSpace

__all__ = ["Measure", "SearchPlan", "SearchResult", "Trial", "search", "sort_trials"]

FINALISTS = 3
_CONFIRMATION_OFFSET = 1_000_000  # how far the seeds of the second measurement lie from those of the trials

Measure: TypeAlias = Callable[[DecodingConfig, int, int, str], Mapping[str, float]]
# (decoding, num_images, seed, purpose) -> numbers by name


@dataclass(frozen=True)
class Trial:
    """A decoding and its numbers.

    Args:
        number: 0 is the model's own.
        decoding: How its images were decoded.
        numbers: By name, such as ``fid/classifier``.
    """

    number: int
    decoding: DecodingConfig
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        trials: All trials, in order.
        confirmed: The model's own decoding and the best trials, measured again with fresh noise; trial 0 first.
        winner: The best of ``confirmed``.
        num_images: Images of each of ``confirmed``.
        seed: Of their first image.
        metric: Name of the metric of the search.
        folder: Where the page and the figure are.
        figure: Whether there is a figure.
        decoding_file: ``decoding.json`` of the winner; None where the model is decoded in this way already.
        old_decoding_file: Where the one before is kept, if there was one.
        num_measured: Number of measurements that were made, those of the ledger not counted.
    """

    trials: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    winner: Trial
    num_images: int
    seed: int
    metric: str
    folder: Path = Path()
    figure: bool = False
    decoding_file: Path | None = None
    old_decoding_file: Path | None = None
    num_measured: int = 0

    @property
    def before(self) -> Trial:
        """The model's own decoding, measured again."""
        return self.confirmed[0]


def sort_trials(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Returns trials by a metric, the best first."""
    sign = -1 if find_metric(metric).higher_is_better else 1
    return sorted(trials, key=lambda trial: sign * trial.numbers[metric])


@dataclass(frozen=True)
class SearchPlan:
    """The budget of a search.

    Args:
        metric: Name of the metric, such as ``fid/classifier``.
        trials: At most so many, trial 0 included.
        num_images: Images of a trial; twice as many confirm.
        seed: Of the trials, and of their first image: all trials have the same noise.
        method: Random draws or a grid.
        seconds: No further trial begins after so many; None for no limit.
        current: How the model is decoded now, where that is one of the trials: it is measured again with the best.
    """

    metric: str
    trials: int
    num_images: int
    seed: int = 0
    method: Search = "random"
    seconds: float | None = None
    current: DecodingConfig | None = None


def search(
    measure: Measure,
    space: SearchSpace,
    plan: SearchPlan,
    *,
    on_trial: Callable[[Trial], object] = lambda trial: None,
) -> SearchResult:
    """Tries decodings, measures the best again, and returns the best of those.

    Args:
        measure: Measures a decoding with a number of images and a seed.
        space: Decodings that are tried.
        plan: Metric and budget.
        on_trial: Called after each trial and each confirmation.
    """
    metric, num_images = plan.metric, plan.num_images
    start, made = time.monotonic(), list[Trial]()
    for number in range(plan.trials):
        decoding = space.trial(number, seed=plan.seed, method=plan.method)
        late = plan.seconds is not None and time.monotonic() - start >= plan.seconds
        if decoding is None or (made and late):
            break
        made.append(Trial(number, decoding, measure(decoding, num_images, plan.seed, f"trial {number}")))
        on_trial(made[-1])
    confirmed, seed = [], plan.seed + _CONFIRMATION_OFFSET
    for trial in _choose_finalists(made, metric, plan.current):
        purpose = f"confirmation of trial {trial.number}"
        confirmed.append(replace(trial, numbers=measure(trial.decoding, 2 * num_images, seed, purpose)))
        on_trial(confirmed[-1])
    winner = confirmed[0]
    for trial in confirmed[1:]:
        winner = trial if is_better(metric, trial.numbers[metric], winner.numbers[metric]) else winner
    return SearchResult(tuple(made), tuple(confirmed), winner, 2 * num_images, seed, metric)


def _choose_finalists(made: Sequence[Trial], metric: str, current: DecodingConfig | None) -> list[Trial]:
    """Returns trial 0, the trial that is in use, and the best others, no decoding twice."""
    others = sort_trials(made[1:], metric)
    chosen = [made[0], *(trial for trial in others if trial.decoding == current)][:2]
    most = len(chosen) + FINALISTS - sum(trial in others[:FINALISTS] for trial in chosen)
    for trial in others:
        if len(chosen) < most and all(trial.decoding != other.decoding for other in chosen):
            chosen.append(trial)
    return chosen
