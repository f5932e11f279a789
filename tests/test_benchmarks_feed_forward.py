"""The benchmark of MLPs in parts, at a tiny size: a row for each number of images, and equal layers for both."""

import pytest
import torch

from tests.benchmark_scripts import benchmark_script


@pytest.fixture
def feed_forward():
    with benchmark_script("feed_forward") as script:
        yield script


def test_each_number_of_images_has_a_row(feed_forward, capsys, monkeypatch):
    monkeypatch.setattr(feed_forward, "_SIZES", ((16, 32, False), (16, 32, True)))
    feed_forward.main(["--depth", "1", "--images", "1", "2", "--repeats", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    names = [(row[0].strip(), row[1].strip()) for row in rows]
    assert names == [(name, n) for name in ("16 -> 32 -> 16", "16 -> 32 with gate -> 16") for n in ("1", "2")]


def test_the_parts_and_the_whole_have_equal_weights(feed_forward):
    one, other = (feed_forward.build_layers(8, 16, is_gated=True, depth=1) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
