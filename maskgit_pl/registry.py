"""Registries of exchangeable parts, and the lazy import of a package's public names.

A registry maps names to classes, usually frozen dataclasses: mask schedules, token selectors, guidance schedules,
quantizers, features and others. Recipes give a name (``cosine``) or a mapping (``{name: pow, exponent: 3}``). Other
packages add parts through an entry point group. Each object is checked when it is built. A broken plug-in raises a
``PluginError`` with the name of its package, and all other names stay usable.
"""

from __future__ import annotations

import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, NamedTuple, TypeVar, cast

from maskgit_pl.checks import build_dataclass, check_keys
from maskgit_pl.text import did_you_mean, printable, shorten

__all__ = [
    "PluginError",
    "Registry",
    "derives_from",
    "describe",
    "find_plugins",
    "has_create",
    "lazy_names",
    "nearest",
]

T = TypeVar("T")
_Factory = TypeVar("_Factory", bound=Callable[..., Any])

_log = logging.getLogger(__name__)


class PluginError(ValueError):
    """An error in the entry point of another package. The message names both."""


class Registry(Generic[T]):
    """A mapping from names to factories of one kind of object.

    Args:
        kind: Kind of the objects for error messages, such as ``"mask schedule"``.
        group: Entry point group of other packages' factories, such as ``"maskgit_pl.mask_schedules"``.
        check: Function of the name and a new object that raises ``ValueError`` if the object breaks its contract.
        modules: Modules that register built-in parts when they are imported, which happens at the first
            look-up. For parts whose modules import the module of the registry.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        *,
        check: Callable[[str, T], None] | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self.group = group
        self._check = check
        self._modules = modules
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[_Factory], _Factory]:
        """Returns a decorator that registers a factory named ``name``.

        A notebook may run a cell again: a factory of ``__main__`` replaces another one of it.

        Raises:
            ValueError: if the name is taken.
        """

        def decorate(factory: _Factory) -> _Factory:
            taken = self._factories.get(name)
            if taken is not None and not taken.__module__ == factory.__module__ == "__main__":
                raise ValueError(f"{self.kind} {name!r}: the name is taken by {self._factories[name]!r}")
            self._factories[name] = factory
            return factory

        return decorate

    def names(self) -> list[str]:
        """Returns all names that ``build`` accepts: those in the order of their registration, then plug-ins, sorted.

        No plug-in is loaded.
        """
        self._import_modules()
        return [*self._factories, *sorted(self._plugins())]

    def factory(self, name: str) -> Callable[..., T]:
        """Returns the factory that is registered as ``name``, without building anything.

        Raises:
            ValueError: if the name is unknown.
            PluginError: if the code of a plug-in raises an error or exits when it is imported.
        """
        self._import_modules()
        if name in self._factories:  # without reading the metadata of all installed packages
            return self._factories[name]
        announced = self._plugins().get(name)
        if announced is None:
            raise ValueError(
                f"unknown {self.kind} {shorten(name)}: {nearest(name, self.names())}; if it is a plug-in, install its "
                "package"
            )
        with self._guard(name, announced, "loaded", f"{self.kind} {shorten(name)}"):
            return self._import(announced)

    def build(self, spec: str | Mapping[str, Any], *, where: str | None = None) -> T:
        """Builds an object and checks it.

        Args:
            spec: Name, or mapping with the key ``name`` and the arguments of the factory.
            where: File and key of the arguments for error messages; None for the kind and the name.

        Raises:
            ValueError: if the spec is neither, the name is unknown or missing, an argument is unknown,
                missing, of a wrong type or out of range, or the object breaks its contract.
            PluginError: if the code of a plug-in raises an error or exits.
        """
        self._import_modules()
        name, arguments = self._parse(spec)
        announced = None if name in self._factories else self._plugins().get(name)
        factory = self.factory(name)
        where = where or f"{self.kind} {shorten(name)}"
        if announced is None:
            return self._make(name, factory, arguments, where)
        with self._guard(name, announced, "built", where):
            return self._make(name, factory, arguments, where)

    def spec(self, part: str | Mapping[str, Any] | T) -> str | dict[str, Any]:
        """Returns the name, or the mapping with name and arguments, from which ``build`` makes a part.

        Args:
            part: Name or mapping, which is returned; or an object whose class is registered.

        Raises:
            ValueError: if the class is not registered.
        """
        if isinstance(part, str):
            return part
        if isinstance(part, Mapping):
            return dict(part)
        self._import_modules()
        for name, factory in self._factories.items():
            if _needs_no_argument(factory) and factory() == part:  # also a function that makes one, such as ``linear``
                return name
        kind = type(part)
        names = [name for name, factory in self._factories.items() if factory is kind]
        place = f"{kind.__module__}:{kind.__qualname__}"
        names += [name for name, plugins in self._plugins().items() if plugins[0].point.value == place]
        if not names or not is_dataclass(part):
            raise ValueError(
                f"{self.kind} must be a name, a mapping, or an object of a registered class, got {shorten(part)}; "
                "register a class of your own by @REGISTRY.register('NAME')"
            )
        return {"name": names[0], **{field.name: getattr(part, field.name) for field in fields(part)}}

    def build_all(self) -> dict[str, T]:
        """Builds all objects that require no argument, by name. Warns of plug-ins that fail, and leaves them out."""
        built = {}
        for name in self.names():
            try:
                if _needs_no_argument(self.factory(name)):
                    built[name] = self.build(name)
            except PluginError as error:
                _warn(str(error))
        return built

    def _import_modules(self) -> None:
        """Imports the modules of the built-in parts; only the first call takes time."""
        for module in self._modules:
            import_module(module)

    def _parse(self, spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if isinstance(spec, str):
            return spec, {}
        arguments = dict(spec) if isinstance(spec, Mapping) else {}
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            rule = f"must be a name or a mapping with the key 'name' ({nearest('', self.names())})"
            raise ValueError(f"{self.kind} {rule}, got {shorten(spec)}")
        return name, arguments

    def _make(self, name: str, factory: Callable[..., T], arguments: dict[str, Any], where: str) -> T:
        part: T
        if missing := sorted(getattr(factory, "__abstractmethods__", ())):
            raise ValueError(f"{where} must define {', '.join(missing)}")
        if isinstance(factory, type) and is_dataclass(factory):
            part = cast(T, build_dataclass(factory, arguments, where))
        else:
            signature = inspect.signature(factory)
            try:
                signature.bind(**arguments)
            except TypeError as error:
                check_keys(where, arguments, known=signature.parameters)
                raise ValueError(f"{where}: {error}; given {shorten(sorted(map(str, arguments)))}") from error
            part = factory(**arguments)
        if self._check is not None:
            self._check(name, part)
        return part

    def _import(self, announced: list[_Plugin]) -> Callable[..., T]:
        if len({plugin.point.value for plugin in announced}) > 1:
            raise ValueError("two packages define this name; uninstall one of them")
        factory = announced[0].point.load()
        if not callable(factory):
            raise TypeError(f"the entry point must be a class or a function, got {shorten(factory)}")
        return factory  # type: ignore[no-any-return]  # what a package announces

    @contextmanager
    def _guard(self, name: str, announced: list[_Plugin], what: str, where: str) -> Iterator[None]:
        """Turns any error of a package's code into a ``PluginError``, and sends its output to stderr."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except KeyboardInterrupt:  # from the user
            raise
        except BaseException as error:  # includes SystemExit: a package must not end the command
            text = _one_line(error)
            is_ours = text.startswith(f"ValueError: {where}")  # an argument or the contract: the text names the part
            text = (
                text.removeprefix("ValueError: ")
                if is_ours
                else f"{self.kind} {shorten(name)} cannot be {what}: {text}"
            )
            raise PluginError(f"{text}; announced by {' and '.join(map(str, announced))}") from error

    def _plugins(self) -> dict[str, list[_Plugin]]:
        """Returns the entry points of installed packages by name, except names that are already registered."""
        plugins: dict[str, list[_Plugin]] = {}
        for plugin in find_plugins(self.group):
            name = plugin.point.name
            here = self._factories.get(name)
            if here is None:
                plugins.setdefault(name, []).append(plugin)
            # The same module means that the plug-in was imported and has registered itself.
            elif here.__module__ != plugin.point.value.partition(":")[0].strip():
                _warn(f"{self.kind} {shorten(name)}: the name is taken by {here.__module__}; announced by {plugin}")
        return plugins


def derives_from(base: type) -> Callable[[str, Any], None]:
    """Returns a check for registries whose objects must derive from a class; see ``Registry``."""

    def check(name: str, part: Any) -> None:
        if not isinstance(part, base):
            raise ValueError(f"{name!r} must derive from {base.__module__}.{base.__qualname__}, got {shorten(part)}")

    return check


def has_create(name: str, part: Any) -> None:
    """Raises a ``ValueError`` if an object has no method ``create``; for objects that need no base class."""
    if not callable(getattr(part, "create", None)):
        raise ValueError(f"{name!r} must have a method create(), got {shorten(part)}")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns a hint for an unknown name: the closest choice, then the list of all choices."""
    names = sorted(map(printable, choices))
    hint = f"{did_you_mean(name, names)} ".lstrip()
    return f"{hint}known: {', '.join(names) or 'none'}"


def describe(spec: str | Mapping[str, Any] | None) -> str:
    """Returns a short text for a spec of ``Registry.build``, such as ``remdm (eta 0.4)``."""
    if spec is None or isinstance(spec, str):
        return str(spec)
    arguments = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in spec.items()
        if key != "name"
    )
    return f"{spec.get('name')} ({arguments})" if arguments else str(spec.get("name"))


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package (PEP 562), which imports a name at its first use.

    No module of the package may have an exported name, because importing the module would replace it.

    Args:
        package: ``__name__`` of the package.
        homes: Module inside the package for each public name.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807  # the name that tracebacks show
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return __getattr__


class _Plugin(NamedTuple):
    """An entry point and the package that announces it."""

    package: str
    point: EntryPoint

    def __str__(self) -> str:
        return printable(f"package {self.package} ({self.point.value})")


def find_plugins(group: str) -> list[_Plugin]:
    """Returns the entry points of a group; none, with a warning, if a package has some that cannot be parsed."""
    try:
        return [_Plugin(point.dist.name if point.dist else "?", point) for point in entry_points(group=group)]
    except Exception as error:  # importlib defines no exception for files that it cannot parse
        _warn(f"cannot read the entry points of the installed packages: {_one_line(error)}")
        return []


def _needs_no_argument(factory: Callable[..., Any]) -> bool:
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError):  # a class of C code has no signature
        return False
    return True


@cache
def _warn(text: str) -> None:
    """Logs a warning once per process."""
    _log.warning("%s", text)


def _one_line(error: BaseException) -> str:
    return printable(" ".join("".join(traceback.format_exception_only(error)).split()), limit=300)
