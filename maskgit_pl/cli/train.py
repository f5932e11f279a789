"""``maskgit train tokenizer|transformer``: trains a stage from a recipe, or resumes it from its last checkpoint."""

from __future__ import annotations

import argparse

from maskgit_pl import processes, runs
from maskgit_pl.cli.run_flags import WantedFolders, add_run_arguments, read_folder_flags, read_recipe_flags
from maskgit_pl.runs.fitting import fit
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.text import printable

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "train",
        help="train the tokenizer or the transformer from a recipe",
        description="Train a stage from a recipe, or resume it from its last checkpoint. Further flags override single "
        "recipe values, such as --trainer.max_steps 2000; --print-config lists them all.",
        epilog="Example: maskgit train transformer --recipe adaln --run fashion-mnist-adaln --trainer.max_steps 2000",
    )
    parser.add_argument("stage", choices=("tokenizer", "transformer"), help="stage to train")
    add_run_arguments(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print-config", action="store_true", help="print the complete recipe of the run and exit")
    instead.add_argument("--dry-run", action="store_true", help="check everything that is checked before training, "
                         "print what would be done, and exit; writes nothing")  # fmt: skip
    instead.add_argument("--fresh", action="store_true", help="start over: rename the stage folder of an earlier "
                         "training to STAGE.old-N")  # fmt: skip
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Trains the stage, or prints its recipe or its plan."""
    with processes.catch_stop_signals(until="exit"):
        recipe = read_recipe_flags(args)
        folders = read_folder_flags(args, recipe)
        if args.print_config:
            _print_config(recipe, folders)
        elif args.dry_run:
            for name, text in runs.dry_run(recipe, **folders).items():
                print(f"{name:11}{printable(text)}")
        else:
            fit(recipe, **folders, fresh=args.fresh)
    return 0


def _print_config(recipe: Recipe, folders: WantedFolders) -> None:
    """Prints the complete recipe; without data or tokenizer, if they are not named, only the keys that need neither."""
    missing = None
    try:
        plan = plan_run(recipe, **folders)
    except FileNotFoundError as error:
        if any(folders[name] is not None for name in ("data", "tokenizer", "pretrained")):
            raise
        missing = str(error)
    from maskgit_pl.runs.resolve import config_text, config_text_of, resolve  # lightning and torch take seconds

    if missing is None:
        print(config_text(plan), end="")
    else:
        print(f"# Keys that data and tokenizer give (paths, sizes, classes) are left out or have defaults: {missing}")
        print(config_text_of(resolve(recipe.kind, recipe.tree)), end="")
