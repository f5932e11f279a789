"""Imports gradio without the files that it writes while it is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["import_gradio"]

_MODULE, _FUNCTION = "gradio.component_meta", "create_or_modify_pyi"


def import_gradio() -> None:
    """Imports gradio, which otherwise compares the stub (``.pyi``) of each of its components with the source.

    This takes 1 of the 2.5 seconds of its import, and writes to the folder of installed packages. Only type checkers
    read the stubs. A version of gradio without the function is imported as it is.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import gradio  # noqa: F401
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds the module whose function writes the stubs, and replaces the function after the module is executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Returns the spec of the module, and None for all other modules."""
        spec = PathFinder.find_spec(name, path) if name == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_quickly(module: ModuleType) -> None:
            execute(module)
            if hasattr(module, _FUNCTION):
                setattr(module, _FUNCTION, lambda *_: None)

        spec.loader.exec_module = execute_quickly  # type: ignore[method-assign]  # of this spec only
        return spec
