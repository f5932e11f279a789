"""``maskgit doctor tokenizer|transformer``: checks that a run can start and fits, before it asks for nodes."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from maskgit_pl import runs
from maskgit_pl.checks import check_integer
from maskgit_pl.cli.flags import add_run_arguments, read_folder_flags, read_recipe_flags, use_flag_names
from maskgit_pl.errors import BAD_INPUT, is_user_error, printable
from maskgit_pl.runs.preflight_report import Check, Machines, Preflight, parse_size
from maskgit_pl.training.gpus import GPUS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from maskgit_pl.runs.preflight_report import Shares

__all__ = ["add_doctor_parser"]

_VERDICT_WIDTH, _NAME_WIDTH, _COST_WIDTH = 7, 10, 15  # of the longest: warning, pretrained, FLOPs of a step
_WORDS = {"ok": "ok", "warning": "warning", "error": "FAIL"}
_COLOURS = {"ok": "green", "warning": "yellow", "FAIL": "bold red"}


def add_doctor_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "doctor",
        help="check a run before it starts: recipe, data, batch, memory, disk, network",
        description="Check a run before it starts, on any machine and without training: recipe, data, batch, memory, "
        "disk, network, Slurm. Takes the arguments of `maskgit train`. The exit code is 0 if all checks pass, else 2.",
        epilog="Example: maskgit doctor transformer --recipe paper-256 --cluster fsdp --nodes 4 --devices 8",
    )
    parser.add_argument("stage", choices=("tokenizer", "transformer"), help="stage of the run")
    add_run_arguments(parser)
    machines = parser.add_argument_group("machines")
    machines.add_argument("--nodes", type=int, metavar="N", help="number of nodes (default: the recipe's)")
    machines.add_argument("--devices", type=int, metavar="M", help="devices of each node (default: the recipe's)")
    machines.add_argument("--device", choices=GPUS, help="GPU whose memory is known")
    machines.add_argument(
        "--device-memory", type=_size, metavar="SIZE", help="memory of a device, such as 80GB or 24GiB"
    )
    machines.add_argument(
        "--net-port", type=int, metavar="PORT", help="TCP port of rank 0 (default: MASTER_PORT, or Slurm's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, an object with ok, checks and costs")
    parser.set_defaults(run=_run_doctor, takes_overrides=True)


def _run_doctor(args: argparse.Namespace) -> int:
    """Prints each check when it is made, then the costs, then all failures; returns 2 if a check fails."""
    if args.net_port is not None:
        check_integer("--net-port", args.net_port, "[1, 65535]")
    with use_flag_names(args):
        machines = Machines(args.nodes, args.devices, args.device, args.device_memory, args.net_port)
    if args.json:
        found = _examine(args, machines, lambda check: None)
        costs = {} if found.costs is None else dict(found.costs.lines)
        print(
            json.dumps({"ok": found.ok, "checks": [asdict(check) for check in found.checks], "costs": costs}, indent=1)
        )
        return 0 if found.ok else BAD_INPUT
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)

    def on_check(check: Check) -> None:
        _print_check(console, check)
        console.file.flush()

    console.print(f"Checking a {args.stage} run; a large model can take half a minute.")
    console.file.flush()
    found = _examine(args, machines, on_check)
    if found.shares is not None:
        console.print(
            f"\nThe samples of each global batch of {found.shares.global_batch}, in micro-batches of "
            f"{found.shares.per_device}, {found.shares.micro_batches} on each rank:"
        )
        console.print(_map_of_ranks(found.shares))
    if found.costs is not None:
        _list(console, [("", *line) for line in found.costs.lines], widths=(0, _COST_WIDTH))
    if found.ok:
        console.print(f"\n{found.summary}", style="green")
        return 0
    console.print()
    for check in found.errors:
        _print_check(console, check)
    console.print(found.summary, style=_COLOURS["FAIL"])
    return BAD_INPUT


def _examine(args: argparse.Namespace, machines: Machines, on_check: Callable[[Check], None]) -> Preflight:
    try:
        recipe = read_recipe_flags(args)
    except Exception as error:
        if not is_user_error(error):
            raise
        failed = Check("recipe", "error", str(error))
        on_check(failed)
        return Preflight((failed,))
    # Imports torch and lightning, which takes seconds.
    return runs.preflight(recipe, **read_folder_flags(args, recipe), machines=machines, on_check=on_check)


def _print_check(console: Console, check: Check) -> None:
    _list(console, [(_WORDS[check.verdict], check.name, check.text)], widths=(_VERDICT_WIDTH, _NAME_WIDTH))


def _list(console: Console, rows: Sequence[tuple[str, str, str]], *, widths: tuple[int, int]) -> None:
    """Prints verdict, name and text in columns, and wraps long texts within their column."""
    from rich.text import Text

    # A log file has no width: 120 columns.
    width = console.width if console.is_terminal else 120
    verdict_width, name_width = widths
    indent = (verdict_width + 2 if verdict_width else 0) + name_width + 2
    for verdict, name, text in rows:
        # The text may contain names from untrusted files, and be empty.
        shown = " ".join(printable(line, limit=None) for line in text.split("\n"))
        lines = textwrap.wrap(shown, max(40, width - indent), break_long_words=False, break_on_hyphens=False) or [""]
        head = Text(f"{verdict:{verdict_width}}  " if verdict else "", style=_COLOURS.get(verdict, ""))
        console.print(head + Text(f"{name:{name_width}}  {lines[0]}"))
        for line in lines[1:]:
            console.print(Text(" " * indent + line))


def _map_of_ranks(shares: Shares) -> Table:
    """Returns a table of the samples that each rank reads in a step; of each node if there are many ranks."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("node", "local rank", "global rank", "samples", box=SIMPLE)
    for row in shares.rows():
        table.add_row(*row)
    return table


def _size(text: str) -> float:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
