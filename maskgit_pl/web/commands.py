"""The Python line and the command line that repeat what the page made.

They read ``image.png`` and ``mask.png``, which the page offers for download. The Python line writes ``made.png``, the
command writes the folder ``images``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskgit_pl.text import python_string
from maskgit_pl.web.settings import PageRequest

__all__ = ["Call", "call_edit", "call_outpaint", "call_panorama", "call_sample"]


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
