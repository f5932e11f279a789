"""``maskgit doctor``: checks that a run can start and fits, before it asks for nodes; or what this machine has."""

from __future__ import annotations

import argparse
import json
import sys

from maskgit_pl import runs
from maskgit_pl.cli.flags import add_run_arguments, read_folder_flags, read_recipe_flags, use_flag_names
from maskgit_pl.errors import BAD_INPUT
from maskgit_pl.files import parse_size
from maskgit_pl.training.gpus import GPUS

__all__ = ["add_doctor_parser"]


def add_doctor_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "doctor",
        help="check a run before it starts: recipe, data, batch, memory, disk; or this machine",
        description="Check a run before it starts, on any machine and without training: data, ranks, recipe, batch, "
        "memory, disk, Slurm. Takes the arguments of `maskgit train`. Without a stage, check this machine. The exit "
        "code is 0 if all checks pass, else 2.",
        epilog="Example: maskgit doctor transformer --recipe paper-256 --cluster fsdp --nodes 4 --devices 8",
    )
    parser.add_argument("stage", nargs="?", choices=("tokenizer", "transformer"), help="stage of the run")
    add_run_arguments(parser)
    machines = parser.add_argument_group("machines")
    machines.add_argument("--nodes", type=int, metavar="N", help="number of nodes (default: the recipe's)")
    machines.add_argument("--devices", type=int, metavar="M", help="devices of each node (default: the recipe's)")
    machines.add_argument("--device", choices=GPUS, help="GPU whose memory is known")
    machines.add_argument(
        "--device-memory", type=_size, metavar="SIZE", help="memory of a device, such as 80GB or 24GiB"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, an object with ok, checks and figures")
    parser.set_defaults(run=_run_doctor, takes_overrides=True)


def _run_doctor(args: argparse.Namespace) -> int:
    """Prints the checks; returns 2 if one fails."""
    if args.stage is None:
        if args.recipe or args.config or args.overrides:
            raise ValueError("stage must be tokenizer or transformer for a recipe, got none; put it after `doctor`")
        found = runs.preflight()
    else:
        recipe = read_recipe_flags(args)
        with use_flag_names(args):
            machines = runs.Machines(args.nodes, args.devices, args.device, args.device_memory)
        found = runs.preflight(recipe, **read_folder_flags(args, recipe), machines=machines)
    if args.json:
        print(json.dumps(found.as_dict(), indent=1))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(found)
    else:
        print(found)
    return 0 if found.ok else BAD_INPUT


def _size(text: str) -> float:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
