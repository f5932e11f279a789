"""The benchmark of large pages at a tiny size: equal copies, and a row for each."""

import pytest
import torch

from tests.benchmark_scripts import benchmark_script


@pytest.fixture
def large_pages():
    with benchmark_script("large_pages") as script:
        yield script


def test_each_copy_has_a_row(large_pages, capsys):
    large_pages.main(["--dtype", "float32", "--depth", "1", "--embed-dim", "16", "--copies", "2", "--repeats", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["1", "2"]


def test_the_copies_have_equal_weights(large_pages):
    one, other = (large_pages.build_layers(depth=1, embed_dim=8, dtype=torch.float32) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
