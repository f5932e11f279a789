"""Public names of a package that are imported when they are first used, so that importing the package is quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package (PEP 562).

    No module may have the name of something that the package exports: importing the module would replace it.

    Args:
        package: The package's ``__name__``.
        homes: The module of each name, inside the package.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807  # the name that errors and tracebacks are to show
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return __getattr__
