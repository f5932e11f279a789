"""What a search for a better way to decode draws from, and what its trial i is: a function of (seed, i)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.guidance import guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.decoders.trials import Ledger
from maskgit_pl.evaluation.decodings import Spec, with_steps
from maskgit_pl.randomness import permutation, random_uniform
from maskgit_pl.registry import nearest

__all__ = ["Search", "SearchSpace", "check_search"]

Search = Literal["random", "grid"]

# Arguments of selectors that are searched, whatever the selector: from, to, and the values of a grid.
_RANGES: dict[str, tuple[float, float, tuple[float, ...]]] = {
    "choice_temperature": (1.0, 20.0, (2.0, 4.5, 9.0)),
    "gamma": (1.0, 60.0, (3.0, 10.0, 30.0)),
    "eta": (0.02, 0.5, (0.1, 0.3)),
}


def check_search(how: str) -> None:
    """Refuses an unknown search.

    Raises:
        ValueError: With the known ones.
    """
    if how not in get_args(Search):
        raise ValueError(f"--search {how!r}: {nearest(how, get_args(Search))}")


@dataclass(frozen=True)
class SearchSpace:
    """What a search draws from: token selector and its arguments, temperature, truncation, guidance and T.

    Args:
        own: The model's own decoding: trial 0, and what is not searched.
        selectors: Names and mappings; arguments that a mapping names stay as they are.
        num_steps: T to choose from.
        num_codes: K.
        guided: Whether the model has a null class, without which there is no guidance.
    """

    own: DecodingConfig
    selectors: tuple[Spec, ...]
    num_steps: tuple[int, ...]
    num_codes: int
    guided: bool

    def trial(self, number: int, *, seed: int, how: Search = "random") -> DecodingConfig | None:
        """The decoding of a trial, a function of its number and the seed; None beyond the end of a grid."""
        if number == 0:
            return self.own
        return self._drawn(number, seed) if how == "random" else self._of_grid(number - 1, seed)

    def resumed(self, ledger: Ledger, *, trials: int, seed: int, how: Search = "random") -> SearchSpace:
        """The space of a search that goes on after it has written its recipe.

        The model's own decoding is then one of the trials, and trial 0 stays what it was when the search began.
        """
        first = ledger.first()
        if first is None:
            return self
        space = replace(self, own=first)
        written = any(space.trial(number, seed=seed, how=how) == self.own for number in range(1, trials))
        return space if written else self

    def corners(self) -> Iterator[DecodingConfig]:
        """Decodings that hold every selector and every T, for a check before any work."""
        yield self.own
        for selector in self.selectors:
            for num_steps in self.num_steps:
                yield self._decoding(num_steps, selector, self.own.guidance, 1.0)

    def _drawn(self, number: int, seed: int) -> DecodingConfig:
        chance = _Chance(random_uniform("tuning", seed=seed, index=number, count=32)[0].tolist())
        selector = self._selector(chance)
        guidance = self._guidance(chance)
        top_k, top_p = _truncation(chance, self.num_codes)
        return self._decoding(
            chance.one_of(self.num_steps), selector, guidance, _temperature(chance), top_k=top_k, top_p=top_p
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
            with_steps(self.own, num_steps),
            token_selector=selector,
            guidance=guidance,
            sampling_temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def _selector(self, chance: _Chance) -> Spec:
        spec = chance.one_of(self.selectors)
        drawn = {name: chance.log_between(*_RANGES[name][:2]) for name in _free_arguments(spec)}
        return _with(spec, drawn)

    def _guidance(self, chance: _Chance) -> Spec:
        name, scale, start = chance.one_of(_scaled_schedules()), chance.between(0.1, 3.0), chance.between(0.0, 0.6)
        if not self.guided:
            return self.own.guidance
        if chance.number() < 1 / 8:
            return {"name": "constant", "scale": 0.0}
        return {"name": name, "scale": scale, **({"start": start} if name == "interval" else {})}

    def _of_grid(self, place: int, seed: int) -> DecodingConfig | None:
        """Places of the grid in an order that any budget covers evenly."""
        grid = list(self._grid())
        if place >= len(grid):
            return None
        return grid[int(permutation(torch.tensor([place]), len(grid), stream="tuning/grid", seed=seed))]

    def _grid(self) -> Iterator[DecodingConfig]:
        guidance: list[Spec] = [{"name": "linear", "scale": scale} for scale in (0.0, 0.5, 1.0, 2.0)]
        temperatures: list[float | tuple[float, float]] = [1.0, 0.8, (1.2, 0.6)]
        for num_steps in self.num_steps:
            for selector in (spec for each in self.selectors for spec in _grid_of(each)):
                for scales in guidance if self.guided else [self.own.guidance]:
                    for temperature in temperatures:
                        yield self._decoding(num_steps, selector, scales, temperature)


class _Chance:
    """Uniform numbers of one trial, taken one after the other and turned into choices."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = iter(numbers)

    def number(self) -> float:
        return next(self._numbers)

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[int(self.number() * len(options))]

    def between(self, low: float, high: float) -> float:
        return _rounded(low + (high - low) * self.number())

    def log_between(self, low: float, high: float) -> float:
        return _rounded(low * (high / low) ** self.number())


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")  # what a person can read and write


def _temperature(chance: _Chance) -> float | tuple[float, float]:
    kind = chance.one_of(("one", "constant", "annealed"))
    constant, first, last = chance.between(0.6, 1.3), chance.between(0.8, 1.6), chance.between(0.3, 1.0)
    if kind == "annealed":
        return first, last
    return constant if kind == "constant" else 1.0


def _truncation(chance: _Chance, num_codes: int) -> tuple[int | None, float | None]:
    kind, share, top_p = chance.one_of(("none", "none", "top_k", "top_p")), chance.number(), chance.between(0.8, 0.99)
    top_k = round(4 * (num_codes / 4) ** share) if num_codes > 4 else None
    return (top_k if kind == "top_k" else None), (top_p if kind == "top_p" else None)


def _free_arguments(spec: Spec) -> list[str]:
    """The arguments of a selector that are searched and that its mapping does not fix."""
    fixed = () if isinstance(spec, str) else spec
    made = token_selectors.build(spec)
    return [name for name in _RANGES if name in _names_of_fields(made) and name not in fixed]


def _names_of_fields(made: Any) -> set[str]:
    return {field.name for field in fields(made)} if hasattr(made, "__dataclass_fields__") else set()


def _with(spec: Spec, arguments: Mapping[str, Any]) -> Spec:
    if not arguments:
        return spec
    return {**({"name": spec} if isinstance(spec, str) else spec), **arguments}


def _grid_of(spec: Spec) -> list[Spec]:
    specs = [spec]
    for name in _free_arguments(spec):
        specs = [_with(each, {name: value}) for each in specs for value in _RANGES[name][2]]
    return specs


def _scaled_schedules() -> list[str]:
    return [name for name, made in guidance_schedules.build_all().items() if "scale" in _names_of_fields(made)]
