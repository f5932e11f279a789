"""Texts of the package name only what a wheel installs: no target of ``make``, no page, script or file of a clone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "maskgit_pl"
TARGETS = "data|demo|doctor|evaluate|sample|submit-|tokenize|train-|tune"
NOT_INSTALLED = re.compile(
    rf"(`make |\bmake (?:{TARGETS})|\bmake: |\bMakefile\b|\b[A-Z]+=(?=[ ,)]|$)|\bdocs/|\bbenchmarks/|\btests/|"
    r"\bdata/\w+\.py|\bREADME\b|\bCONTRIBUTING\b|\bCHANGELOG\b)"
)
ALLOWED = {  # file and text -> reason
    ("pipeline/card.py", "README.md"): "the file of the model card, which a pretrained folder has",
    ("pipeline/sharing.py", "README.md"): "the same file",
    ("pipeline/diffusers_pipeline.py", "README.md"): "the same file",
    ("runs/pushing.py", "README.md"): "the same file, which is uploaded",
}


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the strings of a module with their lines, f-strings as one text; no docstrings."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for each in body if isinstance(body, list) else ():
            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                skipped.add(id(each.value))
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def found(source: str) -> list[tuple[int, str]]:
    return [(line, text) for line, text in texts(ast.parse(source)) if NOT_INSTALLED.search(text)]


@pytest.mark.slow
def test_texts_name_only_what_is_installed() -> None:
    named = {
        (file.relative_to(PACKAGE).as_posix(), text): line
        for file in PACKAGE.rglob("*.py")
        for line, text in found(file.read_text())
    }
    assert ALLOWED.keys() <= named.keys(), "an exception that is no longer needed"
    assert {place: line for place, line in named.items() if place not in ALLOWED} == {}


@pytest.mark.parametrize(
    "text",
    [
        "train one with `make demo`",
        "next: make train-transformer",
        "name another with --run (make: RUN=)",
        "see docs/slurm.md",
        "`python data/fashion_mnist.py`",
        "the README says how",
    ],
)
def test_the_check_finds(text: str) -> None:
    assert found(f"raise ValueError({text!r})")
    assert found(f"raise ValueError(f{text + '{x}'!r})")


@pytest.mark.parametrize("text", ["make it with `maskgit data make IMAGES`", "a name in runs/, as in model=x", "RUN/x"])
def test_the_check_lets_pass(text: str) -> None:
    assert not found(f"raise ValueError({text!r})")
    assert not found(f'def f():\n    """See docs/x.md and `make demo`."""\n    raise ValueError({text!r})')
