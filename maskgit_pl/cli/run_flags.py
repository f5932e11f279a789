"""Flags of a run: its recipe and its folders. Used by ``train``, ``tokenize``, ``doctor`` and ``slurm``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypedDict

from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_files import DEFAULT_DATASET

__all__ = ["WantedFolders", "add_new_run_arguments", "add_run_arguments", "read_folder_flags", "read_recipe_flags"]


class WantedFolders(TypedDict):
    """Folders that the flags name: arguments of ``runs.fit`` and similar functions."""

    run: Path
    data: Path | None
    tokenizer: Path | None
    pretrained: Path | None


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the recipe, the data and the folders of a run."""
    add_new_run_arguments(parser)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="repeat the run of this config.yaml as a new run (--run)"
    )


def add_new_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``add_run_arguments`` without ``--config``."""
    parser.add_argument("--recipe", default="", metavar="NAME", help="recipe, or the path of its file; of several in "
                        "quotes, later ones override earlier ones: --recipe 'paper-256 log'")  # fmt: skip
    parser.add_argument(
        "--dataset", default=DEFAULT_DATASET, metavar="NAME", help=f"name of the data set (default: {DEFAULT_DATASET})"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (default: data/shards/DATASET)")
    parser.add_argument(
        "--cluster", default="single", metavar="NAME", help="machines: a file of recipes/cluster (default: %(default)s)"
    )
    parser.add_argument("--run", dest="run_name", metavar="NAME", help="name of the run (default: DATASET-RECIPE)")
    parser.add_argument(
        "--runs-folder", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="pretrained tokenizer (default: the run's own)")
    parser.add_argument(
        "--pretrained", type=Path, metavar="DIR", help="fine-tune from the weights of this pretrained folder"
    )


def read_recipe_flags(args: argparse.Namespace) -> Recipe:
    """Reads the recipe of a run from its files and flags, or with ``--config`` from an earlier run.

    Raises:
        ValueError: if a file or a flag is wrong.
        FileNotFoundError: if there is no recipe with a given name.
    """
    if args.config is None:
        return Recipe.read(
            args.stage, names=args.recipe, dataset=args.dataset, cluster=args.cluster, overrides=args.overrides
        )
    # The config.yaml holds the complete recipe of the old run; only flags may change it.
    if args.recipe or not args.run_name:
        raise ValueError(
            "--config repeats a run with its own recipe: leave out --recipe, and name the new run with --run"
        )
    return Recipe.from_run(args.stage, args.config, args.overrides)


def read_folder_flags(args: argparse.Namespace, recipe: Recipe) -> WantedFolders:
    """Returns the folders that the flags name. The recipe gives the default name of the run."""
    run = args.runs_folder / (args.run_name or recipe.run_name)
    return WantedFolders(run=run, data=args.data, tokenizer=args.tokenizer, pretrained=args.pretrained)
