"""The decodings of a search. Trial i depends only on (seed, i), so that a search can be resumed.

``decoding_search`` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.guidance import guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.decodings import Spec, with_steps
from maskgit_pl.randomness import permutation, random_uniform

__all__ = ["Search", "SearchSpace"]

Search = Literal["random", "grid"]

# Arguments that are searched for every selector that has them: lower bound, upper bound, values in a grid.
_RANGES: dict[str, tuple[float, float, tuple[float, ...]]] = {
    "choice_temperature": (1.0, 20.0, (2.0, 4.5, 9.0)),
    "gamma": (1.0, 60.0, (3.0, 10.0, 30.0)),
    "eta": (0.02, 0.5, (0.1, 0.3)),
}


@dataclass(frozen=True)
class SearchSpace:
    """The decodings of a search: token selector and its arguments, temperature, truncation, guidance and T.

    Args:
        baseline: Decoding of trial 0, which also gives the fields that are not searched.
        selectors: Names and mappings; the arguments in a mapping are fixed.
        num_steps: Numbers of steps to choose from.
        codebook_size: Number K of codes.
        can_guide: True if the model has a null class, which guidance requires.
    """

    baseline: DecodingConfig
    selectors: tuple[Spec, ...]
    num_steps: tuple[int, ...]
    codebook_size: int
    can_guide: bool

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
            if any(space.trial(number, seed=seed, method=method) == self.baseline for number in range(1, trials)):
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
        return self._decoding(
            sampler.choose(self.num_steps), selector, guidance, _draw_temperature(sampler), top_k=top_k, top_p=top_p
        )

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
        name, scale, start = (
            sampler.choose(_find_scaled_schedules()),
            sampler.uniform(0.1, 3.0),
            sampler.uniform(0.0, 0.6),
        )
        if not self.can_guide:
            return self.baseline.guidance
        # Every eighth trial has no guidance, which a continuous scale would never reach.
        if sampler.random() < 1 / 8:
            return {"name": "constant", "scale": 0.0}
        return {"name": name, "scale": scale, **({"start": start} if name == "interval" else {})}

    def _draw_from_grid(self, place: int, seed: int) -> DecodingConfig | None:
        """Returns an entry of the grid in random order, so that any number of trials covers it evenly."""
        grid = list(self._grid())
        if place >= len(grid):
            return None
        return grid[int(permutation(torch.tensor([place]), len(grid), stream="tuning/grid", seed=seed))]

    def _grid(self) -> Iterator[DecodingConfig]:
        guidance: list[Spec] = [{"name": "linear", "scale": scale} for scale in (0.0, 0.5, 1.0, 2.0)]
        # A grid has few values per part, because the number of its points is their product.
        temperatures: list[float | tuple[float, float]] = [1.0, 0.8, (1.2, 0.6)]
        for num_steps in self.num_steps:
            for selector in (spec for each in self.selectors for spec in _expand_grid(each)):
                for scales in guidance if self.can_guide else [self.baseline.guidance]:
                    for temperature in temperatures:
                        yield self._decoding(num_steps, selector, scales, temperature)


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
    kind, share, top_p = (
        sampler.choose(("none", "none", "top_k", "top_p")),
        sampler.random(),
        sampler.uniform(0.8, 0.99),
    )
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
