"""The decoding settings of a form, and the keyword arguments of ``MaskGIT.generate`` that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskgit_pl.checks import check_integer, check_number, check_seed
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.guidance import guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.schedules import MaskSchedule, mask_schedules

__all__ = ["OWN", "Choices", "FormSettings", "PageRequest", "guidance_choices", "schedule_choices", "selector_choices"]

OWN = ""
"""The choice of a form that keeps the model's own part."""

Choices = list[tuple[str, str]]


def selector_choices(own: DecodingConfig) -> Choices:
    """Returns the label and the value of each token selector of a form, the model's own first."""
    return _choices(_name(own.token_selector), token_selectors.build_all())


def guidance_choices(own: DecodingConfig) -> Choices:
    """Returns the label and the value of each guidance schedule of a form, the model's own first."""
    return _choices(_name(own.guidance), guidance_schedules.build_all())


def schedule_choices(own: DecodingConfig, trained: MaskSchedule) -> Choices:
    """Returns the label and the value of each mask schedule of a form, the model's own first.

    Args:
        own: The model's own settings.
        trained: Mask schedule of the training, which settings without a schedule use.
    """
    built = mask_schedules.build_all()
    name = next((name for name, schedule in built.items() if schedule == trained), type(trained).__name__)
    return _choices(name if own.mask_schedule is None else _name(own.mask_schedule), built)


@dataclass(frozen=True)
class FormSettings:
    """Values of the decoding fields of a form.

    Args:
        token_selector: Registered name; ``OWN`` keeps the model's own selector.
        mask_schedule: Registered name; ``OWN`` keeps the model's own schedule.
        num_steps: T.
        first_temperature: Sampling temperature of the first step, >= 0.
        last_temperature: Sampling temperature of the last step, >= 0.
        choice_temperature: Scale of the noise on the confidence, >= 0. Selectors without it ignore it.
        guidance: Registered name; ``OWN`` keeps the model's own guidance schedule.
        guidance_scale: Scale of the guidance schedule, >= 0.

    Raises:
        ValueError: if a field is empty or out of range.
    """

    token_selector: str
    mask_schedule: str
    num_steps: int
    first_temperature: float
    last_temperature: float
    choice_temperature: float
    guidance: str
    guidance_scale: float

    def __post_init__(self) -> None:
        # An empty number field of the page arrives as None.
        check_integer("num_steps", self.num_steps, "[1, 65536]")
        for name in ("first_temperature", "last_temperature", "choice_temperature"):
            check_number(name, getattr(self, name), "[0, inf)")
        check_number("guidance_scale", self.guidance_scale, "[0, 10000]")

    @classmethod
    def of(cls, own: DecodingConfig) -> FormSettings:
        """Returns the values with which a form shows the model's own settings."""
        temperature = own.sampling_temperature
        first, last = temperature if isinstance(temperature, tuple) else (temperature, temperature)
        return cls(OWN, OWN, own.num_steps, float(first), float(last), _choice_temperature(own), OWN, _scale(own))

    def changes(self, own: DecodingConfig) -> dict[str, Any]:
        """Returns the settings that differ from the model's own, as keyword arguments of ``MaskGIT.generate``.

        Args:
            own: The model's own settings.

        Raises:
            ValueError: if a name is unknown.
        """
        given: dict[str, Any] = {}
        if self.num_steps != own.num_steps:
            given["num_steps"] = self.num_steps
        given |= {name: getattr(self, name) for name in ("token_selector", "mask_schedule") if getattr(self, name)}
        # The number belongs to the selector: others do not take it.
        if _takes_noise(self.token_selector or own.token_selector):
            default = _choice_temperature(own) if self.token_selector == OWN else None
            given |= {} if self.choice_temperature == default else {"choice_temperature": self.choice_temperature}
        temperatures = (self.first_temperature, self.last_temperature)
        if temperatures != (FormSettings.of(own).first_temperature, FormSettings.of(own).last_temperature):
            is_constant = temperatures[0] == temperatures[1]
            given["sampling_temperature"] = temperatures[0] if is_constant else temperatures
        if self.guidance != OWN:
            given["guidance"] = self.guidance
        if self.guidance != OWN or self.guidance_scale != _scale(own):
            given["guidance_scale"] = self.guidance_scale
        return given


@dataclass(frozen=True)
class PageRequest:
    """The class, the seed and the settings that a form asks for.

    Args:
        label: Index of the class; None for "no class".
        seed: Seed of the first result, in [0, 2**32).
        form: Decoding settings.
        variants: Number of results, in [1, 8].
        dilation: Number of tokens by which an edited region grows on each side, in [0, 8].

    Raises:
        ValueError: if a field is empty or out of range.
    """

    label: int | None
    seed: int
    form: FormSettings
    variants: int = 1
    dilation: int = 0

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_integer("variants", self.variants, "[1, 8]")
        check_integer("dilation", self.dilation, "[0, 8]")


def _choices(own: str | None, built: Mapping[str, object]) -> Choices:
    return [(f"{own} (as the model)", OWN), *((name, name) for name in built)]


def _name(spec: str | Mapping[str, Any] | None) -> str | None:
    return str(spec["name"]) if isinstance(spec, Mapping) else spec


def _takes_noise(selector: str | dict[str, Any] | None) -> bool:
    return selector is not None and hasattr(token_selectors.build(selector), "choice_temperature")


def _choice_temperature(own: DecodingConfig) -> float:
    selector = None if own.token_selector is None else token_selectors.build(own.token_selector)
    return float(getattr(selector, "choice_temperature", 4.5))


def _scale(own: DecodingConfig) -> float:
    return float(getattr(guidance_schedules.build(own.guidance), "scale", 0.0))
