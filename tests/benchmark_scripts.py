"""Imports the scripts of ``benchmarks/`` as modules, for their tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def benchmark_script(name: str) -> Iterator[ModuleType]:
    """Imports a script with its folder on the path, as when it is run, and forgets the scripts afterwards."""
    own = {file.stem for file in BENCHMARKS.glob("*.py")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        try:
            yield import_module(name)
        finally:
            for each in own & sys.modules.keys():
                del sys.modules[each]
