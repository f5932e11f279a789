from itertools import pairwise

import pytest

from maskgit_pl.evaluation.pages import spread


def test_names_at_the_ends_of_lines_keep_their_order_and_their_distance() -> None:
    moved = spread({"a": 0.5, "b": 0.51, "c": 0.9, "d": 0.505}, least=0.1)
    assert [name for name, _ in sorted(moved.items(), key=lambda item: item[1])] == ["a", "d", "b", "c"]
    assert moved["c"] == 0.9
    assert (moved["a"] + moved["b"] + moved["d"]) / 3 == pytest.approx(0.505)
    heights = sorted(moved.values())
    assert all(high - low >= 0.1 - 1e-9 for low, high in pairwise(heights))
