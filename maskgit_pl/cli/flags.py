"""Flags that many commands share, checks of their values, and tables of plain rows on the terminal.

``add_run_arguments`` adds the recipe and the folders of a run, for ``train``, ``tokenize``, ``doctor`` and ``slurm``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from maskgit_pl.checks import is_image_file_name
from maskgit_pl.errors import printable
from maskgit_pl.files import check_writable
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Recipe

__all__ = [
    "FOLDER",
    "WantedFolders",
    "add_device_argument",
    "add_dtype_argument",
    "add_json_argument",
    "add_negative_model_argument",
    "add_new_run_arguments",
    "add_run_arguments",
    "check_at_least",
    "check_negative_model_flag",
    "check_outputs",
    "format_flag",
    "make_folder",
    "print_rows",
    "read_device_flag",
    "read_folder_flags",
    "read_recipe_flags",
    "use_flag_names",
]

FOLDER = ""  # in place of a file suffix, for ``check_outputs``


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


def add_device_argument(parser: argparse.ArgumentParser, *, default: str = "a GPU if there is one") -> None:
    """Adds ``--device``, which ``read_device_flag`` reads; the help names the default."""
    parser.add_argument("--device", metavar="NAME", help=f"cpu, cuda, cuda:1, mps ... (default: {default})")


def read_device_flag(args: argparse.Namespace, *, default: str | None = None) -> str:
    """Returns the device of ``--device`` if it is available; without the flag, ``default`` or a GPU or the CPU."""
    from maskgit_pl.distributed import check_device, default_device

    if args.device is None:
        return default or default_device()
    return str(check_device(args.device, name="--device"))


def add_dtype_argument(parser: argparse._ActionsContainer, *, of: str) -> None:
    """Adds ``--dtype``, the arithmetic of what ``of`` names; ``distributed.parse_dtype`` reads it."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help=f"arithmetic of {of}; auto: bfloat16 on devices with instructions for it, else float32 "
        "(default: that of the weights)",
    )


def add_negative_model_argument(parser: argparse._ActionsContainer) -> None:
    """Adds ``--negative-model``."""
    parser.add_argument(
        "--negative-model",
        type=Path,
        metavar="DIR",
        help="weaker model that guidance moves away from, such as an early checkpoint of the run: a run or a folder of "
        "`maskgit export` (default: that of decoding.json, or none)",
    )


def check_negative_model_flag(args: argparse.Namespace) -> None:
    """Checks that ``--negative-model`` names a folder with a transformer, before torch is imported."""
    if args.negative_model is None:
        return
    from maskgit_pl.pipeline.sharing import find_transformer

    try:
        find_transformer(args.negative_model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--negative-model{str(error).removeprefix('negative_model')}") from error


def format_flag(name: str) -> str:
    """Returns the flag of a setting, such as ``--num-steps`` for ``num_steps``."""
    return f"--{name.replace('_', '-')}"


@contextmanager
def use_flag_names(args: argparse.Namespace) -> Iterator[None]:
    """Makes a TypeError or ValueError that begins with a setting (``num_steps must ...``) begin with its flag.

    Library functions name their own arguments in errors. The user of a command knows the flags. A positional argument,
    such as the source of ``data make``, keeps its name.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # "num_steps must be ..." -> num_steps; "height of the image must ..." -> height, no flag of the command.
        name = re.split(r"[^a-z_]", str(error), maxsplit=1)[0]
        if format_flag(name).removeprefix("--") not in args.flags:  # the error is about something else
            raise
        text = format_flag(name) + str(error).removeprefix(name)
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Checks lower bounds of numbers. A flag that is not given (None) is not checked.

    Args:
        args: Parsed flags.
        least: Smallest allowed value of each flag, such as ``num_steps=1`` for ``--num-steps``.

    Raises:
        ValueError: if a number is smaller, or not finite.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"{format_flag(name)} must be >= {bound}, got {value}")


def check_outputs(args: argparse.Namespace, **endings: str) -> None:
    """Checks, before any work, that outputs can be written, are no inputs, and have the suffix of their format.

    Args:
        args: Parsed flags. One that is not given (None) is not checked.
        endings: Suffix of each flag's file, such as ``.png``; ``FOLDER`` for a folder.

    Raises:
        ValueError: if a suffix is wrong, two flags name the same file, an output is a file that the command reads, or
            an output cannot be written (``files.check_writable``).
    """
    values = [value for name, value in vars(args).items() if name not in endings]
    inputs = {os.path.realpath(each) for each in values if isinstance(each, Path) and each.is_file()}
    named: dict[str, str] = {}
    for name, ending in endings.items():
        path: Path | None = getattr(args, name)
        if path is None:
            continue
        if ending != FOLDER and path.suffix.lower() != ending:
            raise ValueError(f"{format_flag(name)} must end in {ending}, got {path}")
        real = os.path.realpath(path)
        if real in named:
            raise ValueError(f"{format_flag(name)} must differ from {named[real]}, got {path} for both")
        named[real] = format_flag(name)
        lost = [
            each
            for each in inputs
            if each == real
            or (ending == FOLDER and os.path.dirname(each) == real and is_image_file_name(os.path.basename(each)))
        ]
        if lost:
            raise ValueError(
                f"{format_flag(name)} must not overwrite a file that the command reads, got {path} and {lost[0]}; give "
                f"another {format_flag(name)}"
            )
        check_writable(format_flag(name), path, is_folder=ending == FOLDER)


def make_folder(folder: Path) -> None:
    """Makes a missing folder and prints its name."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder}: new folder")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag ``--json`` of the commands that print a table."""
    parser.add_argument("--json", action="store_true", help="print JSON, a list of objects, instead of the table")


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Prints rows that have the same keys.

    Args:
        rows: One mapping a row; the keys are the columns.
        as_json: True to print a JSON list of objects, with unchanged values.
    """
    if as_json:
        print(json.dumps([dict(row) for row in rows], indent=1))
        return
    # Names of packages and files are untrusted: no control characters.
    cells = [[column.replace("_", " ") for column in rows[0]] if rows else []]
    cells += [[printable(str(value)) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # Only a terminal cuts a line; a file and a pipe have the whole text.
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for line in cells:
        text = "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        print(text if len(text) <= limit else f"{text[: limit - 3]}...")
