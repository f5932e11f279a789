"""``maskgit schedules``: lists the mask schedules, with the number of known tokens after each decoding step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.flags import check_at_least, check_outputs, make_folder, use_flag_names
from maskgit_pl.flag_values import parse_specs

if TYPE_CHECKING:
    from maskgit_pl.schedules import MaskSchedule

__all__ = ["add_parser", "run"]


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table, and draws the figure of ``--out``."""
    check_at_least(args, num_tokens=1, num_steps=1)
    check_outputs(args, out=".png")
    from maskgit_pl.decoding.limits import check_num_steps

    with use_flag_names(args):
        check_num_steps(args.num_steps, args.num_tokens)
    schedules = _schedules(args.schedules)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from maskgit_pl.evaluation.reports.schedule_figures import count_known_tokens, draw_schedules
    from maskgit_pl.files import write_atomically
    from maskgit_pl.text import printable

    table = Table(title=f"tokens known after each of {args.num_steps} steps, of {args.num_tokens}")
    table.add_column("mask schedule")
    for step in range(1, args.num_steps + 1):
        table.add_column(str(step), justify="right")
    for name, schedule in schedules.items():
        known = count_known_tokens(schedule, num_tokens=args.num_tokens, num_steps=args.num_steps)
        # Names of plug-ins are untrusted: no markup of Rich, no control characters.
        table.add_row(escape(printable(name)), *map(str, known))
    Console().print(table)
    if args.out is not None:
        make_folder(args.out.parent)
        with write_atomically(args.out) as stream:
            stream.write(draw_schedules(schedules, num_tokens=args.num_tokens))
        print(f"{args.out}: mask ratio of {len(schedules)} schedules")
    return 0


def _schedules(wanted: str | None) -> dict[str, MaskSchedule]:
    from maskgit_pl.registry import describe
    from maskgit_pl.schedules import mask_schedules

    if wanted is None:
        return mask_schedules.build_all()
    return {describe(spec): mask_schedules.build(spec) for spec in parse_specs("--schedules", wanted)}
