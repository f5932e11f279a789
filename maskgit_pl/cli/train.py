"""``maskgit train tokenizer|transformer``: trains a stage from a recipe, or resumes it from its last checkpoint."""

from __future__ import annotations

import argparse

from maskgit_pl import interruption
from maskgit_pl.cli.run_flags import add_run_arguments, read_folder_flags, read_recipe_flags
from maskgit_pl.runs.fitting import fit
from maskgit_pl.runs.plan import plan_run

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "train",
        help="train the tokenizer or the transformer from a recipe",
        description="Train a stage from a recipe, or resume it from its last checkpoint. Further flags override single "
        "recipe values, such as --trainer.max_steps 2000; --print-config lists them all.",
        epilog="Example: maskgit train transformer --recipe cosine --run fashion-mnist-adaln --trainer.max_steps 2000",
    )
    parser.add_argument("stage", choices=("tokenizer", "transformer"), help="stage to train")
    add_run_arguments(parser)
    parser.add_argument("--print-config", action="store_true", help="print the complete recipe of the run and exit")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Trains the stage, or prints its recipe."""
    with interruption.catch_stop_signals(until="exit"):
        recipe = read_recipe_flags(args)
        folders = read_folder_flags(args, recipe)
        if args.print_config:
            plan = plan_run(recipe, **folders)
            from maskgit_pl.runs.resolve import config_text  # lightning and torch take seconds to import

            print(config_text(plan), end="")
        else:
            fit(recipe, **folders)
    return 0
