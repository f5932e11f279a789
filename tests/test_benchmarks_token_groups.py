"""The benchmark of token groups at a tiny size: a row for each number of groups, with counted parameters."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def token_groups(monkeypatch: pytest.MonkeyPatch):
    """The script as a module; its folder is on the path, as when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import token_groups

    yield token_groups
    for name in ("token_groups", "stage2_step", "measuring"):
        sys.modules.pop(name, None)


def test_each_number_of_groups_has_a_row(token_groups, capsys):
    token_groups.main(["--codebook-size", "64", "--grid", "3", "--batch-size", "2", "--repeats", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["1", "2"]
    counts = [int(row[1].replace(",", "")) for row in rows]
    assert counts[0] - counts[1] == (64 - 16) * (128 + 1)
