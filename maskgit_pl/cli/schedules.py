"""``maskgit schedules``: lists the mask schedules, with the number of known tokens after each decoding step."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.flags import check_at_least, check_outputs, make_folder, use_flag_names
from maskgit_pl.cli.tables import add_json_argument, print_rows
from maskgit_pl.runs.flag_values import parse_specs

if TYPE_CHECKING:
    from maskgit_pl.schedules import MaskSchedule

__all__ = ["add_parser", "run"]

log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "schedules",
        help="list the mask schedules",
        description="Print the number of known tokens after each decoding step, for each mask schedule.",
        epilog="Example: maskgit schedules --num-tokens 49 --schedules cosine,linear --out schedules.png",
    )
    parser.add_argument("--num-tokens", type=int, default=256, metavar="N", help="tokens per image (default: 256)")
    parser.add_argument("--num-steps", type=int, default=8, metavar="T", help="number of decoding steps (default: 8)")
    parser.add_argument(
        "--schedules",
        metavar="A,B,...",
        help="names, or mappings such as '{name: pow, exponent: 3}' (default: every schedule without arguments)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="also draw the mask ratio against progress")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table, and draws the figure of ``--out``."""
    check_at_least(args, num_tokens=1, num_steps=1)
    check_outputs(args, out=".png")
    from maskgit_pl.decoding.limits import check_num_steps

    with use_flag_names(args):
        check_num_steps(args.num_steps, args.num_tokens)
    schedules = _schedules(args.schedules)
    from maskgit_pl.evaluation.reports.schedule_figures import count_known_tokens, draw_schedules
    from maskgit_pl.files import write_atomically

    known = {
        name: count_known_tokens(schedule, num_tokens=args.num_tokens, num_steps=args.num_steps)
        for name, schedule in schedules.items()
    }
    if args.json:
        print_rows(
            [{"mask_schedule": name, "known": [*map(int, counts)]} for name, counts in known.items()], as_json=True
        )
    else:
        _print_table(known, num_tokens=args.num_tokens, num_steps=args.num_steps)
    if args.out is not None:
        make_folder(args.out.parent)
        with write_atomically(args.out) as stream:
            stream.write(draw_schedules(schedules, num_tokens=args.num_tokens))
        log.info("%s: mask ratio of %d schedules", args.out, len(schedules))
    return 0


def _print_table(known: Mapping[str, Sequence[int]], *, num_tokens: int, num_steps: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from maskgit_pl.text import printable

    table = Table(title=f"tokens known after each of {num_steps} steps, of {num_tokens}")
    table.add_column("mask schedule")
    for step in range(1, num_steps + 1):
        table.add_column(str(step), justify="right")
    for name, counts in known.items():
        # Names of plug-ins are untrusted: no markup of Rich, no control characters.
        table.add_row(escape(printable(name)), *map(str, counts))
    Console().print(table)


def _schedules(wanted: str | None) -> dict[str, MaskSchedule]:
    from maskgit_pl.registry import describe
    from maskgit_pl.schedules import mask_schedules

    if wanted is None:
        return mask_schedules.build_all()
    return {describe(spec): mask_schedules.build(spec) for spec in parse_specs("--schedules", wanted)}
