"""``maskgit ablation``: trains a transformer with each mask schedule of the paper, and writes Table 3 and Figure 8."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from maskgit_pl.cli.evaluation_flags import add_report_arguments, read_num_steps_flag, read_report_flags, write_page
from maskgit_pl.cli.flags import read_device_flag, use_flag_names
from maskgit_pl.evaluation import reports
from maskgit_pl.evaluation.pages import command_line
from maskgit_pl.progress import progress_bars
from maskgit_pl.runs.recipe_files import DEFAULT_DATASET
from maskgit_pl.runs.schedule_runs import PAPER_SCHEDULES, train_schedules

__all__ = ["add_parser", "run"]

_SCHEDULES = ",".join(PAPER_SCHEDULES)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "ablation",
        help="train a transformer with each mask schedule; write Table 3 and Figure 8",
        description="Train a transformer with each mask schedule of Table 3 on the same budget, decode each "
        "at several numbers of steps T, and write Table 3 and Figure 8. Finished runs and recorded measurements are "
        "reused. Further flags override single recipe values, such as --trainer.max_steps 2000.",
    )
    add_report_arguments(parser)
    parser.add_argument("--schedules", default=_SCHEDULES, metavar="A,B,...",
                        help=f"recipes to train, one for each mask schedule (default: {_SCHEDULES})")  # fmt: skip
    parser.add_argument("--recipe", default="", metavar="NAME", help="recipes that the schedule's recipe overrides; "
                        "several in quotes")  # fmt: skip
    parser.add_argument(
        "--dataset", default=DEFAULT_DATASET, metavar="NAME", help=f"name of the data set (default: {DEFAULT_DATASET})"
    )
    parser.add_argument(
        "--runs-folder", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    parser.add_argument(
        "--cluster", default="single", metavar="NAME", help="machines: a file of recipes/cluster (default: single)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="pretrained tokenizer (default: the only one of the data set)"
    )
    parser.add_argument(
        "--num-steps",
        metavar="T,...",
        help="numbers of decoding steps (default: 2,3,4,6,8,12,16,24, at most half the tokens)",
    )
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Trains and measures what is missing, then writes the pages."""
    steps, options = read_num_steps_flag(args), read_report_flags(args)
    if args.device is not None:  # checked before hours of training, like the recipes
        read_device_flag(args)
    runs = train_schedules(
        [name.strip() for name in args.schedules.split(",") if name.strip()],
        names=args.recipe,
        dataset=args.dataset,
        cluster=args.cluster,
        overrides=args.overrides,
        runs=args.runs_folder,
        data=args.data,
        tokenizer=args.tokenizer,
    )
    with use_flag_names(args), progress_bars() as bars:
        page = reports.table_3(runs, options, num_steps=steps, command=_command(args), bars=bars)
    write_page(page)
    return 0


def _command(args: argparse.Namespace) -> str:
    """Returns the command that repeats this ablation, for the page."""
    flags = {
        "dataset": args.dataset,
        "schedules": None if args.schedules == _SCHEDULES else args.schedules,
        "recipe": args.recipe or None,
        "num_images": args.num_images,
        "num_steps": args.num_steps,
    }
    return " ".join([command_line(["maskgit ablation"], flags), shlex.join(args.overrides)]).rstrip()
