"""``maskgit train tokenizer|transformer``: trains a stage by recipe, or goes on where the last run stopped."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from maskgit_pl import interruption
from maskgit_pl.cli.recipes import DEFAULT_DATASET, Layer, Plan, Recipe, read_run_config, read_yaml, recipe_files

__all__ = [
    "add_parser",
    "add_run_arguments",
    "find_pretrained",
    "find_recipe",
    "find_shards",
    "find_tokenizer",
    "plan_run",
    "run",
    "run_folder",
]

_SHARDS = Path("data/shards")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "train",
        help="train a stage by recipe",
        description="Train a stage by recipe. Further flags set single values, e.g. --trainer.max_steps 2000.",
        allow_abbrev=False,
    )
    parser.add_argument("stage", choices=("tokenizer", "transformer"))
    add_run_arguments(parser)
    parser.set_defaults(run=run, takes_overrides=True)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which run this is and on which data."""
    parser.add_argument("--recipe", default="", help="names of recipe files, from left to right, in one word")
    parser.add_argument("--config", type=Path, metavar="FILE", help="repeat the run of this config.yaml as --run NAME")
    parser.add_argument("--dataset", default=DEFAULT_DATASET, help=f"name of the data set (default: {DEFAULT_DATASET})")
    parser.add_argument("--data", type=Path, help="its shards (default: data/shards/DATASET)")
    parser.add_argument("--cluster", default="cpu", help="file of recipes/cluster (default: cpu)")
    parser.add_argument("--run", dest="run_name", help="name of the run folder (default: DATASET-RECIPE)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    parser.add_argument("--tokenizer", type=Path, help="pretrained tokenizer folder (default: the run's own)")
    parser.add_argument(
        "--pretrained", type=Path, metavar="DIR", help="pretrained folder whose weights a run begins from"
    )


def run(args: argparse.Namespace) -> int:
    """Checks what needs no torch, then trains."""
    with interruption.listening():
        plan = plan_run(args)
        from maskgit_pl.cli.fit import fit  # lightning and torch take seconds to import

        return fit(plan)


def plan_run(args: argparse.Namespace) -> Plan:
    """Finds what a command's words name, checked as far as it can be without torch.

    Args:
        args: With ``stage``, those of ``add_run_arguments``, ``cluster`` and ``overrides``.

    Raises:
        ValueError: if a recipe or flag is wrong.
        FileNotFoundError: if data, recipe, tokenizer or pretrained folder are not there.
    """
    recipe = find_recipe(args)
    return Plan(
        recipe,
        shards=find_shards(args, recipe),
        folder=run_folder(args),
        tokenizer=find_tokenizer(args) if args.stage == "transformer" else None,
        pretrained=find_pretrained(args),
    )


def find_recipe(args: argparse.Namespace) -> Recipe:
    """Reads the recipe of a run safely: its files and flags, or those of an earlier run with ``--config``.

    Raises:
        ValueError: if a file or flag is wrong.
        FileNotFoundError: if no recipe has a name.
    """
    if args.config is None:
        files = recipe_files(args.stage, dataset=args.dataset, names=args.recipe.split(), cluster=args.cluster)
        return Recipe.read(args.stage, files, args.overrides)
    if args.recipe or args.run_name is None:
        raise ValueError("--config repeats a run with its recipe: leave --recipe out, and name the new run with --run")
    if not args.config.is_file():
        raise FileNotFoundError(f"--config {args.config}: no such file; runs have runs/RUN/{args.stage}/config.yaml")
    layer = Layer(f"recipe {args.config}", read_run_config(args.config))
    return Recipe.of(args.stage, [layer], args.overrides)


def find_shards(args: argparse.Namespace, recipe: Recipe) -> Path:
    """Finds the data folder of a run; one that is not named need not be there where the recipe reads a stream.

    Raises:
        FileNotFoundError: if it is not there.
    """
    named = args.data
    if named is None and args.config is not None:
        named = read_yaml(args.config)["data"].get("path")
    shards = Path(named or _SHARDS / args.dataset)
    if not shards.is_dir() and not (named is None and recipe.get("data.source") == "stream"):
        script = Path("data") / f"{args.dataset.replace('-', '_')}.py"
        made = f"`python {script}` or " if script.is_file() else ""
        raise FileNotFoundError(
            f"data {shards}: no such folder; make it with {made}`maskgit data make IMAGES --out {shards}`, or name "
            "another with --data (make: DATA=)"
        )
    return shards


def run_folder(args: argparse.Namespace) -> Path:
    """``runs/RUN``; RUN is DATASET-RECIPE unless named."""
    runs = Path(args.runs)
    return runs / (args.run_name or "-".join([args.dataset, *(args.recipe.split() or ["base"])]))


def find_tokenizer(args: argparse.Namespace) -> Path:
    """The tokenizer of stage 2: named, else the run's own, else of ``--pretrained``, else the data set's only one.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Other runs of this data set have several; one must be named.
    """
    if args.tokenizer is not None:
        if not (args.tokenizer / "config.json").is_file():
            raise FileNotFoundError(
                f"tokenizer {args.tokenizer}: no config.json there; a pretrained tokenizer is needed"
            )
        return Path(args.tokenizer)
    own = run_folder(args) / "pretrained" / "tokenizer"
    if (own / "config.json").is_file():
        return own
    if args.pretrained is not None and (args.pretrained / "tokenizer" / "config.json").is_file():
        return Path(args.pretrained) / "tokenizer"
    others = sorted(Path(args.runs).glob(f"{args.dataset}-*/pretrained/tokenizer/config.json"))
    distinct = {_digest(file.parent / "model.safetensors"): file.parent for file in others}
    if not distinct:
        raise FileNotFoundError(
            f"tokenizer {own}: not there yet; `make train-tokenizer` makes it, TOKENIZER= names another"
        )
    if len(distinct) > 1:
        choices = ", ".join(str(path) for path in distinct.values())
        raise ValueError(f"tokenizer {own}: not there, and several others are; name one with TOKENIZER=: {choices}")
    return next(iter(distinct.values()))


def find_pretrained(args: argparse.Namespace) -> Path | None:
    """The stage's own folder in the pretrained folder whose weights a run begins from, if one is named.

    Raises:
        FileNotFoundError: It holds no such stage.
    """
    if args.pretrained is None:
        return None
    folder, stage = Path(args.pretrained), str(args.stage)
    if not (folder / stage / "config.json").is_file():
        raise FileNotFoundError(
            f"pretrained {folder}: no {stage}/config.json there; runs/RUN/pretrained or an imported folder is needed"
        )
    return folder / stage


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
