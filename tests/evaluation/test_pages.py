""""""

from itertools import pairwise
from pathlib import Path

import pytest

from maskgit_pl.evaluation.pages import Page, markdown_table, spread


def test_all_lines_of_a_table_have_the_same_number_of_cells() -> None:
    lines = markdown_table(["a", "b", "c"], [["x", "1", "2"]], left=1)
    assert lines == ["| a | b | c |", "|---|---:|---:|", "| x | 1 | 2 |"]


def test_a_page_is_written_to_its_folder(tmp_path: Path) -> None:
    page = Page("table-1", "# Table\n", [{"a": 1}, {"b": 0.5}], {"table-1.png": b"png"}, tmp_path / "own")
    files = page.write()
    assert files == [tmp_path / "own" / name for name in ("table-1.md", "table-1.csv", "table-1.png")]
    assert [file.read_bytes() for file in files] == [b"# Table\n", b"a,b\n1,\n,0.5\n", b"png"]


def test_names_at_the_ends_of_lines_keep_their_order_and_their_distance() -> None:
    moved = spread({"a": 0.5, "b": 0.51, "c": 0.9, "d": 0.505}, least=0.1)
    assert [name for name, _ in sorted(moved.items(), key=lambda item: item[1])] == ["a", "d", "b", "c"]
    assert moved["c"] == 0.9
    assert (moved["a"] + moved["b"] + moved["d"]) / 3 == pytest.approx(0.505)
    heights = sorted(moved.values())
    assert all(high - low >= 0.1 - 1e-9 for low, high in pairwise(heights))
