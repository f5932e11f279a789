"""The decodings of a search. Trial i depends only on (seed, i), so that a search can be resumed.

``decoding_search`` measures them. The mask schedule and the tokens of each step are free variables, too.

Source of free schedules: Ni et al. (AutoNAT), arXiv:2406.05478.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.guidance import guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.options import Spec, with_steps
from maskgit_pl.randomness import permutation, random_uniform
from maskgit_pl.schedules import mask_schedules

__all__ = ["FREE", "Search", "SearchSpace", "list_schedules"]

Search = Literal["random", "grid"]

FREE = "free"
"""The word for ``tokens_per_step`` among the mask schedules of a search: numbers that follow no schedule."""

# Arguments that are searched for every selector that has them: lower bound, upper bound, values in a grid.
_RANGES: dict[str, tuple[float, float, tuple[float, ...]]] = {
    "choice_temperature": (1.0, 20.0, (2.0, 4.5, 9.0)),
    "gamma": (1.0, 60.0, (3.0, 10.0, 30.0)),
    "eta": (0.02, 0.5, (0.1, 0.3)),
}
_POW = "pow"  # the schedule with an exponent, which is searched where it is not given
_EXPONENTS = (0.5, 4.0, (1.5, 2.5))  # from sqrt to beyond cubic, which Table 3 of the paper spans
_SPREAD = 0.7  # largest logarithm of the factor by which a free number of tokens differs from that of ``pow``


@dataclass(frozen=True)
class SearchSpace:
    """The decodings of a search: token selector, temperature, truncation, guidance, mask schedule and T.

    Args:
        baseline: Decoding of trial 0, which also gives the fields that are not searched.
        selectors: Names and mappings; the arguments in a mapping are fixed.
        num_steps: Numbers of steps to choose from.
        codebook_size: Number K of codes.
        can_guide: True if guidance has something to move away from.
        schedules: Mask schedules to choose from besides that of ``baseline``, which half of the trials keep: names and
            mappings, ``pow`` with any exponent, and ``FREE``. Empty keeps the mask schedule.
        num_tokens: N, which ``FREE`` requires.
    """

    baseline: DecodingConfig
    selectors: tuple[Spec, ...]
    num_steps: tuple[int, ...]
    codebook_size: int
    can_guide: bool
    schedules: tuple[Spec, ...] = ()
    num_tokens: int = 0

    def trial(self, number: int, *, seed: int, method: Search = "random") -> DecodingConfig | None:
        """Returns the decoding of a trial, or None beyond the end of the grid.

        Args:
            number: Index of the trial.
            seed: Seed of the search.
            method: Random draws or a grid.
        """
        if number == 0:
            return self.baseline
        return self._draw(number, seed) if method == "random" else self._draw_from_grid(number - 1, seed)

    def iter_trials(self, trials: int, *, seed: int, method: Search = "random") -> Iterator[DecodingConfig]:
        """Yields the decodings of the first ``trials`` trials, or of all trials of the grid if it has fewer."""
        for number in range(trials):
            decoding = self.trial(number, seed=seed, method=method)
            if decoding is None:
                return
            yield decoding

    def resume(
        self, begun: Iterable[DecodingConfig], *, trials: int, seed: int, method: Search = "random"
    ) -> SearchSpace:
        """Returns the space of a search that may have written its winner to ``decoding.json`` before it was stopped.

        In that case the model's own decoding is one of the trials, and trial 0 must remain the decoding that the search
        began with: otherwise all trials would differ from those in the ledger.

        Args:
            begun: Decodings of trial 0 of earlier searches of the model, the latest first.
            trials: Number of trials.
            seed: Seed of the search.
            method: Random draws or a grid.
        """
        # A space fits if it reaches the current decoding as a later trial, which that search must then have written.
        for first in begun:
            space = replace(self, baseline=first)
            later = islice(space.iter_trials(trials, seed=seed, method=method), 1, None)
            if any(decoding == self.baseline for decoding in later):
                return space
        return self

    def iter_selectors_and_steps(self) -> Iterator[DecodingConfig]:
        """Yields a decoding for each selector and number of steps, so that they can be checked before the search."""
        yield self.baseline
        for selector in self.selectors:
            for num_steps in self.num_steps:
                yield self._decoding(num_steps, selector, self.baseline.guidance, 1.0)

    def _draw(self, number: int, seed: int) -> DecodingConfig:
        # 32 uniform numbers are more than the choices of a trial use. They depend only on (seed, number).
        sampler = _TrialSampler(random_uniform("tuning", seed=seed, index=number, count=32)[0].tolist())
        selector = self._draw_selector(sampler)
        guidance = self._draw_guidance(sampler)
        top_k, top_p = _draw_truncation(sampler, self.codebook_size)
        decoding = self._decoding(
            sampler.choose(self.num_steps), selector, guidance, _draw_temperature(sampler), top_k=top_k, top_p=top_p
        )
        return self._draw_schedule(decoding, sampler, number, seed)

    def _draw_schedule(
        self, decoding: DecodingConfig, sampler: _TrialSampler, number: int, seed: int
    ) -> DecodingConfig:
        """Returns the decoding with a mask schedule, or with tokens per step, of its own; half of them keep it."""
        # The last choices of a trial: the others are those of a search without schedules.
        if not self.schedules or sampler.random() < 1 / 2:
            return decoding
        spec, exponent = sampler.choose(self.schedules), sampler.log_uniform(*_EXPONENTS[:2])
        if spec != FREE:
            return replace(decoding, mask_schedule={"name": _POW, "exponent": exponent} if spec == _POW else spec)
        assert decoding.token_selector is not None  # the model is not autoregressive
        if not token_selectors.build(decoding.token_selector).follows_schedule:  # it counts the tokens itself
            return decoding
        count = decoding.num_steps
        factors = random_uniform("tuning/tokens", seed=seed, index=number, count=count)[0].tolist()
        steps = _spread_tokens(self.num_tokens, exponent, factors)
        return replace(decoding, tokens_per_step=steps)

    def _decoding(
        self,
        num_steps: int,
        selector: Spec,
        guidance: Spec,
        temperature: float | tuple[float, float],
        *,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> DecodingConfig:
        return replace(
            with_steps(self.baseline, num_steps),
            token_selector=selector,
            guidance=guidance,
            sampling_temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def _draw_selector(self, sampler: _TrialSampler) -> Spec:
        spec = sampler.choose(self.selectors)
        drawn = {name: sampler.log_uniform(*_RANGES[name][:2]) for name in _find_free_arguments(spec)}
        return _add_arguments(spec, drawn)

    def _draw_guidance(self, sampler: _TrialSampler) -> Spec:
        name = sampler.choose(_find_scaled_schedules())
        scale, start = sampler.uniform(0.1, 3.0), sampler.uniform(0.0, 0.6)
        if not self.can_guide:
            return self.baseline.guidance
        # Every eighth trial has no guidance, which a continuous scale would never reach.
        if sampler.random() < 1 / 8:
            return {"name": "constant", "scale": 0.0}
        return {"name": name, "scale": scale, **({"start": start} if name == "interval" else {})}

    def _draw_from_grid(self, place: int, seed: int) -> DecodingConfig | None:
        """Returns an entry of the grid in random order, so that any number of trials covers it evenly."""
        grid = self._grid
        if place >= len(grid):
            return None
        return grid[int(permutation(torch.tensor([place]), len(grid), stream="tuning/grid", seed=seed))]

    @cached_property
    def _grid(self) -> list[DecodingConfig]:
        return list(self._iter_grid())

    def _iter_grid(self) -> Iterator[DecodingConfig]:
        guidance: list[Spec] = [{"name": "linear", "scale": scale} for scale in (0.0, 0.5, 1.0, 2.0)]
        # A grid has few values per part, because the number of its points is their product.
        temperatures: list[float | tuple[float, float]] = [1.0, 0.8, (1.2, 0.6)]
        for num_steps in self.num_steps:
            for selector in (spec for each in self.selectors for spec in _expand_grid(each)):
                for scales in guidance if self.can_guide else [self.baseline.guidance]:
                    for temperature in temperatures:
                        decoding = self._decoding(num_steps, selector, scales, temperature)
                        yield decoding
                        for schedule in _expand_schedules(self.schedules):
                            yield replace(decoding, mask_schedule=schedule)


class _TrialSampler:
    """The random choices of one trial, each from the next uniform number."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = iter(numbers)

    def random(self) -> float:
        return next(self._numbers)

    def choose(self, options: Sequence[Any]) -> Any:
        return options[int(self.random() * len(options))]

    def uniform(self, low: float, high: float) -> float:
        return _round(low + (high - low) * self.random())

    def log_uniform(self, low: float, high: float) -> float:
        return _round(low * (high / low) ** self.random())


def _round(value: float) -> float:
    return float(f"{value:.3g}")  # 3 digits: short in tables and on the command line


def _draw_temperature(sampler: _TrialSampler) -> float | tuple[float, float]:
    # All numbers are drawn, also those that are not used, so that later choices do not depend on this one.
    kind = sampler.choose(("one", "constant", "annealed"))
    constant, first, last = sampler.uniform(0.6, 1.3), sampler.uniform(0.8, 1.6), sampler.uniform(0.3, 1.0)
    if kind == "annealed":
        return first, last
    return constant if kind == "constant" else 1.0


def _draw_truncation(sampler: _TrialSampler, codebook_size: int) -> tuple[int | None, float | None]:
    kind = sampler.choose(("none", "none", "top_k", "top_p"))
    share, top_p = sampler.random(), sampler.uniform(0.8, 0.99)
    # Log-uniform between 4 and K, since the effect of k depends on its order of magnitude.
    top_k = round(4 * (codebook_size / 4) ** share) if codebook_size > 4 else None
    return (top_k if kind == "top_k" else None), (top_p if kind == "top_p" else None)


def _find_free_arguments(spec: Spec) -> list[str]:
    """Returns the arguments of a selector that are searched and not fixed by its mapping."""
    fixed = () if isinstance(spec, str) else spec
    selector = token_selectors.build(spec)
    return [name for name in _RANGES if name in _field_names(selector) and name not in fixed]


def _field_names(made: Any) -> set[str]:
    return {field.name for field in fields(made)} if hasattr(made, "__dataclass_fields__") else set()


def _add_arguments(spec: Spec, arguments: Mapping[str, Any]) -> Spec:
    if not arguments:
        return spec
    return {**({"name": spec} if isinstance(spec, str) else spec), **arguments}


def _expand_grid(spec: Spec) -> list[Spec]:
    specs = [spec]
    for name in _find_free_arguments(spec):
        specs = [_add_arguments(each, {name: value}) for each in specs for value in _RANGES[name][2]]
    return specs


def _find_scaled_schedules() -> list[str]:
    return [name for name, made in guidance_schedules.build_all().items() if "scale" in _field_names(made)]


def list_schedules() -> tuple[Spec, ...]:
    """Returns all mask schedules of a search: the registered ones, ``pow`` with any exponent, and ``FREE``."""
    return (*sorted({*mask_schedules.build_all(), _POW}), FREE)


def _expand_schedules(specs: Iterable[Spec]) -> Iterator[Spec]:
    """Yields the mask schedules of a grid, which has no free numbers of tokens."""
    for spec in specs:
        if spec == _POW:
            yield from ({"name": _POW, "exponent": exponent} for exponent in _EXPONENTS[2])
        elif spec != FREE:
            yield spec


def _spread_tokens(num_tokens: int, exponent: float, factors: Sequence[float]) -> tuple[int, ...]:
    """Returns numbers of tokens per step near those of the mask schedule ``pow``.

    1. Step t of T weighs ((t + 1) / T)^exponent - (t / T)^exponent, times a factor in [exp(-0.7), exp(0.7)].
    2. Each step gets one token, and its share of the others in proportion to its weight, rounded down.
    3. The tokens that are left go to the steps with the largest remainders.

    Args:
        num_tokens: N >= T.
        exponent: Exponent of the schedule.
        factors: T numbers in (0, 1), from which the factors follow.

    Returns:
        T integers >= 1 that sum to N.
    """
    count = len(factors)
    # 1.
    weights = [
        (((step + 1) / count) ** exponent - (step / count) ** exponent) * math.exp(_SPREAD * (2 * factor - 1))
        for step, factor in enumerate(factors)
    ]
    # 2.
    shares = [weight / sum(weights) * (num_tokens - count) for weight in weights]
    tokens = [1 + math.floor(share) for share in shares]
    # 3.
    by_remainder = sorted(range(count), key=lambda step: math.floor(shares[step]) - shares[step])
    for step in by_remainder[: num_tokens - sum(tokens)]:
        tokens[step] += 1
    return tuple(tokens)
