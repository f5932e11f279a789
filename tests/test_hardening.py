"""Every test that docs/hardening.md names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "hardening.md").read_text()
FILES = re.findall(r"(tests/[\w/]+\.py)", PAGE)


def named() -> list[tuple[str, str]]:
    """Returns file and name of each test; ``::name`` without a file belongs to the file before it in the row."""
    found = []
    for row in PAGE.splitlines():
        file = None
        for match in re.finditer(r"`(tests/[\w/]+\.py)?::(\w+)", row):
            file = match[1] or file
            if file is not None:
                found.append((file, match[2]))
    return found


def test_the_page_names_many_tests() -> None:
    assert len(named()) > 100


@pytest.mark.parametrize("file", sorted(set(FILES)))
def test_a_file_of_tests_that_is_named_is_there(file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.parametrize(("file", "name"), sorted(set(named())))
def test_a_test_that_is_named_is_there(file: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\b", (ROOT / file).read_text(), re.MULTILINE)
