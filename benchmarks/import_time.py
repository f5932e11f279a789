"""Compares an import of ``MaskGIT`` and a ``maskgit sample`` with ``import torch``: CPU seconds, and packages loaded.

    python benchmarks/import_time.py --repeats 9

Each import runs in a fresh interpreter. CPU seconds are those of the whole process, including all threads and the start
and the end of the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from measuring import Contender, build_parser, children_cpu_seconds, compare, start

_SAMPLE = """
from tempfile import TemporaryDirectory
from maskgit_pl.cli import main
with TemporaryDirectory() as folder:
    main(["sample", "fashion-mnist-demo", "--classes", "Bag", "--per-class", "1", "--out", f"{folder}/bag.png"])
"""
IMPORTS = {
    "import torch": "import torch",
    "MaskGIT": "from maskgit_pl import MaskGIT",
    "maskgit sample, one image": _SAMPLE,
}


def load(statement: str) -> set[str]:
    """Runs a statement in a fresh interpreter and returns the names of all modules that it loads."""
    # As installed: with the bytecode of all modules, which the first round writes.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return set(json.loads(done.stdout.splitlines()[-1]))


def list_packages(modules: set[str]) -> set[str]:
    """Returns the third-party packages: top-level names outside the standard library and this project."""
    # Names with a leading underscore are C extensions or private modules of packages.
    names = {name.partition(".")[0] for name in modules} - {"maskgit_pl"}
    return {name for name in names if not name.startswith("_") and name not in sys.stdlib_module_names}


def list_contenders() -> list[Contender]:
    """Returns the imports to measure; the first is that of torch."""
    return [Contender("start of a process", name, partial(load, statement)) for name, statement in IMPORTS.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints the table and the packages that are loaded besides those of torch."""
    arguments = start(build_parser(__doc__, repeats=9), argv)
    compare(arguments, list_contenders(), clock=children_cpu_seconds)
    of_torch, *others = (list_packages(load(statement)) for statement in IMPORTS.values())
    for name, packages in zip(list(IMPORTS)[1:], others, strict=True):
        print(f"packages besides those of torch, {name}: {', '.join(sorted(packages - of_torch)) or 'none'}")


if __name__ == "__main__":
    main()
