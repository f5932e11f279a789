"""The search for a better way to decode one model: a plain search, judged on held-out data, written down as it goes.

Used by ``maskgit tune``. Trial 0 is the model's own decoding; trial i is a function of (seed, i). Every measurement
goes into a ledger, and one that is there is not made again. The best trials are measured once more with fresh noise and
twice the images, the model's own decoding among them, and the best of those wins, so that luck does not.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.classifier import Classifier
from maskgit_pl.evaluation.decoders.comparison import Spec, describe, plain, same_decoding, with_steps
from maskgit_pl.evaluation.protocol import METRICS, Protocol, RealImages, measure_decoding
from maskgit_pl.files import write_atomically
from maskgit_pl.guidance import guidance_schedules
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.randomness import permutation, random_uniform
from maskgit_pl.registry import Registry, nearest
from maskgit_pl.schedules import MaskSchedule, mask_schedules
from maskgit_pl.selectors import token_selectors
from maskgit_pl.training.environment import describe_environment

__all__ = [
    "METRIC_KEYS",
    "Curves",
    "Found",
    "Ledger",
    "Meter",
    "Search",
    "SearchSpace",
    "Trial",
    "better",
    "check_search",
    "describe_decoding",
    "following",
    "key_of",
    "plot_steps",
    "schedule_curves",
    "schedule_specs",
    "search",
]

Search = Literal["random", "grid"]
Curves = dict[str, dict[int, dict[str, Any]]]

METRIC_KEYS = {"fid": "fid/classifier", "kid": "kid/classifier", "agreement": "class_agreement"}
_FORMAT, _VERSION = "maskgit_pl.trials", 1
_FINALISTS = 3
_FRESH = 1_000_000  # how far the seeds of the second measurement lie from those of the trials
_PLOT_STEPS = (2, 3, 4, 6, 8, 12, 16, 24)
# Arguments of selectors that are searched, whatever the selector: from, to, and the values of a grid.
_RANGES: dict[str, tuple[float, float, tuple[float, ...]]] = {
    "choice_temperature": (1.0, 20.0, (2.0, 4.5, 9.0)),
    "gamma": (1.0, 60.0, (3.0, 10.0, 30.0)),
    "eta": (0.02, 0.5, (0.1, 0.3)),
}
_log = logging.getLogger(__name__)


def key_of(metric: str) -> str:
    """The key of a metric in what was measured.

    Raises:
        ValueError: An unknown metric.
    """
    if metric not in METRIC_KEYS:
        raise ValueError(f"--metric {metric!r}: {nearest(metric, METRIC_KEYS)}")
    return METRIC_KEYS[metric]


def check_search(how: str) -> None:
    """Refuses an unknown search.

    Raises:
        ValueError: With the known ones.
    """
    if how not in get_args(Search):
        raise ValueError(f"--search {how!r}: {nearest(how, get_args(Search))}")


def better(key: str, value: float, other: float) -> bool:
    """Whether a value of a metric is better than another."""
    return value > other if METRICS[key] else value < other


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


def _buildable(registry: Registry[Any]) -> dict[str, Any]:
    """Everything registered that needs no argument, by name."""
    built = {}
    for name in registry.names():
        try:
            built[name] = registry.build(name)
        except TypeError:  # it has an argument without a default
            continue
    return built


def _scaled_schedules() -> list[str]:
    return [name for name, made in _buildable(guidance_schedules).items() if "scale" in _names_of_fields(made)]


class Ledger:
    """Every measurement, a line each, appended when it is made.

    Args:
        file: ``trials.jsonl``.
        protocol: What decides the numbers beside decoding, number of images and seed, in plain values.

    Raises:
        ValueError: The file is not a ledger, a line of it is none, or it has another protocol.
    """

    def __init__(self, file: Path, protocol: Mapping[str, Any]) -> None:
        self.file = file
        self._lines: list[dict[str, Any]] = []
        self._head = {"format": _FORMAT, "version": _VERSION, "protocol": json.loads(json.dumps(protocol))}
        if file.is_file():
            self._read()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append(self._head)

    def first(self) -> DecodingConfig | None:
        """The decoding that was measured first: what trial 0 was; None where there is none yet, or it is no more."""
        try:
            return DecodingConfig(**self._lines[0]["decoding"]) if self._lines else None
        except (TypeError, ValueError):
            return None

    def find(self, decoding: DecodingConfig, *, num_images: int, seed: int) -> dict[str, Any] | None:
        """What was measured of a decoding with so many images and this seed, if it was."""
        for line in self._lines:
            if (line["num_images"], line["seed"]) == (num_images, seed) and same_decoding(line["decoding"], decoding):
                return cast("dict[str, Any]", line["numbers"])
        return None

    def add(
        self, decoding: DecodingConfig, numbers: Mapping[str, Any], *, num_images: int, seed: int, purpose: str
    ) -> None:
        """Keeps a measurement, on the disk before it returns.

        Args:
            decoding: What was measured.
            numbers: What came out.
            num_images: Images of it.
            seed: Of the first.
            purpose: What it was for, for people.
        """
        line = {
            "purpose": purpose,
            "num_images": num_images,
            "seed": seed,
            "decoding": plain(decoding),
            "numbers": dict(numbers),
            "commit": describe_environment()["commit"],
        }
        self._append(line)
        self._lines.append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> None:
        text = self.file.read_text()
        whole, newline, rest = text.rpartition("\n")
        if not newline and json.dumps(self._head).startswith(rest):  # it was cut off in its first line
            self.file.unlink()
            self._append(self._head)
            return
        head, *lines = [self._parsed(line, place) for place, line in enumerate(whole.splitlines(), start=1)] or [None]
        if not isinstance(head, dict) or (head.get("format"), head.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"ledger {self.file}: not of the format {_FORMAT} {_VERSION}; name another --out")
        protocol = self._head["protocol"]
        changed = [key for key in protocol if head["protocol"].get(key) != protocol[key]]
        if changed:
            raise ValueError(
                f"ledger {self.file}: measured with another {', '.join(changed)}; name another --out, or move it away"
            )
        self._lines = lines
        if rest:
            _log.info("%s: its last line was cut off and is measured again", self.file)
            with write_atomically(self.file) as stream:
                stream.write((whole + newline).encode())

    def _parsed(self, line: str, place: int) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"ledger {self.file}: line {place} is not JSON ({error}); name another --out") from error


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
    ranked = sorted(made[1:], key=lambda trial: -trial.numbers[key] if METRICS[key] else trial.numbers[key])
    chosen = [made[0], *(trial for trial in ranked if trial.decoding == current)][:2]
    most = len(chosen) + _FINALISTS - sum(trial in ranked[:_FINALISTS] for trial in chosen)
    for trial in ranked:
        if len(chosen) < most and all(trial.decoding != other.decoding for other in chosen):
            chosen.append(trial)
    return chosen


def following(found: Found, key: str) -> Trial | None:
    """The best decoding that follows a mask schedule, for a figure of schedules; None where none does."""
    trials = sorted(found.trials, key=lambda trial: -trial.numbers[key] if METRICS[key] else trial.numbers[key])
    for trial in (found.winner, *trials):
        if token_selectors.build(trial.decoding.token_selector).follows_schedule:
            return trial
    return None


def schedule_specs(trained: MaskSchedule) -> tuple[str, dict[str, Spec | None]]:
    """The name of the schedule of the training, and each registered one that needs no argument, by name.

    None stands for the one of the training, under its ``repr`` where it is registered under no name.
    """
    built = _buildable(mask_schedules)
    own = next((name for name, schedule in built.items() if schedule == trained), repr(trained))
    return own, {name: None if name == own else name for name in sorted({*built, own})}


def plot_steps(num_tokens: int) -> tuple[int, ...]:
    """The T that schedules are drawn at: at most half as many as there are tokens."""
    return tuple(number for number in _PLOT_STEPS if number <= max(2, num_tokens // 2))


def schedule_curves(
    meter: Meter,
    decoding: DecodingConfig,
    trained: MaskSchedule,
    *,
    num_tokens: int,
    num_images: int,
    seed: int,
    on_point: Callable[[int], object] = lambda steps: None,
) -> tuple[str, Curves]:
    """Measures a decoding at several T with each registered mask schedule that needs no argument.

    Args:
        meter: Measures.
        decoding: All but T and the mask schedule.
        trained: The schedule object of the training.
        num_tokens: N.
        num_images: Images of a point.
        seed: Of the first image.
        on_point: Told the T of each point when it is measured.

    Returns:
        The name of the schedule of the training, and for each name and T what was measured.

    Source: paper, Figure 8, right: one model for each schedule there, one model decoded by each schedule here.
    """
    own_name, specs = schedule_specs(trained)
    curves: Curves = {name: {} for name in specs}
    for num_steps in plot_steps(num_tokens):
        for name, spec in specs.items():
            point = replace(with_steps(decoding, num_steps), mask_schedule=spec)
            purpose = f"mask schedule {name}, {num_steps} steps"
            curves[name][num_steps] = meter(point, num_images=num_images, seed=seed, purpose=purpose)
            on_point(num_steps)
    return own_name, curves


def describe_decoding(decoding: DecodingConfig, *, steps: bool = True) -> str:
    """A decoding in a line, without what is as usual; ``steps`` False leaves T out."""
    temperature = decoding.sampling_temperature
    annealed = isinstance(temperature, tuple)
    parts = [f"T {decoding.num_steps}"] if steps else []
    parts += [describe(decoding.token_selector), f"guidance {describe(decoding.guidance)}"]
    shown = f"{temperature[0]:g} to {temperature[1]:g}" if isinstance(temperature, tuple) else f"{temperature:g}"
    parts += [f"temperature {shown}"] if annealed or temperature != 1 else []
    for name in ("top_k", "top_p", "tokens_per_step", "mask_schedule"):
        value = getattr(decoding, name)
        parts += [] if value is None else [f"{name} {describe(value) if isinstance(value, str | dict) else value}"]
    return ", ".join(parts)
