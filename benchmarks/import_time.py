"""Compares an import of ``MaskGIT`` and a ``maskgit sample`` with ``import torch``: CPU seconds, and modules loaded.

    python benchmarks/import_time.py --repeats 9

Each import runs in a fresh interpreter, in turn (A B A B). CPU seconds are those of the whole process, including all
threads and the start of the interpreter. Unlike wall time, they hardly depend on other programs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from measuring import format_table

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
_PROBE = """
import json, sys, time
{statement}
seconds = time.process_time()
print(json.dumps([seconds, sorted(sys.modules)]))
"""


@dataclass(frozen=True)
class Imported:
    """The measurements of one import.

    Args:
        seconds: CPU seconds of each fresh interpreter.
        modules: Names of all modules that are loaded after the import.
    """

    seconds: Sequence[float]
    modules: frozenset[str]

    @property
    def own(self) -> set[str]:
        """The modules of this project."""
        return {name for name in self.modules if name.partition(".")[0] == "maskgit_pl"}

    @property
    def packages(self) -> set[str]:
        """The third-party packages: top-level names outside the standard library and this project."""
        # Names with a leading underscore are C extensions or private modules of packages.
        names = {name.partition(".")[0] for name in self.modules}
        return {name for name in names if not name.startswith("_") and name not in sys.stdlib_module_names} - {
            "maskgit_pl"
        }


def measure(imports: Mapping[str, str] = IMPORTS, *, repeats: int) -> dict[str, Imported]:
    """Runs each import in fresh interpreters, in turn; the first round fills the file cache and is not counted."""
    measured: dict[str, list[tuple[float, list[str]]]] = {name: [] for name in imports}
    # As installed: with the bytecode of all modules, which round 0 writes.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for round_ in range(repeats + 1):
        for name, statement in imports.items():
            command = [sys.executable, "-c", _PROBE.format(statement=statement)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            printed = done.stdout.splitlines()[-1]
            # Round 0 reads the files from disk into the cache of the system.
            if round_ > 0:
                measured[name].append(tuple(json.loads(printed)))
    return {
        name: Imported([seconds for seconds, _ in rounds], frozenset(rounds[0][1])) for name, rounds in measured.items()
    }


def format_report(measured: Mapping[str, Imported]) -> str:
    """Returns a table: medians, ratio to the first import, and the packages that the others load in addition."""
    first = next(iter(measured.values()))
    return format_table(
        [
            {
                "import": name,
                "CPU s, median": f"{median(imported.seconds):.2f}",
                "least": f"{min(imported.seconds):.2f}",
                "ratio": f"{median(imported.seconds) / median(first.seconds):.2f}",
                "own modules": len(imported.own),
                "further packages": ", ".join(sorted(imported.packages - first.packages)) or "none",
            }
            for name, imported in measured.items()
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=9, help="fresh interpreters per import (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the CPU seconds to FILE")
    args = parser.parse_args(argv)
    measured = measure(repeats=args.repeats)
    print(f"Python {sys.version.split()[0]}, {args.repeats} fresh interpreters each")
    print(format_report(measured))
    if args.json:
        seconds = {name: list(each.seconds) for name, each in measured.items()}
        args.json.write_text(json.dumps(seconds, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
