"""``maskgit compare``: measures every token selector on one model with the same noise."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.evaluation_flags import add_measured_run_arguments, read_measuring_flags, read_num_steps_flag
from maskgit_pl.cli.flags import FOLDER, check_at_least, check_outputs, use_flag_names
from maskgit_pl.progress import progress_bars
from maskgit_pl.runs.flag_values import parse_spec, parse_specs

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "compare",
        help="measure every token selector on one model",
        description="Measure token selectors at several numbers of steps, with the same noise for all, and write "
        "comparison.md, comparison.csv and a sheet of images. Measurements that the ledger holds are reused.",
        epilog="Example: maskgit compare runs/fashion-mnist-adaln --selectors confidence,halton --num-steps 4,8",
    )
    add_measured_run_arguments(parser)
    parser.add_argument(
        "--selectors",
        default="all",
        metavar="A,B,...",
        help="names, or mappings such as '{name: remdm, eta: 0.4}' (default: all, remdm with each strategy); a name "
        "uses the model's own choice temperature",
    )
    parser.add_argument(
        "--num-steps",
        metavar="T,...",
        help="numbers of decoding steps, or a range such as 4-16 (default: 4,8,16,32, at most the tokens per image)",
    )
    parser.add_argument(
        "--num-images", type=int, default=1000, metavar="N", help="images generated for each row (default: 1000)"
    )
    guidance = parser.add_mutually_exclusive_group()
    guidance.add_argument(
        "--guidance", metavar="NAME", help="name or mapping of a guidance schedule (default: the model's own)"
    )
    guidance.add_argument("--guidance-scale", type=float, metavar="X", help="scale of the model's guidance schedule")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the pages and the ledger (default: RUN/comparison, and the ledger of RUN/evaluation)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures what the ledger does not hold, writes the pages, and prints a table."""
    check_at_least(args, num_images=1, batch_size=1)
    check_outputs(args, out=FOLDER)
    # Flags are parsed before torch is imported; the library checks the names of selectors and schedules.
    numbers = read_num_steps_flag(args)
    selectors = None if args.selectors == "all" else parse_specs("--selectors", args.selectors)
    guidance = args.guidance_scale if args.guidance is None else parse_spec("--guidance", args.guidance)
    from maskgit_pl.evaluation import ComparisonOptions, compare

    with use_flag_names(args), progress_bars() as bars:
        made = compare(
            args.folder,
            data=args.data,
            selectors=selectors,
            num_steps=numbers,
            num_images=args.num_images,
            out=args.out,
            options=ComparisonOptions(**read_measuring_flags(args), guidance=guidance),
            bars=bars,
        )
    from rich.console import Console

    Console().print(made.table())
    known = len(made.results) - made.num_measured
    print(f"{made.folder}: measured {made.num_measured} rows, reused {known}; comparison.md, .csv and selectors.png")
    return 0
