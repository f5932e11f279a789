"""The benchmark of token groups at a tiny size: a row for each number of groups, with counted parameters."""

import pytest

from tests.benchmark_scripts import benchmark_script


@pytest.fixture
def token_groups():
    with benchmark_script("token_groups") as script:
        yield script


def test_each_number_of_groups_has_a_row(token_groups, capsys):
    token_groups.main(["--codebook-size", "64", "--grid", "3", "--batch-size", "2", "--repeats", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["1", "2"]
    counts = [int(row[1].replace(",", "")) for row in rows]
    assert counts[0] - counts[1] == (64 - 16) * (128 + 1)
