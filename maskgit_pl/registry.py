"""Named factories of everything that people swap: mask schedules, token selectors, guidance, quantizers, features.

A registry holds classes (usually frozen dataclasses) under a name. Recipes name them (``cosine``) or spell them out
(``{name: pow, exponent: 3}``); other packages add their own through an entry point group. Every object is checked
when it is built, so that a broken plug-in is refused by name before time is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from maskgit_pl.checks import did_you_mean

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])

__all__ = ["Registry", "describe", "nearest"]


def nearest(name: str, choices: Iterable[str]) -> str:
    """The sentence that helps after an unknown name: the closest choice, then all of them.

    Args:
        name: What the user wrote.
        choices: What would have been accepted.
    """
    known = sorted(choices)
    hint = f"{did_you_mean(name, known)} ".lstrip()
    return f"{hint}known: {', '.join(known) or 'none'}"


def describe(spec: str | Mapping[str, Any] | None) -> str:
    """What ``Registry.build`` takes, in a few words: ``remdm (eta 0.4)``."""
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
    """

    def __init__(self, kind: str, group: str, *, check: Callable[[str, T], None] | None = None) -> None:
        self.kind = kind
        self.group = group
        self._check = check
        self._factories: dict[str, Callable[..., T]] = {}

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
        """All names that ``build`` knows, entry points of installed packages included, sorted."""
        return sorted({*self._factories, *self._entry_points()})

    def build(self, spec: str | Mapping[str, Any]) -> T:
        """Makes the object that a recipe names.

        Args:
            spec: A name, or a mapping with the key ``name`` and the factory's arguments.

        Raises:
            TypeError: The spec is neither, or the factory does not take these arguments.
            ValueError: Unknown name, missing ``name``, a value that the factory refuses, or a broken contract.
        """
        name, arguments = self._parse(spec)
        factory = self._factory(name)
        try:
            made = factory(**arguments)
        except TypeError as error:
            raise TypeError(f"{self.kind} {name!r}: {error}; given {sorted(arguments)}") from error
        if self._check is not None:
            self._check(name, made)
        return made

    def build_all(self) -> dict[str, T]:
        """Everything that needs no argument, by name."""
        built = {}
        for name in self.names():
            try:
                built[name] = self.build(name)
            except TypeError:  # it has an argument without a default
                continue
        return built

    def _parse(self, spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if isinstance(spec, str):
            return spec, {}
        if not isinstance(spec, Mapping):
            raise TypeError(f"{self.kind}: a name or a mapping with a name is needed, got {type(spec).__name__}")
        arguments = dict(spec)
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(
                f"{self.kind}: the mapping needs the key 'name' ({nearest('', self.names())}), got {dict(spec)}"
            )
        return name, arguments

    def _factory(self, name: str) -> Callable[..., T]:
        if name in self._factories:
            return self._factories[name]
        found = self._entry_points().get(name)
        if found is None:
            raise ValueError(f"unknown {self.kind} {name!r}: {nearest(name, self.names())}")
        factory: Callable[..., T] = found.load()
        return self._factories.setdefault(name, factory)

    def _entry_points(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            other = found.get(point.name)
            if other is not None and other.value != point.value:
                raise ValueError(
                    f"{self.kind} {point.name!r}: announced twice, by {other.value} and {point.value}; uninstall one"
                )
            found[point.name] = point
        return found
