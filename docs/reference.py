"""Writes the generated pages of the site: commands, recipes, registered names and the Python API.

``docs/conf.py`` calls it for each build. The pages are in ``docs/reference/``, which git ignores.
"""

import argparse
import ast
import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from maskgit_pl.cli import build_parser
from maskgit_pl.cli.listing import registered_parts
from maskgit_pl.runs.recipe import recipes_folders

WIDTH = "88"  # columns of the help texts
KINDS = {
    "tokenizer": "Stage 1, the tokenizer",
    "transformer": "Stage 2, the transformer",
    "cluster": "Machines",
}
PACKAGES = {  # public modules in the order of the page; a name is described where it is named first
    "maskgit_pl": "The names that most programs need.",
    "maskgit_pl.pipeline": "Generate and edit images.",
    "maskgit_pl.runs": "Train by recipe, as the commands do.",
    "maskgit_pl.evaluation": "Measure models, compare variants of a recipe, search for decoding settings.",
    "maskgit_pl.evaluation.ledger": "The file of measurements.",
    "maskgit_pl.evaluation.pages": "Pages of reports in Markdown, with CSV and pictures.",
    "maskgit_pl.data": "Data modules over shards, token stores and your own data sets.",
    "maskgit_pl.schedules": "Mask schedules.",
    "maskgit_pl.masking": "Masks of training.",
    "maskgit_pl.decoding": "Parallel and autoregressive decoding.",
    "maskgit_pl.decoding.selectors": "Token selectors: the interface and the built-in ones.",
    "maskgit_pl.pipeline.options": "The classes of a model, what a call wants, and the names of the options.",
    "maskgit_pl.pipeline.regions": "Images and masks that are edited, and their regions of tokens.",
    "maskgit_pl.grids": "Pictures.",
    "maskgit_pl.pipeline.display": "Filmstrips and animations.",
    "maskgit_pl.pretrained.networks": "Pretrained networks and their folders.",
    "maskgit_pl.data.sources.public": "Data sets that `maskgit data fetch` downloads.",
    "maskgit_pl.networks.backbone": "The interface of backbones.",
    "maskgit_pl.networks.quantizers": "Quantizers and their interface.",
    "maskgit_pl.contrib.product_quantizer": "Product quantization.",
    "maskgit_pl.contrib.gumbel_quantizer": "The Gumbel-softmax quantizer.",
    "maskgit_pl.cli": "The command line, also of a script.",
    "maskgit_pl.cli.flags": "Flags that commands and scripts share.",
    "maskgit_pl.distributed": "Devices, and the record of the machine that is saved with results.",
    "maskgit_pl.processes": "Progress bars.",
    "maskgit_pl.registry": "Registries, to which plug-ins add names.",
}


def write_reference(folder: Path) -> None:
    """Writes all pages into a folder, whose content is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = {**command_pages(), "recipes": recipe_page(), "names": name_page(), **api_pages()}
    for name, text in pages.items():
        file = folder / f"{name}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def toctree(entries: list[str], *, depth: int = 1) -> str:
    """Returns a hidden table of contents for the sidebar."""
    return "\n".join(["```{toctree}", ":hidden:", f":maxdepth: {depth}", "", *entries, "```", ""])


def actions_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Yields the name, the parser and the line of help of each command of a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines = {each.dest: each.help or "" for each in action._choices_actions}
            for name, child in action.choices.items():
                yield name, child, lines.get(name, "")


def help_sections(parser: argparse.ArgumentParser, level: int = 1) -> Iterator[str]:
    """Yields the help of a command and of the commands inside it, each with a heading."""
    usage = parser.format_usage().removeprefix("usage: ").replace("\n       ", "\n").rstrip()
    yield f"{'#' * level} `{parser.prog}`\n\n{escape(parser.description or '')}\n\n```text\n{usage}\n```\n"
    yield from map("\n".join, filter(None, (flags_of(parser, group) for group in parser._action_groups)))
    if parser.epilog:
        yield f"```text\n{parser.epilog}\n```\n"
    for _, child, _ in actions_of(parser):
        yield from help_sections(child, level + 1)


def flags_of(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> list[str]:
    """Returns the lines of a group of flags: its title, and each flag with its help as a definition."""
    formatter, lines = parser._get_formatter(), []
    for action in group._group_actions:
        if action.help and action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            flag = formatter._format_action_invocation(action)
            lines.append(f"`{flag}`\n: {escape(formatter._expand_help(action))}\n")
    heading = [f"**{group.title}**\n", *([f"{escape(group.description)}\n"] if group.description else [])]
    return [*heading, *lines] if lines else []


def command_pages() -> dict[str, str]:
    """Returns a page for each command, and the list of them."""
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), WIDTH
    try:
        parser = build_parser()
        pages = {f"commands/{name}": "\n".join(help_sections(child)) for name, child, _ in actions_of(parser)}
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    rows = [f"| [`maskgit {name}`](commands/{name}.md) | {escape(line)} |" for name, _, line in actions_of(parser)]
    head = "# Commands\n\nThe pages have what `--help` prints.\n\n| command | |\n|---|---|\n"
    names = sorted(name for name in pages)
    return {**pages, "commands": f"{head}{chr(10).join(rows)}\n\n{toctree(names)}"}


def recipe_page() -> str:
    """Returns the page with every recipe: its file with the comment that opens it."""
    folder = recipes_folders()[-1]
    parts = [
        "# All recipes\n\n`--recipe` and `RECIPE=` take these names; several are merged from left to right, and "
        "`base` comes first. [Recipes](../recipes.md) explains the keys.\n"
    ]
    for kind, title in KINDS.items():
        parts.append(f"## {title}\n")
        for file in sorted((folder / kind).glob("*.yaml"), key=lambda each: (each.stem != "base", each.stem)):
            parts.append(f"### {kind}: {file.stem}\n\n```yaml\n{file.read_text().rstrip()}\n```\n")
    return "\n".join(parts)


def name_page() -> str:
    """Returns the page with the names of every registry."""
    parts = [
        "# Registered names\n\nRecipes, flags and Python take these names. `maskgit plugins` prints them with those "
        "of installed plug-ins, and [Plug-ins](../plug-ins.md) shows how to add one.\n"
    ]
    for kind, texts in registered_parts().items():
        rows = [f"| `{name}` | {escape(text)} |" for name, text in texts.items()]
        parts.append(f"## {kind}\n\n| name | description |\n|---|---|\n{chr(10).join(rows)}\n")
    return "\n".join(parts)


def escape(text: str) -> str:
    """Returns a line of reStructuredText as a cell of a Markdown table: code stays, other marks are escaped."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", text)
    return "".join(
        part.replace("|", r"\|") if part.startswith("`") else re.sub(r"([|*_<>\[\]$])", r"\\\1", part) for part in parts
    )


def api_pages() -> dict[str, str]:
    """Returns a page for each public module, and the list of them."""
    known: dict[int, str] = {}  # the full name of each described object
    pages = {f"api/{name}": module_page(name, known) for name in PACKAGES}
    rows = [f"| [`{name}`](api/{name}.md) | {line} |" for name, line in PACKAGES.items()]
    head = "# Python API\n\n[Python API](../python.md) is the introduction.\n\n| module | |\n|---|---|\n"
    return {**pages, "api": f"{head}{chr(10).join(rows)}\n\n{toctree([*pages])}"}


def module_page(name: str, known: dict[int, str]) -> str:
    """Returns the page of a module: its docstring, and a directive for each public name."""
    module = import_module(name)
    lines = [f"# `{name}`", "", "```{eval-rst}", f".. automodule:: {name}", "   :no-members:", ""]
    for public in public_names(module):
        value = getattr(module, public)
        if (first := known.setdefault(id(value), f"{name}.{public}")) != f"{name}.{public}":
            lines += [f"``{name}.{public}`` is :py:obj:`{first}`.", ""]
        else:
            lines += [f".. {directive(value)}:: {name}.{public}", *options(value), ""]
    return "\n".join([*lines, "```", ""])


def public_names(module: ModuleType) -> list[str]:
    """Returns the names of ``__all__``, or those without an underscore that the module itself defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names: list[str] = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return sorted(name for name in names if not name.startswith("_"))


def directive(value: object) -> str:
    """Returns the directive of autodoc for an object."""
    if inspect.isclass(value):
        return "autoclass"
    return "autofunction" if inspect.isroutine(value) else "autodata"


def options(value: object) -> list[str]:
    """Returns the options of the directive: own members, and those of our own base classes for the pipeline."""
    if not inspect.isclass(value):
        return ["   :no-value:"] if directive(value) == "autodata" else []
    found = ["   :members:"]
    if value.__bases__ != (object,):
        found.append("   :show-inheritance:")
    if value.__name__ == "MaskGIT":
        found.append("   :inherited-members:")
    return found


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
