"""Values of a form, the arguments of ``MaskGIT`` that they stand for, and the lines that repeat what the page made.

The lines read ``image.png`` and ``mask.png``, which the page offers for download. The Python line writes ``made.png``,
the command writes the folder ``images``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskgit_pl.checks import check_integer, check_number, check_seed
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.guidance import guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.errors import python_string
from maskgit_pl.schedules import MaskSchedule, mask_schedules

__all__ = [
    "OWN",
    "Call",
    "Choices",
    "FormSettings",
    "PageRequest",
    "call_edit",
    "call_outpaint",
    "call_panorama",
    "call_sample",
    "guidance_choices",
    "schedule_choices",
    "selector_choices",
]

Choices = list[tuple[str, str]]

OWN = ""
"""The choice of a form that keeps the model's own part."""


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
class Call:
    """A call of ``MaskGIT``, and the command that does the same.

    Args:
        method: Method of ``MaskGIT``.
        arguments: Its positional arguments.
        options: Its keyword arguments without ``changes``.
        command: Name of the command.
        words: Words of the command after the model.
        changes: Decoding settings that differ from the model's own.
    """

    method: str
    arguments: Sequence[object]
    options: Mapping[str, object]
    command: str
    words: Sequence[str]
    changes: Mapping[str, Any]

    def python(self, model: str) -> str:
        """Returns the line of Python; ``model`` is the argument of ``MaskGIT.from_pretrained``."""
        named = [f"{name}={_literal(value)}" for name, value in {**self.options, **self.changes}.items()]
        given = ", ".join([*map(_literal, self.arguments), *named])
        made = f"MaskGIT.from_pretrained({_literal(model)}).{self.method}({given})"
        return f'from maskgit_pl import MaskGIT; {made}[0].save("made.png")'

    def shell(self, model: str) -> str:
        """Returns the command line; ``model`` is its argument RUN."""
        flags = [word for name, value in self.changes.items() for word in (_flag(name), _flag_value(value))]
        return shlex.join(["maskgit", self.command, model, *self.words, *flags, "--images", "images"])


def call_sample(request: PageRequest, names: Sequence[str], changes: Mapping[str, Any]) -> Call:
    """Returns the call that generates an image.

    Args:
        request: Class and seed.
        names: Names of all classes.
        changes: Decoding settings that differ from the model's own.
    """
    words = ["--classes", _class_word(request.label, names), "--per-class", "1", "--seed", str(request.seed)]
    arguments = [[_class_value(request.label, names)]]
    return Call("generate", arguments, {"seed": request.seed}, "sample", words, changes)


def call_edit(task: str, request: PageRequest, names: Sequence[str], changes: Mapping[str, Any]) -> Call:
    """Returns the call that edits ``image.png`` under ``mask.png``. ``task`` is ``inpaint`` or ``edit``."""
    words = ["image.png", "--mask", "mask.png", *_edit_words(request, names)]
    arguments: list[object] = ["image.png", "mask.png"]
    options: dict[str, object] = {"seed": request.seed, "dilation": request.dilation}
    if task == "edit":
        arguments.append(_class_value(request.label, names))
        return Call("edit_class", arguments, {"variants": request.variants, **options}, task, words, changes)
    return Call("inpaint", arguments, {"classes": _class_values(request, names), **options}, task, words, changes)


def call_outpaint(
    sides: Mapping[str, int], request: PageRequest, names: Sequence[str], changes: Mapping[str, Any]
) -> Call:
    """Returns the call that extends ``image.png`` by the pixels of ``sides``."""
    added = {side: pixels for side, pixels in sides.items() if pixels}
    words = ["image.png", *(word for side, pixels in added.items() for word in (_flag(side), str(pixels)))]
    options = {**added, "classes": _class_values(request, names), "seed": request.seed, "dilation": request.dilation}
    return Call("outpaint", ["image.png"], options, "outpaint", [*words, *_edit_words(request, names)], changes)


def call_panorama(
    size: Mapping[str, int | float], request: PageRequest, names: Sequence[str], changes: Mapping[str, Any]
) -> Call:
    """Returns the call that generates a panorama; ``size`` has ``width``, ``height`` and ``overlap``."""
    options = {**size, "seed": request.seed}
    words = ["--classes", _class_word(request.label, names)]
    words += [word for name, value in options.items() for word in (_flag(name), str(value))]
    arguments = [[_class_value(request.label, names)]]
    return Call("panorama", arguments, options, "panorama", words, changes)


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


def _edit_words(request: PageRequest, names: Sequence[str]) -> list[str]:
    named = [] if request.label is None else ["--class", _class_word(request.label, names)]
    numbers = {"variants": request.variants, "seed": request.seed, "dilation": request.dilation}
    return [*named, *(word for name, value in numbers.items() for word in (_flag(name), str(value)))]


def _class_word(label: int | None, names: Sequence[str]) -> str:
    """Returns the word that names a class on the command line: its name, or its index if the name is ambiguous."""
    assert label is not None
    name = names[label]
    is_plain = name == name.strip() and name.isprintable() and "," not in name and not name.startswith("-")
    if is_plain and names.count(name) == 1 and name not in ("", "all"):
        return name
    index = str(label)
    while index in names:  # names take precedence over indices; zeros in front do not change an index
        index = f"0{index}"
    return index


def _class_value(label: int | None, names: Sequence[str]) -> str | int | None:
    """Returns the class for Python: its name, or its index if several classes have the name."""
    return names[label] if label is not None and names.count(names[label]) == 1 else label


def _class_values(request: PageRequest, names: Sequence[str]) -> list[str | int | None]:
    return [_class_value(request.label, names)] * request.variants


def _literal(value: object) -> str:
    if isinstance(value, str):
        return python_string(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flag_value(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)
