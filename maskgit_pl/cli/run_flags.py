"""Flags that say which run a command is about: its recipe, and its folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypedDict

from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_files import DEFAULT_DATASET

__all__ = ["WantedFolders", "add_run_arguments", "read_folder_flags", "read_recipe_flags"]


class WantedFolders(TypedDict):
    """The folders that a command's words name, arguments of ``runs.fit`` and others."""

    run: Path
    data: Path | None
    tokenizer: Path | None
    pretrained: Path | None


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which run this is and on which data."""
    parser.add_argument("--recipe", default="", help="names of recipe files, from left to right, in one word")
    parser.add_argument("--config", type=Path, metavar="FILE", help="repeat the run of this config.yaml as --run NAME")
    parser.add_argument("--dataset", default=DEFAULT_DATASET, help=f"name of the data set (default: {DEFAULT_DATASET})")
    parser.add_argument("--data", type=Path, help="its shards (default: data/shards/DATASET)")
    parser.add_argument("--cluster", default="single", help="file of recipes/cluster (default: single)")
    parser.add_argument("--run", dest="run_name", help="name of the run folder (default: DATASET-RECIPE)")
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    parser.add_argument("--tokenizer", type=Path, help="pretrained tokenizer folder (default: the run's own)")
    parser.add_argument(
        "--pretrained", type=Path, metavar="DIR", help="pretrained folder whose weights a run begins from"
    )


def read_recipe_flags(args: argparse.Namespace) -> Recipe:
    """Reads the recipe of a run safely: its files and flags, or those of an earlier run with ``--config``.

    Raises:
        ValueError: if a file or flag is wrong.
        FileNotFoundError: if no recipe has a name.
    """
    if args.config is None:
        return Recipe.read(
            args.stage, names=args.recipe, dataset=args.dataset, cluster=args.cluster, overrides=args.overrides
        )
    if args.recipe or not args.run_name:
        raise ValueError("--config repeats a run with its recipe: leave --recipe out, and name the new run with --run")
    return Recipe.from_run(args.stage, args.config, args.overrides)


def read_folder_flags(args: argparse.Namespace, recipe: Recipe) -> WantedFolders:
    """Returns the folders that the words name; the run's default name is the recipe's."""
    run = args.runs_folder / (args.run_name or recipe.run_name)
    return WantedFolders(run=run, data=args.data, tokenizer=args.tokenizer, pretrained=args.pretrained)
