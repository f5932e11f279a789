from functools import cache
from pathlib import Path

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.ablation_page import make_ablation_page
from maskgit_pl.evaluation.pages import Page, heading
from maskgit_pl.evaluation.tables import make_editing_page, make_generation_page
from maskgit_pl.evaluation.tuning import Trial, TuningResult, make_page
from tests.evaluation import test_ablation_page, test_comparison, test_schedule_table, test_tables, test_tuning
from tests.hostile_words import HOSTILE
from tests.test_errors import structure


def test_a_page_is_written_to_its_folder(tmp_path: Path) -> None:
    page = Page("table-1", ["# Table"], [{"a": 1}, {"b": 0.5}], {"table-1.png": b"png"}, tmp_path / "own")
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


@cache
def pages(word: str) -> list[Page]:
    """Returns a page of each kind, with all words of its rows replaced by one word."""
    words = dict.fromkeys(("model", "run", "network", "commit", "dataset", "data", "split", "date", "device"), word)
    rows = [
        {**test_tables.row("", ""), **words, "fid": 1.5, "task": task} for task in ("outpaint-right", "inpaint-centre")
    ]
    cas = {**rows[0], "classifier": word, "training_images": 5, "training_steps": 4, "top1": 0.8, "top5": 0.9}
    facts = {name: word for name in words if name not in ("model", "run", "network")}
    trials = [Trial(number, DecodingConfig(8, word), test_tuning.numbers(2.0 - number / 9)) for number in range(2)]
    protocol = {**test_ablation_page.PROTOCOL, "machine": word, "dataset": word, "decoding": word,
                "variants": ["base", word], "base": {word: word}}  # fmt: skip
    variants = [
        test_ablation_page.row("base", 0, 2.0, protocol),
        test_ablation_page.row(word, 0, 3.0, protocol),
        test_ablation_page.row(word, 1, None, protocol, failure=word),
    ]
    return [
        make_generation_page(rows, [cas]),
        make_editing_page(rows),
        test_schedule_table.page((word, 1.0, 8), **facts),
        test_comparison.page_of([test_comparison.measured(word, 8, 2.0)]),
        make_page(TuningResult("fid/classifier", tuple(trials), tuple(trials), 10), test_comparison.REAL),
        make_ablation_page("x", variants),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=lambda word: ascii(word[:30]))
def test_no_word_of_a_ledger_becomes_markup(word: str) -> None:
    for page, plain in zip(pages(word), pages("name"), strict=True):
        of_page, of_plain = (
            [kind for kind in structure(each.markdown) if kind != "code_inline"] for each in (page, plain)
        )
        assert of_page == of_plain
        assert all(line.isprintable() for line in page.markdown.split("\n"))
