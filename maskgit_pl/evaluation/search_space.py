"""The decodings that ``tune`` chooses from, as suggestions of an Optuna trial: the choices depend on one another.

The mask schedule and the number of tokens of each step are free variables, too.

Source of free numbers of tokens: Ni et al. (AutoNAT), arXiv:2406.05478.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.guidance import guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.options import Spec, with_steps
from maskgit_pl.registry import describe
from maskgit_pl.schedules import mask_schedules

if TYPE_CHECKING:
    import optuna

__all__ = ["SearchSpace", "list_schedules"]

# Arguments that are searched for every selector that has them, on a logarithmic scale.
_ARGUMENTS = {"choice_temperature": (1.0, 20.0), "gamma": (1.0, 60.0), "eta": (0.02, 0.5)}
_EXPONENTS = (0.5, 4.0)  # of the schedule pow: from sqrt to beyond cubic, which Table 3 of the paper spans
_SPREAD = 0.7  # largest logarithm of the factor by which a free number of tokens differs from that of pow
_OWN, _POW, _FREE = "own", "pow", "free"


@dataclass(frozen=True)
class SearchSpace:
    """The decodings of a search: steps, token selector, guidance, temperature, truncation and mask schedule.

    Args:
        start: Decoding that gives the settings which are not searched.
        selectors: Token selectors: names and mappings; the arguments in a mapping are fixed.
        num_steps: Numbers of steps.
        schedules: Mask schedules besides that of ``start``: names and mappings, ``pow`` with any exponent, and
            ``free``, which is ``tokens_per_step`` near those of ``pow``. Empty keeps the mask schedule.
        codebook_size: Number K of codes.
        num_tokens: Number N of tokens.
        can_guide: True if guidance has something to move away from.

    Raises:
        ValueError: if a mask schedule is unknown, or does not accept its arguments.
    """

    start: DecodingConfig
    selectors: tuple[Spec, ...]
    num_steps: tuple[int, ...]
    schedules: tuple[Spec, ...]
    codebook_size: int
    num_tokens: int
    can_guide: bool

    def __post_init__(self) -> None:
        for spec in self.schedules:
            if spec not in (_POW, _FREE):
                mask_schedules.build(spec)

    def draw(self, trial: optuna.trial.BaseTrial) -> DecodingConfig:
        """Returns the decoding of a trial, whose sampler makes the choices."""
        num_steps = trial.suggest_categorical("num_steps", self.num_steps)
        selector = _choose(trial, "token_selector", self.selectors)
        guidance = _draw_guidance(trial) if self.can_guide else self.start.guidance
        match trial.suggest_categorical("temperature", ["one", "constant", "annealed"]):
            case "constant":
                temperature: float | tuple[float, float] = _draw(trial, "sampling_temperature", 0.6, 1.3)
            case "annealed":
                temperature = _draw(trial, "first_temperature", 0.8, 1.6), _draw(trial, "last_temperature", 0.3, 1.0)
            case _:
                temperature = 1.0
        truncation = trial.suggest_categorical("truncation", ["none", "top_k", "top_p"])
        least = min(4, self.codebook_size)
        decoding = replace(
            with_steps(self.start, num_steps),
            token_selector=_draw_arguments(trial, selector),
            guidance=guidance,
            sampling_temperature=temperature,
            top_k=trial.suggest_int("top_k", least, self.codebook_size, log=True) if truncation == "top_k" else None,
            top_p=_draw(trial, "top_p", 0.8, 0.99) if truncation == "top_p" else None,
        )
        # Other selectors count the tokens of a step themselves.
        if self.schedules and token_selectors.build(selector).follows_schedule:
            return self._draw_schedule(trial, decoding)
        return decoding

    def _draw_schedule(self, trial: optuna.trial.BaseTrial, decoding: DecodingConfig) -> DecodingConfig:
        schedule = _choose(trial, "mask_schedule", (_OWN, *self.schedules))
        if schedule == _OWN:
            return decoding
        if schedule not in (_POW, _FREE):
            return replace(decoding, mask_schedule=schedule)
        exponent = _draw(trial, "exponent", *_EXPONENTS, log=True)
        if schedule == _POW:
            return replace(decoding, mask_schedule={"name": _POW, "exponent": exponent})
        count = decoding.num_steps
        factors = [math.exp(_draw(trial, f"tokens_{step}", -_SPREAD, _SPREAD)) for step in range(count)]
        weights = np.diff(np.linspace(0, 1, count + 1) ** exponent) * factors
        return replace(decoding, tokens_per_step=_share_tokens(self.num_tokens, weights))


def _draw(trial: optuna.trial.BaseTrial, name: str, low: float, high: float, *, log: bool = False) -> float:
    """Suggests a number with 3 digits, which are short in tables and on the command line."""
    return float(f"{trial.suggest_float(name, low, high, log=log):.3g}")


def _choose(trial: optuna.trial.BaseTrial, name: str, specs: Sequence[Spec]) -> Spec:
    """Suggests one of several specs, which Optuna stores by their description."""
    described = {describe(spec): spec for spec in specs}
    return described[trial.suggest_categorical(name, list(described))]


def _draw_arguments(trial: optuna.trial.BaseTrial, spec: Spec) -> Spec:
    """Returns a selector with the arguments that are searched and not fixed by its mapping."""
    fixed = {"name": spec} if isinstance(spec, str) else spec
    selector = token_selectors.build(spec)
    drawn = {
        name: _draw(trial, name, *bounds, log=True)
        for name, bounds in _ARGUMENTS.items()
        if hasattr(selector, name) and name not in fixed
    }
    return {**fixed, **drawn} if drawn else spec


def _draw_guidance(trial: optuna.trial.BaseTrial) -> Spec:
    scaled = [name for name, schedule in guidance_schedules.build_all().items() if hasattr(schedule, "scale")]
    name = trial.suggest_categorical("guidance", ["none", *scaled])
    if name == "none":  # which a continuous scale would never reach
        return {"name": "constant", "scale": 0.0}
    guidance: dict[str, Any] = {"name": name, "scale": _draw(trial, "guidance_scale", 0.1, 3.0)}
    return {**guidance, "start": _draw(trial, "guidance_start", 0.0, 0.6)} if name == "interval" else guidance


def _share_tokens(num_tokens: int, weights: Sequence[float] | np.ndarray[Any, Any]) -> tuple[int, ...]:
    """Returns T integers >= 1 with the sum N, of which those above 1 are in proportion to T weights."""
    ends = np.cumsum(weights) / np.sum(weights) * (num_tokens - len(weights))
    return tuple(1 + int(count) for count in np.diff(np.rint(ends), prepend=0))


def list_schedules() -> tuple[Spec, ...]:
    """Returns all mask schedules of a search: the registered ones, ``pow`` with any exponent, and ``free``."""
    return (*sorted({*mask_schedules.build_all(), _POW}), _FREE)
