"""Named factories of everything that people swap: mask schedules, token selectors, guidance, quantizers, features.

A registry holds classes (usually frozen dataclasses) under a name. Recipes name them (``cosine``) or spell them out
(``{name: pow, exponent: 3}``); other packages add their own through an entry point group. Every object is checked
when it is built. A plug-in that cannot be used is refused with the name of its package, whatever it raises, and leaves
all other names usable.
"""

from __future__ import annotations

import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, distributions
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar, cast

from maskgit_pl.checks import build_dataclass, check_keys, did_you_mean, shorten
from maskgit_pl.text import printable

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])

__all__ = ["PluginError", "Registry", "describe", "nearest"]

_log = logging.getLogger(__name__)


class PluginError(ValueError):
    """An entry point of another package cannot be used; the message names both."""


class _Plugin(NamedTuple):
    """An entry point and the package that announces it."""

    package: str
    point: EntryPoint

    def __str__(self) -> str:
        return printable(f"package {self.package} ({self.point.value})")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns the sentence that helps after an unknown name: the closest choice, then all of them.

    Args:
        name: What the user wrote.
        choices: What would have been accepted.
    """
    known = sorted(map(printable, choices))
    hint = f"{did_you_mean(name, known)} ".lstrip()
    return f"{hint}known: {', '.join(known) or 'none'}"


def describe(spec: str | Mapping[str, Any] | None) -> str:
    """Returns what ``Registry.build`` takes in a few words: ``remdm (eta 0.4)``."""
    if spec is None or isinstance(spec, str):
        return str(spec)
    arguments = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "name")
    return f"{spec.get('name')} ({arguments})" if arguments else str(spec.get("name"))


class Registry(Generic[T]):
    """Factories of one kind of object, by name.

    Args:
        kind: What the objects are, in the words of an error message, e.g. ``"mask schedule"``.
        group: Entry point group in which other packages announce factories, e.g. ``"maskgit_pl.mask_schedules"``.
        check: Called with the name and each new object; raises ``ValueError`` when the object breaks its contract.
        renamed: Names that files of older versions may hold, with the names that took their place; not listed.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        *,
        check: Callable[[str, T], None] | None = None,
        renamed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.kind = kind
        self.group = group
        self._check = check
        self._renamed = renamed
        self._factories: dict[str, Callable[..., T]] = {}
        self._loaded: dict[str, Callable[..., T] | PluginError] = {}  # by the name of the entry point

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Class decorator that files a factory under ``name``.

        Raises:
            ValueError: The name is taken.
        """

        def decorate(factory: Factory) -> Factory:
            if name in self._factories:
                raise ValueError(f"{self.kind} {name!r}: the name is taken by {self._factories[name]!r}")
            self._factories[name] = factory
            return factory

        return decorate

    def names(self) -> list[str]:
        """Returns all names that ``build`` knows, sorted; those of plug-ins too, without loading them."""
        return sorted({*self._factories, *self._plugins()})

    def build(self, spec: str | Mapping[str, Any]) -> T:
        """Makes the object that a recipe names.

        Args:
            spec: A name, or a mapping with the key ``name`` and the factory's arguments.

        Raises:
            ValueError: if the spec is neither, the name is unknown or missing, an argument is unknown, missing, of
                another type or out of range, or the object breaks its contract.
            PluginError: if the name is a plug-in's and its code raises anything or exits.
        """
        name, arguments = self._parse(spec)
        name = self._renamed.get(name, name)
        plugins = {} if name in self._factories and name not in self._loaded else self._plugins()
        if name in plugins:
            factory = self._load(name, plugins[name])
            with self._guard(name, plugins[name], "built"):
                return self._make(name, factory, arguments)
        if name not in self._factories:
            raise ValueError(f"unknown {self.kind} {shorten(name)}: {nearest(name, self.names())}")
        return self._make(name, self._factories[name], arguments)

    def build_all(self) -> dict[str, T]:
        """Builds everything that needs no argument, by name; leaves plug-ins out that fail, with a warning."""
        built = {}
        plugins = self._plugins()
        for name in self.names():
            try:
                factory = self._factories[name] if name in self._factories else self._load(name, plugins[name])
                if _needs_no_argument(factory):
                    built[name] = self.build(name)
            except PluginError as error:
                _warn(str(error))
        return built

    def _parse(self, spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if isinstance(spec, str):
            return spec, {}
        if not isinstance(spec, Mapping):
            raise ValueError(f"{self.kind} must be a name or a mapping with the key 'name', got {shorten(spec)}")
        arguments = dict(spec)
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            known = nearest("", self.names())
            raise ValueError(f"{self.kind}: the mapping needs the key 'name' ({known}), got {shorten(dict(spec))}")
        return name, arguments

    def _make(self, name: str, factory: Callable[..., T], arguments: dict[str, Any]) -> T:
        where = f"{self.kind} {shorten(name)}"
        made: T
        if isinstance(factory, type) and is_dataclass(factory):
            made = cast(T, build_dataclass(factory, arguments, where))
        else:
            signature = inspect.signature(factory)
            try:
                signature.bind(**arguments)
            except TypeError as error:
                check_keys(where, arguments, known=signature.parameters)
                raise ValueError(f"{where}: {error}; given {shorten(sorted(map(str, arguments)))}") from error
            made = factory(**arguments)
        if self._check is not None:
            self._check(name, made)
        return made

    def _load(self, name: str, announced: list[_Plugin]) -> Callable[..., T]:
        """Imports the factory of an entry point, once; what failed is remembered, for Python keeps half of it."""
        if name not in self._loaded:
            try:
                with self._guard(name, announced, "loaded"):
                    self._loaded[name] = self._import(announced)
            except PluginError as error:
                self._loaded[name] = error
        loaded = self._loaded[name]
        if isinstance(loaded, PluginError):
            raise loaded
        return loaded

    def _import(self, announced: list[_Plugin]) -> Callable[..., T]:
        if len({plugin.point.value for plugin in announced}) > 1:
            raise ValueError("the name is announced twice, uninstall one package")
        factory = announced[0].point.load()
        if not callable(factory):
            raise TypeError(f"the entry point must name a class or a function, got {shorten(factory)}")
        return factory  # type: ignore[no-any-return]

    @contextmanager
    def _guard(self, name: str, announced: list[_Plugin], what: str) -> Iterator[None]:
        """Turns what a package's code raises into a ``PluginError``, and sends what it prints to stderr."""
        where = f"{self.kind} {shorten(name)}"
        try:
            with redirect_stdout(sys.stderr):
                yield
        except KeyboardInterrupt:  # of the person at the keyboard
            raise
        except BaseException as error:  # also SystemExit: no package ends a command
            text = _one_line(error)
            ours = text.startswith(f"ValueError: {where}")  # an argument or the contract: the text names it
            text = text.removeprefix("ValueError: ") if ours else f"{where} cannot be {what}: {text}"
            raise PluginError(f"{text}; announced by {' and '.join(map(str, announced))}") from error

    def _plugins(self) -> dict[str, list[_Plugin]]:
        """Returns the entry points of installed packages by name, without names that are registered here."""
        found: dict[str, list[_Plugin]] = {}
        for plugin in _find_plugins(self.group):
            name = plugin.point.name
            here = self._factories.get(name)
            if here is None or name in self._loaded:
                found.setdefault(name, []).append(plugin)
            elif here.__module__ != plugin.point.value.partition(":")[0].strip():  # else it was imported before
                _warn(f"{self.kind} {shorten(name)}: the name is taken by {here.__module__}; announced by {plugin}")
        return found


def _needs_no_argument(factory: Callable[..., Any]) -> bool:
    try:
        inspect.signature(factory).bind()
    except TypeError:
        return False
    except ValueError:  # a class of C code has no signature
        return True
    return True


def _find_plugins(group: str) -> Iterator[_Plugin]:
    """Yields the entry points of a group; of a package that is installed twice, the first on the path."""
    found: set[tuple[str, str]] = set()
    for distribution in distributions():
        try:
            if group not in (distribution.read_text("entry_points.txt") or ""):
                continue
            package = distribution.metadata["Name"] or "without a name"
            points = [point for point in distribution.entry_points if point.group == group]
        except Exception as error:  # importlib has no exception of its own for a file that cannot be parsed
            place = printable(getattr(distribution, "_path", "of a package"))
            _warn(f"{place}: the entry points cannot be read: {_one_line(error)}")
            continue
        for point in points:
            if (package, point.name) not in found:
                yield _Plugin(package, point)
            found.add((package, point.name))


@cache
def _warn(text: str) -> None:
    """Warns once in a process."""
    _log.warning("%s", text)


def _one_line(error: BaseException) -> str:
    return printable(" ".join("".join(traceback.format_exception_only(error)).split()), limit=300)
