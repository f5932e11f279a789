"""The English of the project: every docstring, string and comment of the source, every page, recipe and ``--help``."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from maskgit_pl.cli import build_parser
from tests.english import check_file, check_prose, check_python

ROOT = Path(__file__).parents[1]
SOURCES = ("maskgit_pl/**/*.py", "benchmarks/*.py", "data/*.py", "docs/*.py")
PROSE = ("*.md", "docs/**/*.md", "data/*.md", "benchmarks/*.md", "results/**/*.md", "tests/**/*.md")
SETTINGS = ("recipes/**/*.yaml", "Makefile")


def files() -> list[Path]:
    """Returns every file that a reader sees, but not what `make docs` generates."""
    found = {path for pattern in (*SOURCES, *PROSE, *SETTINGS) for path in ROOT.glob(pattern)}
    return sorted(path for path in found if not path.is_relative_to(ROOT / "docs/reference"))


def test_docstrings_messages_and_pages_keep_the_rules():
    assert len(files()) > 100
    assert [fault for file in files() for fault in check_file(file)] == []


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields a parser and those of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from commands(child)


def test_the_help_of_every_command_keeps_the_rules():
    parsers = list(commands(build_parser()))
    assert len(parsers) > 20
    found = {parser.prog: list(check_prose(parser.format_help())) for parser in parsers}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_check_finds():
    sources = [
        '"""What a schedule is."""',
        'def f():\n    """Whether it is one."""',
        'def f():\n    """Number of rows."""',
        'def f():\n    """(B, N) codes."""',
        'def f():\n    """Images as tensors."""',
        'class A:\n    """Of Adam."""',
        'def f(a):\n    """Returns it.\n\n    Args:\n        a: Of Adam.\n    """',
        'class A:\n    """A thing.\n\n    Attributes:\n        a: The first.\n        b: Whether it is one.\n    """',
        'raise ValueError(f"num_steps: at least 1 is needed, got {x}")',
        'raise ValueError("two names are "\n    "needed")',
        "x = 1  # the run goes on",
        "# the run goes\n# on from there",
        'print("10 images a second")',
    ]
    assert {source: found for source in sources if len(found := list(check_python(source))) != 1} == {}
    assert list(check_prose("One.\nThe run goes\n  on from there.")) == [(2, "'goes on': write 'resume, continue'")]
