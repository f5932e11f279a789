""""""

from pathlib import Path

import pytest

from maskgit_pl.evaluation.pages import Page, heading, markdown_table


def test_all_lines_of_a_table_have_the_same_number_of_cells() -> None:
    lines = markdown_table(["a", "b", "c"], [["x", "1", "2"]], left=1)
    assert lines == ["| a | b | c |", "|---|---:|---:|", "| x | 1 | 2 |"]


def test_a_page_is_written_to_its_folder(tmp_path: Path) -> None:
    page = Page("table-1", "# Table\n", [{"a": 1}, {"b": 0.5}], {"table-1.png": b"png"}, tmp_path / "own")
    files = page.write()
    assert files == [tmp_path / "own" / name for name in ("table-1.md", "table-1.csv", "table-1.png")]
    assert [file.read_bytes() for file in files] == [b"# Table\n", b"a,b\n1,\n,0.5\n", b"png"]


@pytest.mark.parametrize(("words", "line"), [
    (["/env/bin/maskgit", "table", "1", "runs/a b", "--seed", "3"], "    maskgit table 1 'runs/a b' --seed 3"),
    (["/env/maskgit_pl/__main__.py", "tune", "\x1b[31m"], "    maskgit tune '\\x1b[31m'"),
    (["/env/pytest/__main__.py", "-q"], None),
])  # fmt: skip
def test_a_page_tells_the_command_as_it_was_typed(words, line, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", words)
    assert heading("Page") == ["# Page", "", *([] if line is None else [line, ""])]
