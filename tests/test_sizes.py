"""Limits on the size of a file, a class and a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "maskgit_pl"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MOST_OF_FILE, MOST_OF_CLASS, MOST_OF_FUNCTION = 450, 300, 60  # lines, docstrings among them
MOST_PARAMETERS = 8  # fields of a dataclass aside


def too_large(source: str) -> Iterator[str]:
    """Names each thing that is larger than it may be, with its size."""
    if (lines := len(source.splitlines())) > MOST_OF_FILE:
        yield f"file: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > (MOST_OF_CLASS if isinstance(node, ast.ClassDef) else MOST_OF_FUNCTION):
            yield f"{node.name}: {lines} lines"
        if not isinstance(node, ast.ClassDef) and (count := len(parameters_of(node))) > MOST_PARAMETERS:
            yield f"{node.name}: {count} parameters"


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of a function's parameters, without ``self`` and ``cls``."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [each.arg for each in arguments if each.arg not in ("self", "cls")]


@pytest.mark.parametrize("file", FILES)
def test_files_classes_and_functions_are_small(file):
    assert list(too_large((PACKAGE / file).read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n" * 451,
        "class A:\n" + "    x = 1\n" * 300,
        "def f():\n" + "    x = 1\n" * 60,
        "def f(a, b, c, d, e, f, g, h, i): ...",
        "async def f(*, a, b, c, d, e, f, g, h, i): ...",
    ],
)
def test_the_check_finds(source):
    assert len(list(too_large(source))) == 1


def test_the_check_lets_pass():
    source = "class A:\n    def f(self, a, b, c, d, e, f, g, h):\n" + "        x = 1\n" * 59 + "x = 1\n" * 389
    assert list(too_large(source)) == []
