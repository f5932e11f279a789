"""Texts of the package name only commands that exist, and only what a wheel installs: no page or file of a clone."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskgit_pl.cli import build_parser
from tests.cli.conftest import parsers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "maskgit_pl"
TARGETS = "data|demo|doctor|evaluate|sample|submit-|tokenize|train-|tune"
NOT_INSTALLED = re.compile(
    rf"(`make |\bmake (?:{TARGETS})|\bmake: |\bMakefile\b|\b[A-Z]+=(?=[ ,)]|$)|\bdocs/|\bbenchmarks/|\btests/|"
    r"\bdata/\w+\.py|\bREADME\b|\bCONTRIBUTING\b|\bCHANGELOG\b)"
)
CARDS = ("pipeline/card.py", "runs/pushing.py")
ALLOWED = {(file, "README.md") for file in CARDS}  # the file of the model card


def texts(tree: ast.Module, *, docstrings: bool = False) -> Iterator[tuple[int, str]]:
    """Yields the strings of a module with their lines, f-strings as one text."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) and not docstrings else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                skipped.add(id(statement.value))
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def not_installed(source: str) -> list[tuple[int, str]]:
    return [(line, text) for line, text in texts(ast.parse(source)) if NOT_INSTALLED.search(text)]


@pytest.mark.slow
def test_texts_name_only_what_is_installed() -> None:
    named = {
        (file.relative_to(PACKAGE).as_posix(), text): line
        for file in PACKAGE.rglob("*.py")
        for line, text in not_installed(file.read_text())
    }
    assert named.keys() == ALLOWED, named


COMMANDS = dict(parsers(build_parser()))


def named(tool: str) -> set[tuple[str, str]]:
    """Returns the words in backticks after the name of a tool in texts and helps, each with its file or command."""
    sources = [(file.name, text) for file in sorted(PACKAGE.rglob("*.py"))
               for _, text in texts(ast.parse(file.read_text()), docstrings=True)]  # fmt: skip
    sources += [(f"{command} --help", parser.format_help()) for command, parser in COMMANDS.items()]
    commands = ((where, command) for where, text in sources for command in re.findall(rf"`{tool} ([^`]+)`", text))
    return {(where, " ".join(command.split())) for where, command in commands}


def fault(command: str) -> str | None:
    """Returns the fault of a command line; placeholders and values in capitals match anything."""
    parser, words = COMMANDS[""], command.split()
    for number, word in enumerate(words):
        inner = next((each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)
        if word.startswith("--"):
            if word.partition("=")[0] not in parser._option_string_actions:
                return f"{parser.prog} has no {word}"
        elif inner is not None and "{" not in word:
            unknown = [each for each in word.split("|") if each not in inner]
            if unknown:
                return f"{parser.prog} has no command {unknown[0]}"
            parser = inner[word.split("|")[0]]
        elif inner is None and word.islower() and words[number - 1][:2] != "--":
            choices = [each for action in parser._actions if not action.option_strings for each in action.choices or ()]
            if choices and not {*word.split("|")} <= {*map(str, choices)}:
                return f"{parser.prog} has no {word}"
    return None


@pytest.mark.slow
def test_no_text_names_a_command_a_flag_or_a_target_that_there_is_not() -> None:
    commands = named("maskgit")
    assert len(commands) > 30
    assert {where: f"{command}: {fault(command)}" for where, command in commands if fault(command)} == {}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [(where, words) for where, words in named("make") if words.split()[0] not in targets] == []
