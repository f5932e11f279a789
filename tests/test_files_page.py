"""The list of all source files, ``docs/files.md``; ``python -m tests.test_files_page`` writes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_floors import FLOORS, PACKAGE

PAGE = PACKAGE.parent / "docs" / "files.md"
FLOOR_NAMES = (
    "Foundations", "Schedules and networks", "Masks, decoding, losses and shards", "Files, pictures and estimates",
    "Data and training", "LightningModules", "The autoregressive baseline", "Pipeline and importers", "Runs",
    "Evaluation", "Web page", "Command line", "Entry points",
)  # fmt: skip
HEAD = """# Source files

The files of `maskgit_pl/`, from the lowest floor to the highest. A file imports only from lower floors or from its
own folder. Written by `python -m tests.test_files_page` from the first line of each module docstring.
"""


def first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return docstring.partition("\n")[0].replace("|", r"\|")


def is_folder(entry: str) -> bool:
    return (PACKAGE / entry).is_dir()


def files_of(entry: str) -> Iterator[Path]:
    """Yields the file of an entry of FLOORS, or those of its folder, each folder's ``__init__`` first."""
    file = PACKAGE / f"{entry}.py"
    if file.is_file():
        yield file
    else:
        yield from sorted((PACKAGE / entry).rglob("*.py"), key=lambda path: (path.parent, path.stem))


def row(file: Path) -> str:
    return f"| [{file.relative_to(PACKAGE)}](../{file.relative_to(PACKAGE.parent)}) | {first_line(file)} |"


def page() -> str:
    lines = [HEAD]
    entries = FLOORS | {"__init__": len(FLOOR_NAMES) - 1}
    for floor, name in enumerate(FLOOR_NAMES):
        lines += [f"## {floor}. {name}", "", "| file | content |", "|---|---|"]
        for entry in sorted((each for each in entries if entries[each] == floor), key=is_folder):
            lines += [row(file) for file in files_of(entry)]
        lines.append("")
    return "\n".join(lines)


def test_the_page_lists_every_file():
    assert PAGE.read_text() == page(), "write it again: python -m tests.test_files_page"


def test_every_file_says_what_it_is_for():
    for file in PACKAGE.rglob("*.py"):
        assert first_line(file), file


if __name__ == "__main__":
    PAGE.write_text(page())
