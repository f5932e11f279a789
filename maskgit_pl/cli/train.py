"""``maskgit train tokenizer|transformer``: trains a stage by recipe, or goes on where the last run stopped."""

from __future__ import annotations

import argparse
import hashlib
import logging
from pathlib import Path

from maskgit_pl import interruption
from maskgit_pl.registry import nearest
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Layer, Plan, Recipe, read_run_config, read_yaml, recipe_files

__all__ = [
    "SHARED_TOKENS",
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

log = logging.getLogger(__name__)

_SHARDS = Path("data/shards")
SHARED_TOKENS = "tokens"
"""Folder beside the runs that holds their token stores."""


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
    parser.add_argument("--print-config", action="store_true", help="print the complete recipe of the run, and end")
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
        from maskgit_pl.runs.fitting import config_text, fit  # lightning and torch take seconds to import

        if args.print_config:
            print(config_text(plan), end="")
            return 0
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
    shards = find_shards(args, recipe)
    return Plan(
        recipe,
        shards=shards,
        folder=run_folder(args),
        tokenizer=find_tokenizer(args, shards) if args.stage == "transformer" else None,
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
    """Returns ``runs/RUN``; RUN is DATASET-RECIPE unless named.

    Raises:
        ValueError: if the name is that of the folder of token stores.
    """
    if args.run_name == SHARED_TOKENS:
        raise ValueError(f"--run {SHARED_TOKENS}: the folder holds the token stores of all runs; take another name")
    return Path(args.runs) / (args.run_name or _default_name(args))


def _default_name(args: argparse.Namespace) -> str:
    return "-".join([args.dataset, *(args.recipe.split() or ["base"])])


def find_tokenizer(args: argparse.Namespace, shards: Path) -> Path:
    """Finds the tokenizer of stage 2: named, else the run's own, else of ``--pretrained``, else the data's only one.

    Args:
        args: A command's words.
        shards: Data folder of the run.

    Raises:
        FileNotFoundError: if there is none, or the run that is named does not exist.
        ValueError: if runs of these data have several; one must be named.
    """
    named = args.tokenizer
    if named is None and args.config is not None:
        named = Path(str(read_yaml(args.config)["model"].get("tokenizer")))
    if named is not None:
        return _checked_tokenizer(Path(named))
    own = run_folder(args) / "pretrained" / "tokenizer"
    if (own / "config.json").is_file():
        return own
    if args.pretrained is not None and (args.pretrained / "tokenizer" / "config.json").is_file():
        return Path(args.pretrained) / "tokenizer"
    _refuse_unknown_run(args)
    found = _tokenizers_of(shards, Path(args.runs))
    if not found:
        raise FileNotFoundError(
            f"tokenizer {own}: not there yet; `maskgit train tokenizer` (make: train-tokenizer) trains one, "
            "--tokenizer (make: TOKENIZER=) names another"
        )
    if len(found) > 1:
        choices = ", ".join(map(str, found))
        raise ValueError(
            f"tokenizer {own}: not there, and several others of these data are; name one with --tokenizer (make: "
            f"TOKENIZER=): {choices}"
        )
    log.info("tokenizer: %s, the only one trained on %s", found[0], shards)
    return found[0]


def _checked_tokenizer(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"tokenizer {folder}: no config.json there; name a pretrained tokenizer folder")
    if (folder / "tokenizer" / "config.json").is_file():
        raise FileNotFoundError(f"tokenizer {folder}: it is a folder of both stages; did you mean {folder}/tokenizer?")
    return folder


def _refuse_unknown_run(args: argparse.Namespace) -> None:
    """Refuses to start stage 2 of a run that was named and is not there: its name is more likely mistyped.

    Raises:
        FileNotFoundError: The nearest run is named.
    """
    folder = run_folder(args)
    if args.run_name in (None, _default_name(args)) or folder.is_dir():
        return
    runs = [each.name for each in Path(args.runs).glob("*") if (each / "pretrained").is_dir()]
    if not runs:
        return
    raise FileNotFoundError(
        f"run {folder}: no such run: {nearest(folder.name, runs)}. To start it with another run's tokenizer, name that "
        "with --tokenizer (make: TOKENIZER=)"
    )


def _tokenizers_of(shards: Path, runs: Path) -> list[Path]:
    """The tokenizers that runs have trained on a data folder, those with the same weights once."""
    found: dict[str, Path] = {}
    for config in sorted(runs.glob("*/tokenizer/config.yaml")):
        exported = config.parents[1] / "pretrained" / "tokenizer"
        path = read_yaml(config).get("data", {}).get("path")
        if (exported / "config.json").is_file() and path and Path(path).resolve() == shards.resolve():
            found.setdefault(_digest(exported / "model.safetensors"), exported)
    return list(found.values())


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
