"""``maskgit recipes list|show|copy|schema``: the recipes that ``--recipe`` can name, copies to change, their keys."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from maskgit_pl.cli.flags import make_folder
from maskgit_pl.cli.tables import add_json_argument, print_rows
from maskgit_pl.files import write_atomically
from maskgit_pl.registry import nearest
from maskgit_pl.runs.recipe_files import STAGES, Stage, list_recipes, recipes_folders
from maskgit_pl.runs.recipe_schema import Kind, load_schema

__all__ = ["add_parser", "copy", "show"]

_KINDS: tuple[Stage | Literal["cluster"], ...] = (*STAGES, "cluster")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "recipes",
        help="list, show and copy the recipes that --recipe can name, and their JSON Schema",
        description="List, show or copy recipes, or print their schema. Recipes are searched in recipes/ of the "
        "working directory, then in the installation.",
        epilog="Example: maskgit recipes copy cosine --as mine",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listed = actions.add_parser("list", help="list all recipes", description="List all recipes.",
                                epilog="Example: maskgit recipes list")  # fmt: skip
    add_json_argument(listed)
    listed.set_defaults(run=_list)
    shown = actions.add_parser("show", help="print a recipe", description="Print the files of a recipe.",
                               epilog="Example: maskgit recipes show paper-256")  # fmt: skip
    shown.add_argument("name", metavar="NAME", help="name of the recipe")
    shown.set_defaults(run=show)
    copied = actions.add_parser(
        "copy",
        help="copy a recipe, to change it",
        description="Copy the files of a recipe to recipes/ of the working directory, where --recipe finds them first.",
        epilog="Example: maskgit recipes copy own-images --as my-photos",
    )
    copied.add_argument("name", metavar="NAME", help="name of the recipe")
    copied.add_argument("--as", dest="new", metavar="NEW", help="name of the copy (default: NAME)")
    copied.set_defaults(run=copy)
    schema = actions.add_parser(
        "schema",
        help="print the JSON Schema of recipes, for editors",
        description="Print the JSON Schema of the recipes of a stage. An editor with a YAML language server completes "
        "and checks a recipe whose first line is: # yaml-language-server: $schema=FILE",
        epilog="Example: maskgit recipes schema transformer > recipes/transformer.schema.json",
    )
    schema.add_argument("kind", choices=get_args(Kind), help="kind of recipe; autoregressive is for causal attention")
    schema.set_defaults(run=_schema)


def _list(args: argparse.Namespace) -> int:
    found: dict[str, dict[str, Path]] = {}
    for kind in _KINDS:
        for name, file in list_recipes(kind).items():
            found.setdefault(name, {})[kind] = file
    print_rows([_row(name, files) for name, files in sorted(found.items())], as_json=args.json)
    return 0


def _schema(args: argparse.Namespace) -> int:
    print(json.dumps(load_schema(args.kind), indent=1))
    return 0


def _row(name: str, files: Mapping[str, Path]) -> dict[str, str]:
    here, *shipped = recipes_folders()
    is_own = bool(shipped) and any(file.is_relative_to(here) for file in files.values())
    return {
        "recipe": name,
        "of": ", ".join(files),
        "from": "recipes/" if is_own else "maskgit_pl",
        "description": _first_sentence(list(files.values())[-1]),
    }


def show(args: argparse.Namespace) -> int:
    """Prints the files of a recipe, each with its path."""
    for file in _files(args.name).values():
        print(f"# {file}\n{file.read_text()}")
    return 0


def copy(args: argparse.Namespace) -> int:
    """Copies the files of a recipe to ``recipes/`` of the working directory.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if the new name is not one, or a file of this name exists.
    """
    name = args.name if args.new is None else args.new
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"--as must be letters, digits and ._-, got {name!r}")
    targets = {Path("recipes", kind, f"{name}.yaml"): file for kind, file in _files(args.name).items()}
    for target in targets:
        if target.exists():
            raise ValueError(f"{target}: the file exists; choose another name with --as")
    for target, file in targets.items():
        make_folder(target.parent)
        with write_atomically(target) as stream:
            stream.write(file.read_bytes())
        print(f"{target}: a copy of {file}")
    return 0


def _files(name: str) -> dict[str, Path]:
    """Returns the file of each kind that has a recipe of this name.

    Raises:
        FileNotFoundError: if there is none. The message lists the names and the closest one.
    """
    known = {kind: list_recipes(kind) for kind in _KINDS}
    found: dict[str, Path] = {kind: files[name] for kind, files in known.items() if name in files}
    if not found:
        every = {each for files in known.values() for each in files}
        raise FileNotFoundError(f"recipe {name!r}: no such recipe: {nearest(name, every)}")
    return found


def _first_sentence(file: Path) -> str:
    """Returns the first sentence of the comment that opens a recipe."""
    text: list[str] = []
    for line in file.read_text().splitlines():
        words = line.removeprefix("#").strip()
        if not line.startswith("#") or not words:
            break
        text.append(words)
    return re.split(r"(?<=\.) |:$", " ".join(text))[0]
