"""Lazy imports: public names of a package that are imported when they are first used. Keeps ``import`` fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package (PEP 562).

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
