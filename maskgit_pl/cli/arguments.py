"""The command line of a function: a parser from its signature and docstring, and the call with the user's words.

A command is an ordinary function, which Python can call too::

    def panorama(folder: Run, *, width: int, seed: int = 0, pictures: Pictures) -> None:
        '''Generates images of any width.

        A window slides over a canvas of tokens and fills it.

        Example: maskgit panorama runs/fashion-mnist-adaln --width 112

        Args:
            folder: Run folder.
            width: Width of each image in pixels.
            ...
        '''

1. A parameter before ``*`` is positional, any other is a flag, such as ``--width``. ``Args`` has its help.
2. A dataclass, or ``**settings: Unpack[Settings]`` with a TypedDict, stands for a flag for each of its fields.
3. The annotation tells how words are read: see ``_read``. ``Annotated[T, Word(...)]`` names another
   placeholder or reader, ``Annotated[Path, Output(".png")]`` a file that the command writes.
4. A parameter ``overrides`` takes the flags that the command does not have: keys of a recipe. A field of this name is
   no flag: the command sets it.

argparse only splits the command line. What is not given is not passed: a default stands once, in the signature.
"""  # noqa: D214  # the Args of the example

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, Unpack, get_args, get_origin, get_type_hints

from maskgit_pl.checks import check_choice
from maskgit_pl.files import check_writable
from maskgit_pl.runs.recipe import parse_spec
from maskgit_pl.text import shorten

_OVERRIDES = "overrides"
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME", Path: "PATH"}


@dataclass(frozen=True)
class Word:
    """The form of an argument: ``Annotated[T, Word("A,B,...", parse_specs)]``.

    Args:
        metavar: Placeholder in the help.
        parse: Function of (name, text) that returns the value; by default, the type decides.
        bare: Text that a flag without a value stands for; by default, it must have one.
    """

    metavar: str
    parse: Callable[[str, str], Any] | None = None
    bare: str | None = None


@dataclass(frozen=True)
class Output:
    """A file or folder that a command writes: ``Annotated[Path, Output(".png")]``.

    Its suffix is checked before any work, that it can be written, and that it is no other file of the command.

    Args:
        suffix: Suffix of the file; "" for a folder.
        others: Other suffixes that the file may have.
    """

    suffix: str
    others: tuple[str, ...] = ()

    @property
    def metavar(self) -> str:
        """The placeholder in the help."""
        return f"FILE{self.suffix}" if self.suffix else "DIR"


class _Argument(NamedTuple):
    """A positional argument or a flag: name, type without None, default (MISSING: required), help and form."""

    name: str
    hint: Any
    default: Any
    help: str
    form: Word | Output | None
    is_flag: bool

    @property
    def label(self) -> str:
        """The name that the user knows: ``--num-steps``, ``RUN``, or that of an argument with choices."""
        if self.is_flag:
            return flag_of(self.name)
        return self.name if get_origin(self.hint) is Literal else self.metavar

    @property
    def metavar(self) -> str:
        """The placeholder in the help."""
        if self.form is not None:
            return self.form.metavar
        if get_origin(self.hint) is Literal:
            return "|".join(map(str, get_args(self.hint)))
        if get_origin(self.hint) in (tuple, list) and not self.is_flag:
            return _METAVARS[get_args(self.hint)[0]]
        return _METAVARS.get(self.hint, "A,B,..." if _members(self.hint, tuple) else "NAME")


class _Group(NamedTuple):
    """Arguments that the function takes together: ``kind`` builds the parameter ``name`` from them, if there is one."""

    name: str | None
    kind: Callable[..., Any] | None
    arguments: list[_Argument]


def flag_of(name: str) -> str:
    """Returns the flag of a parameter, such as ``--num-steps`` for ``num_steps``."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def add_command(subparsers: Any, name: str, function: Callable[..., Any]) -> None:
    """Adds the parser of a command, which returns the words of each argument that is given.

    Args:
        subparsers: The commands of argparse.
        name: Name of the command.
        function: The command; the namespace has it as ``function``, and its parser as ``parser``.
    """
    summary, *_ = _sections(function)
    line = f"{summary[:1].lower()}{summary[1:]}".rstrip(".")  # of the list of commands
    fill_parser(subparsers.add_parser(name, help=line), function)


def fill_parser(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    """Gives a parser the texts and the arguments of a function; see ``add_command``."""
    summary, text, parser.epilog = _sections(function)
    parser.description = f"{summary} {text}".strip()
    groups = _groups(function)
    required = [argument for group in groups for argument in group.arguments if argument.default is MISSING]
    words = [f"{each.label} {each.metavar}" if each.is_flag else each.metavar for each in required]
    parser.usage = " ".join([parser.prog, *words, "[FLAGS]"])
    for group in groups:
        target = parser if group.name is None else parser.add_argument_group(group.name.replace("_", " "))
        for argument in group.arguments:
            target.add_argument(flag_of(argument.name) if argument.is_flag else argument.name, **_options(argument))
    parser.set_defaults(function=function, parser=parser)


def read_call(function: Callable[..., Any], words: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the keyword arguments with which the command line calls a command.

    Args:
        function: The command.
        words: Words by the name of the argument.
        overrides: Words that the parser does not know, for the parameter ``overrides``.
    """
    call: dict[str, Any] = {}
    values: list[tuple[_Argument, Any]] = []
    groups = _groups(function)
    for group in groups:
        read = {each.name: _read_parsed(each, words[each.name]) for each in group.arguments if each.name in words}
        values += [(argument, read.get(argument.name, argument.default)) for argument in group.arguments]
        call |= read if group.kind is None else {str(group.name): read}
    _check_outputs(values)
    for group in groups:
        if group.kind is not None:
            call[str(group.name)] = group.kind(**call[str(group.name)])
    return call | ({_OVERRIDES: list(overrides)} if takes_overrides(function) else {})


def takes_overrides(function: Callable[..., Any]) -> bool:
    """Returns True if a command takes keys of a recipe as flags."""
    return _OVERRIDES in inspect.signature(function).parameters


def _groups(function: Callable[..., Any]) -> list[_Group]:
    """Returns the arguments of a command: those of its own, then those of each dataclass or TypedDict."""
    hints, texts = get_type_hints(function, include_extras=True), _helps(function)
    plain = _Group(None, None, [])  # arguments of no group
    groups = [plain]
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if name == _OVERRIDES:
            continue
        if get_origin(hint) is Unpack:  # **name: Unpack[TypedDict]
            (kind,) = get_args(hint)
            arguments = [_argument(key, inner, None, _helps(kind)) for key, inner in _hints(kind).items()]
            groups.append(_Group(name, None, arguments))
        elif is_dataclass(hint):
            inner, helps = _hints(hint), _helps(hint)
            arguments = [  # the value of a factory is no text of the help
                _argument(
                    field.name, inner[field.name], None if callable(field.default_factory) else field.default, helps
                )
                for field in fields(hint)
                if field.name != _OVERRIDES
            ]
            groups.append(_Group(name, hint, arguments))  # type: ignore[arg-type]  # a dataclass is its constructor
        else:
            default = MISSING if parameter.default is parameter.empty else parameter.default
            is_flag = parameter.kind is parameter.KEYWORD_ONLY
            plain.arguments.append(_argument(name, hint, default, texts, is_flag=is_flag))
    return groups


def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _argument(name: str, hint: Any, default: Any, helps: Mapping[str, str], *, is_flag: bool = True) -> _Argument:
    form = None
    for member in (hint, *get_args(hint)):  # ``Annotated[...] | None`` too
        if get_origin(member) is Annotated:
            hint, (form, *_) = member.__origin__, member.__metadata__
    members = [member for member in get_args(hint) if member is not type(None)]
    if get_origin(hint) in (Union, UnionType) and len(members) == 1:
        (hint,) = members
    text = helps[name] if helps else ""  # python -OO has no docstrings
    return _Argument(name, hint, default, text, form, is_flag)


def _options(argument: _Argument) -> dict[str, Any]:
    """Returns the keyword arguments of ``add_argument``."""
    text, default = argument.help.rstrip("."), argument.default
    if "(default" not in text and default not in (MISSING, None, False, "", ()):
        text += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    options |= {"dest": argument.name} if argument.is_flag else {}
    if argument.hint is bool:
        return {**options, "action": "store_true" if default is False else argparse.BooleanOptionalAction}
    options["metavar"] = argument.metavar
    if get_origin(argument.hint) is Literal:
        options["choices"] = [str(choice) for choice in get_args(argument.hint)]
    if not argument.is_flag:
        several = get_origin(argument.hint) in (tuple, list)
        return {**options, "nargs": "*" if several else None if default is MISSING else "?"}
    if isinstance(argument.form, Word) and argument.form.bare is not None:
        options |= {"nargs": "?", "const": argument.form.bare}
    if get_origin(argument.hint) is list:
        options["action"] = "append"
    return {**options, "required": default is MISSING}


def _read_parsed(argument: _Argument, parsed: Any) -> Any:
    """Returns the value of a result of argparse: a word, a list of words, or True and False of a bare flag."""
    if isinstance(parsed, list):
        (kind, *_) = get_args(argument.hint)
        values = [_read(argument.label, word, kind, argument.form) for word in parsed]
        return values if get_origin(argument.hint) is list else tuple(values)
    return parsed if isinstance(parsed, bool) else _read(argument.label, parsed, argument.hint, argument.form)


def _read(name: str, text: str, hint: Any, form: Word | Output | None) -> Any:
    """Returns the value of a word.

    ``str | dict`` is a name or a mapping in YAML, which JSON is too, ``tuple[int, ...]`` are numbers
    separated by commas, and ``float | tuple[float, float]`` is one number or several.
    """
    if isinstance(form, Word) and form.parse is not None:
        return form.parse(name, text)
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        return choices[check_choice(name, text, choices)]
    if hint is Path:
        return Path(text)
    if hint in (int, float):
        kind = "an integer" if hint is int else "a number"
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"{name} must be {kind}, got {shorten(text)}") from None
    if _members(hint, dict):
        return parse_spec(name, text)
    if several := _members(hint, tuple):
        (kind, *_) = get_args(several[0])
        label = name if form is None else f"{name} {form.metavar}"
        values = tuple(_read(label, word, kind, None) for word in text.split(","))
        return values[0] if len(values) == 1 and hint not in several else values
    return text


def _members(hint: Any, kind: type) -> list[Any]:
    """Returns the members of a union, or the type itself, that are ``kind[...]``."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [member for member in members if get_origin(member) is kind or member is kind]


def _check_outputs(values: Iterable[tuple[_Argument, Any]]) -> None:
    """Raises a ValueError for an output that cannot be written, overwrites an input, or is named twice."""
    files = [(argument, path) for argument, path in values if isinstance(path, Path)]
    taken = {os.path.realpath(path) for argument, path in files if not isinstance(argument.form, Output)}
    for argument, path in files:
        if not isinstance(argument.form, Output):
            continue
        flag, suffix, real = argument.label, argument.form.suffix, os.path.realpath(path)
        if suffix and path.suffix.lower() not in (suffix, *argument.form.others):
            raise ValueError(f"{flag} must end in {suffix}, got {path}")
        if real in taken:
            raise ValueError(f"{flag} must not overwrite another file of the command, got {path}")
        taken.add(real)
        check_writable(flag, path, is_folder=not suffix)


def _sections(documented: Any) -> tuple[str, str, str]:
    """Returns the summary of a docstring, the text below it, and the line or lines with an example."""
    head = re.split(r"\n(?:Args|Raises|Returns):\n", _docstring(documented))[0]
    summary, *paragraphs = [" ".join(text.split()) for text in re.split(r"\n\s*\n", head.strip())]
    examples = [text for text in paragraphs if text.startswith("Example: ")]
    return summary, " ".join(text for text in paragraphs if text not in examples), " ".join(examples)


def _helps(documented: Any) -> dict[str, str]:
    """Returns the texts of ``Args`` by the name of the argument; a class has those of its bases too."""
    helps: dict[str, str] = {}
    for source in reversed(documented.__mro__ if isinstance(documented, type) else [documented]):
        _, _, section = _docstring(source).partition("\nArgs:\n")
        section = re.split(r"\n\S", section)[0]
        for entry in re.split(r"\n(?= {4}\w)", section):
            name, colon, text = entry.strip().partition(":")
            if colon:
                helps[name] = " ".join(text.split())
    return helps


def _docstring(documented: Any) -> str:
    text = documented.__dict__.get("__doc__") if isinstance(documented, type) else documented.__doc__
    return inspect.cleandoc(text or "").replace("``", "")
