"""``maskgit env``: versions, machine and devices, for a report of a problem."""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["add_parser", "run"]

_OPTIONAL = (
    "numpy",
    "pillow",
    "torchvision",
    "torchmetrics",
    "webdataset",
    "timm",
    "safetensors",
    "simplejpeg",
    "pyarrow",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "env",
        help="print versions, machine and devices, for a report of a problem",
        description="Print versions of maskgit_pl and its libraries, the machine, and the devices that torch finds.",
        epilog="Example: maskgit env --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints one line for each value."""
    values = _describe()
    if args.json:
        print(json.dumps(values, indent=1))
        return 0
    width = max(map(len, values)) + 2
    for name, value in values.items():
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        print(f"{name:{width}}{text}")
    return 0


def _describe() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from maskgit_pl.devices import default_device
    from maskgit_pl.provenance import describe_environment, device_name
    from maskgit_pl.runs.recipe_files import recipes_folders

    values = describe_environment()
    for name in _OPTIONAL:
        try:
            values[name] = version(name)
        except PackageNotFoundError:
            values[name] = "not installed"
    values["default device"] = device_name(torch.device(default_device()))
    values["recipes"] = list(map(str, recipes_folders()))
    return values
