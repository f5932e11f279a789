"""``maskgit ablation``: trains a model for every mask schedule of the paper, then writes Table 3 and Figure 8."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from maskgit_pl.cli.measuring import step_numbers
from maskgit_pl.cli.model import device_of
from maskgit_pl.cli.paper import add_measuring_arguments, measured_schedules, opened, write_schedules
from maskgit_pl.errors import PreemptedError
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_files import DEFAULT_DATASET

__all__ = ["add_parser", "run"]

_SCHEDULES = "exp,cubic,square,cosine,linear,sqrt,log"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "ablation",
        help="train a model for every mask schedule, then Table 3 and Figure 8",
        description="Train a transformer for every mask schedule of the paper's Table 3 under the same budget, decode "
        "each at several T, and write Table 3 and Figure 8. What is trained or measured already is not done again. "
        "Further flags set single values of the recipes, e.g. --trainer.max_steps 2000.",
        allow_abbrev=False,
    )
    add_measuring_arguments(parser)
    parser.add_argument("--schedules", default=_SCHEDULES, metavar="A,B,...",
                        help=f"recipes, one for each schedule (default: {_SCHEDULES})")  # fmt: skip
    parser.add_argument("--recipe", default="", help="recipes that stand before the schedule's, in one word")
    parser.add_argument("--dataset", default=DEFAULT_DATASET, help=f"name of the data set (default: {DEFAULT_DATASET})")
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"), metavar="DIR", help="(default: runs)")
    parser.add_argument("--cluster", default="cpu", help="file of recipes/cluster (default: cpu)")
    parser.add_argument("--tokenizer", type=Path, help="pretrained tokenizer folder (default: the data set's only one)")
    parser.add_argument("--num-steps", metavar="T,...", help="(default: 2,3,4,6,8,12,16,24, up to N/2)")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Trains what is missing, measures what is missing, and writes.

    Raises:
        FileNotFoundError: No such recipe, data or tokenizer.
        ValueError: As of ``maskgit table``; or a training that failed.
    """
    schedules = [name.strip() for name in args.schedules.split(",") if name.strip()]
    numbers = None if args.num_steps is None else step_numbers(args.num_steps)
    if args.device is not None:  # before the first hour is spent, like the recipes
        device_of(args)
    for name in schedules:
        names = [*args.recipe.split(), name]
        Recipe.read("transformer", names=names, dataset=args.dataset, cluster=args.cluster, overrides=args.overrides)
    args.runs = [_train(name, place, len(schedules), args) for place, name in enumerate(schedules)]
    with opened(args) as made:
        write_schedules(made, measured_schedules(made, args, numbers), args, _command(args))
    return 0


def _train(schedule: str, place: int, count: int, args: argparse.Namespace) -> Path:
    """Trains a schedule's run, in a process of its own; a finished one says so at once.

    Raises:
        ValueError: It failed; it has said why.
        PreemptedError: It was asked to stop.
    """
    recipe = " ".join([*args.recipe.split(), schedule])
    name = "-".join([args.dataset, *recipe.split()])
    words = ["--recipe", recipe, "--dataset", args.dataset, "--run", name, "--runs", str(args.runs_folder)]
    words += [] if args.data is None else ["--data", str(args.data)]
    words += [] if args.tokenizer is None else ["--tokenizer", str(args.tokenizer)]
    print(f"ablation: {schedule}, {place + 1} of {count}", flush=True)
    maskgit = [sys.executable, "-m", "maskgit_pl"]
    train = ["train", "transformer", *words, "--cluster", args.cluster, *args.overrides]
    for command in (["tokenize", *words], train):
        code = subprocess.run([*maskgit, *command], check=False).returncode
        if code == PreemptedError.exit_code:
            raise PreemptedError(f"ablation {schedule}: asked to stop by a signal; the same command goes on from there")
        if code != 0:
            raise ValueError(f"ablation {schedule}: `maskgit {command[0]}` ended with {code}; the same command goes on")
    return Path(args.runs_folder) / name


def _command(args: argparse.Namespace) -> str:
    """What makes the same ablation again."""
    words = ["maskgit ablation", f"--dataset {args.dataset}"]
    words += [] if args.schedules == _SCHEDULES else [f"--schedules {args.schedules}"]
    words += [f"--recipe '{args.recipe}'"] if args.recipe else []
    words += [f"--num-samples {args.num_samples}"]
    words += [] if args.num_steps is None else [f"--num-steps {args.num_steps}"]
    return " ".join([*words, *args.overrides])
