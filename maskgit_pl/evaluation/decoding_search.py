"""A search for the best decoding of a model, measured on the val split. ``tuning`` runs it.

1. Measure the trials. Trial 0 is the model's own decoding; ``search_space`` makes the others.
2. Measure the best trials and the model's own decoding again, with other noise and twice the number of images.
3. The best of step 2 wins. Without the second measurement, the winner would be the trial with the luckiest noise.
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

FINALISTS = 3  # trials of step 2, besides the model's own decoding
_CONFIRMATION_OFFSET = 1_000_000  # between the seeds of steps 1 and 2, so that no image has the same noise

Measure: TypeAlias = Callable[[DecodingConfig, int, int, str], Mapping[str, float]]
# (decoding, num_images, seed, purpose) -> numbers by name


@dataclass(frozen=True)
class Trial:
    """A decoding with its measured values.

    Args:
        number: Index of the trial; 0 is the model's own decoding.
        decoding: The decoding.
        numbers: Values by name, such as ``fid/classifier``.
    """

    number: int
    decoding: DecodingConfig
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        trials: All trials, in order.
        confirmed: The model's own decoding and the best trials, measured again with other noise; trial 0 first.
        winner: The best of ``confirmed``.
        num_images: Number of images of each trial in ``confirmed``.
        seed: Seed of the first image in ``confirmed``.
        metric: Name of the metric of the search.
        folder: Folder of the page and the figure.
        figure: True if there is a figure.
        decoding_file: Path of the written ``decoding.json``; None if the model already had the winning decoding.
        old_decoding_file: Path of the copy of the previous ``decoding.json``; None if there was none.
        num_measured: Number of new measurements, without those that the ledger already held.
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
    """Returns trials sorted by a metric, the best first."""
    sign = -1 if find_metric(metric).higher_is_better else 1
    return sorted(trials, key=lambda trial: sign * trial.numbers[metric])


@dataclass(frozen=True)
class SearchPlan:
    """The budget of a search.

    Args:
        metric: Name of the metric, such as ``fid/classifier``.
        trials: Maximum number of trials, including trial 0.
        num_images: Number of images per trial; the second measurement takes twice as many.
        seed: Seed of the random draws, and of the first image: all trials have the same noise.
        method: Random draws or a grid.
        seconds: Time limit in seconds, after which no trial begins; None for no limit.
        current: The decoding in ``decoding.json``; if it is one of the trials, it is measured again with the best.
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
    """Runs a search; the module docstring describes its steps.

    Args:
        measure: Measures a decoding, given the number of images, the seed and a remark for the ledger.
        space: The decodings of the trials.
        plan: Metric and budget.
        on_trial: Called after each trial and each confirmation.
    """
    metric, num_images = plan.metric, plan.num_images
    start, trials = time.monotonic(), list[Trial]()
    # 1.
    for number, decoding in enumerate(space.iter_trials(plan.trials, seed=plan.seed, method=plan.method)):
        late = plan.seconds is not None and time.monotonic() - start >= plan.seconds
        if trials and late:
            break
        trials.append(Trial(number, decoding, measure(decoding, num_images, plan.seed, f"trial {number}")))
        on_trial(trials[-1])
    # 2.
    confirmed, seed = [], plan.seed + _CONFIRMATION_OFFSET
    for trial in _choose_finalists(trials, metric, plan.current):
        purpose = f"confirmation of trial {trial.number}"
        confirmed.append(replace(trial, numbers=measure(trial.decoding, 2 * num_images, seed, purpose)))
        on_trial(confirmed[-1])
    # 3. A tie keeps the earlier one, which is the model's own decoding if it takes part.
    winner = confirmed[0]
    for trial in confirmed[1:]:
        winner = trial if is_better(metric, trial.numbers[metric], winner.numbers[metric]) else winner
    return SearchResult(tuple(trials), tuple(confirmed), winner, 2 * num_images, seed, metric)


def _choose_finalists(trials: Sequence[Trial], metric: str, current: DecodingConfig | None) -> list[Trial]:
    """Returns trial 0, the trial with the current decoding, and the best others, without equal decodings."""
    others = sort_trials(trials[1:], metric)
    # The current decoding is a trial if an earlier run of this search wrote its winner.
    chosen = [trials[0], *(trial for trial in others if trial.decoding == current)][:2]
    # If it is among the best anyway, it takes no additional place.
    most = len(chosen) + FINALISTS - sum(trial in others[:FINALISTS] for trial in chosen)
    for trial in others:
        if len(chosen) < most and all(trial.decoding != other.decoding for other in chosen):
            chosen.append(trial)
    return chosen
