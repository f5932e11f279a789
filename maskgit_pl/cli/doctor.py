"""``maskgit doctor tokenizer|transformer``: whether a run will start and fit, before nodes are asked for."""

from __future__ import annotations

import argparse
import importlib
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from maskgit_pl.cli.run_flags import add_run_arguments
from maskgit_pl.errors import BAD_INPUT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from maskgit_pl.runs.preflight_checks import Check, Examination

__all__ = ["add_parser", "run"]

_CARDS = ("a100-40", "a100-80", "h100", "h200", "l40s", "rtx4090")
_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SHOWN = 16  # ranks of the map one by one; beyond, node by node
_STATE, _NAME, _VALUE = 7, 10, 17  # letters of the longest: warning, pretrained, traffic of a step
_COLOURS = {"ok": "green", "warning": "yellow", "FAIL": "bold red"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "doctor",
        help="check a run before it is started: recipe, data, batch, memory, disk, network",
        description="Check a run before it is started, on any machine and without training: recipe, data, batch, "
        "memory, disk, network, Slurm. Takes the words of `maskgit train`. Ends with 0 if all is well, else with 2.",
        allow_abbrev=False,
    )
    parser.add_argument("stage", choices=("tokenizer", "transformer"))
    add_run_arguments(parser)
    world = parser.add_argument_group("the machines")
    world.add_argument("--nodes", type=_count, metavar="N", help="machines (default: the recipe's)")
    world.add_argument("--devices", type=_count, metavar="M", help="devices of each (default: the recipe's)")
    world.add_argument("--device", choices=_CARDS, help="a card whose memory and peak are known")
    world.add_argument("--device-memory", type=_size, metavar="SIZE", help="memory of a device, e.g. 80GB or 24GiB")
    world.add_argument("--device-flops", type=_size, metavar="RATE", help="FLOP/s that training reaches, e.g. 150T")
    world.add_argument(
        "--utilization", type=_share, default=0.4, help="share of the card's peak that training reaches (default: 0.4)"
    )
    world.add_argument(
        "--bandwidth", type=_size, metavar="RATE",
        help="bytes a second of a device within a node (default: 100G), of a node's network ports between nodes (25G)",
    )  # fmt: skip
    world.add_argument(
        "--net-port", type=_port, metavar="PORT", help="port of rank 0 (default: MASTER_PORT, or Slurm's)"
    )
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Prints each check as it is made, what follows, and again what fails; 2 if something does."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    _say(console, f"Checking a {args.stage} run; a large model can take half a minute.")
    examination = importlib.import_module("maskgit_pl.runs.preflight_checks")  # imports torch and lightning: seconds

    def on_check(check: Check) -> None:
        _list(console, [(check.state, check.name, check.text)], widths=(_STATE, _NAME))
        console.file.flush()

    found: Examination = examination.examine(args, on_check=on_check)
    if found.batch is not None:
        per_device, micro_batches = found.batch
        console.print(
            f"\nThe samples of each global batch of {found.global_batch}, in micro-batches of {per_device}, "
            f"{micro_batches} on each rank:"
        )
        console.print(_world_map(found))
    _list(console, [("", name, text) for name, text in found.values], widths=(0, _VALUE))
    if found.failures:
        console.print()
        failures = [(check.state, check.name, check.text) for check in found.failures]
        _list(console, failures, widths=(_STATE, _NAME))
        console.print(f"{len(found.failures)} of {len(found.checks)} checks fail.", style=_COLOURS["FAIL"])
        return BAD_INPUT
    console.print(
        f"\nAll {len(found.checks)} checks pass. Memory and times are calculated, not measured.", style="green"
    )
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text)
    console.file.flush()


def _list(console: Console, rows: Sequence[tuple[str, str, str]], *, widths: tuple[int, int]) -> None:
    """State, name and text side by side, in columns of these widths; long texts go on below themselves."""
    from rich.text import Text

    width = console.width if console.is_terminal else 120
    states, names = widths
    indent = (states + 2 if states else 0) + names + 2
    for state, name, text in rows:
        lines = textwrap.wrap(text, max(40, width - indent), break_long_words=False, break_on_hyphens=False)
        head = Text(f"{state:{states}}  " if states else "", style=_COLOURS.get(state, ""))
        console.print(head + Text(f"{name:{names}}  {lines[0]}"))
        for line in lines[1:]:
            console.print(Text(" " * indent + line))


def _world_map(found: Examination) -> Table:
    """Which samples of a step each rank gets: micro-batch a of rank r has slots [(a W + r) b, (a W + r + 1) b)."""
    from rich.box import SIMPLE
    from rich.table import Table

    assert found.batch is not None
    per_device, micro_batches = found.batch
    by_rank = found.ranks <= _SHOWN
    table = Table("node", "local rank", "global rank", "samples", box=SIMPLE)
    width = 1 if by_rank else found.devices
    for first in range(0, found.ranks, width):
        node, local = divmod(first, found.devices)
        slots = [
            _span((a * found.ranks + first) * per_device, width * per_device) for a in range(min(3, micro_batches))
        ]
        more = ", ..." if micro_batches > 3 else ""
        table.add_row(str(node), _span(local, width), _span(first, width), ", ".join(slots) + more)
        if first // width == _SHOWN - 1 and found.ranks // width > _SHOWN:
            table.add_row("...", "...", "...", f"and so on to rank {found.ranks - 1}")
            break
    return table


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, got {text}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"a port's number, 1 to 65535, is needed, got {text}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and at most 1 is needed, got {text}")
    return value


def _size(text: str) -> float:
    """``80GB``, ``24GiB``, ``150T``, ``4e14``."""
    found = re.fullmatch(r"([\d.]+(?:[eE][+-]?\d+)?)\s*([KMGTP]?)(i?)[bB]?", text)
    try:
        value = float(found.group(1)) if found else 0.0
    except ValueError:
        value = 0.0
    if not found or value <= 0:
        raise argparse.ArgumentTypeError(f"a size such as 80GB, 24GiB, 150T or 4e14 is needed, got {text}")
    factor = _FACTORS[found.group(2)]
    return value * (1024 ** round(len(str(int(factor))) // 3) if found.group(3) else factor)
