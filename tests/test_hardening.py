"""Every test that docs/hardening.md names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "hardening.md").read_text()


def named() -> set[tuple[str, str]]:
    """Returns file and name of each test; ``::name`` without a file belongs to the file before it in the row."""
    found = set()
    for row in PAGE.splitlines():
        file = None
        for match in re.finditer(r"`(tests/[\w/]+\.py)?::(\w+)", row):
            file = match[1] or file
            if file is not None:
                found.add((file, match[2]))
    return found


def test_every_test_that_the_page_names_exists() -> None:
    assert len(named()) > 100
    texts = {file: (ROOT / file).read_text() for file in re.findall(r"(tests/[\w/]+\.py)", PAGE)}
    names = {(file, name) for file, text in texts.items() for name in re.findall(r"^(?:async )?def (\w+)", text, re.M)}
    assert sorted(named() - names) == []
