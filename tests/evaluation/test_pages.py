from functools import cache
from pathlib import Path

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.ablation_page import make_ablation_page
from maskgit_pl.evaluation.pages import Page, heading
from maskgit_pl.evaluation.tuning import Trial, TuningResult, make_page
from paper.table_1 import make_generation_page
from paper.table_2 import make_editing_page
from paper.table_3 import ScheduleResult, make_schedule_page
from tests.evaluation import test_ablation_page, test_tuning
from tests.hostile_words import HOSTILE
from tests.test_errors import structure

REAL = {"fid": 0.5, "kid": 0.0, "class_agreement": 0.9, "num_images": 12}


def test_a_page_is_written_to_its_folder(tmp_path: Path) -> None:
    page = Page("table-1", ["# Table"], [{"a": 1}, {"b": 0.5}], {"table-1.png": b"png"}, tmp_path / "own")
    files = page.write()
    assert files == [tmp_path / "own" / name for name in ("table-1.md", "table-1.csv", "table-1.png")]
    assert [file.read_bytes() for file in files] == [b"# Table\n", b"a,b\n1,\n,0.5\n", b"png"]


@pytest.mark.parametrize(("words", "line"), [
    (["/env/bin/maskgit", "compare", "runs/a b", "--seed", "3"], "    maskgit compare 'runs/a b' --seed 3"),
    (["/here/paper/table_1.py", "runs/a b"], "    python -m paper.table_1 'runs/a b'"),
    (["/env/maskgit_pl/__main__.py", "tune", "\x1b[31m"], "    maskgit tune '\\x1b[31m'"),
    (["/env/pytest/__main__.py", "-q"], None),
])  # fmt: skip
def test_a_page_tells_the_command_as_it_was_typed(words, line, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", words)
    assert heading("Page") == ["# Page", "", *([] if line is None else [line, ""])]


def row(model: str, network: str, **numbers: object) -> dict[str, object]:
    common = {"run": "run-a", "num_images": 100, "real_images": 500, "num_steps": 8,
              "parameters": 850_000, "seconds_per_image": 0.015, "commit": "a" * 40, "dataset": "shoes", "data": "f00",
              "split": "val", "date": "2026-01-02", "device": "cpu"}  # fmt: skip
    return {**common, "model": model, "network": network, **numbers}


def schedule_page(schedule: str, **facts: str) -> Page:
    """Returns the page of one run with a schedule."""
    own = {"run": schedule, "num_steps": 8, **facts}
    likelihood = {"masked_nll": 3.5, "masked_nll_error": 0.01, "elbo_bits_per_token": 5.25,
                  "elbo_bits_per_token_error": 0.02}  # fmt: skip
    fresh = {"classifier": row("MaskGIT", "classifier", fid=1.0, **{"is": 6.0}, **own),
             "lite0": row("MaskGIT", "lite0", fid=90.0, **own)}  # fmt: skip
    return make_schedule_page([ScheduleResult(schedule, {4: 2.0, 8: 0.9}, fresh, likelihood)])


def test_pages_name_the_reference() -> None:
    file = {"split": "", "reference_file": "imagenet.npz", "real_images": None}
    for changes, compared in (({}, "500 real images of the val split"), (file, "the statistics of imagenet.npz")):
        tasks = [row("MaskGIT", "lite0", fid=1.0, task="outpaint-right", **changes)]
        for page in (make_generation_page(tasks, []), make_editing_page(tasks)):
            assert f"compared with {compared}" in " ".join(page.markdown.split())


@cache
def pages(word: str) -> list[Page]:
    """Returns a page of each kind, with all words of its rows replaced by one word."""
    words = dict.fromkeys(("model", "run", "network", "commit", "dataset", "data", "split", "date", "device"), word)
    rows = [{**row("", ""), **words, "fid": 1.5, "task": task} for task in ("outpaint-right", "inpaint-centre")]
    cas = {**rows[0], "classifier": word, "training_images": 5, "training_steps": 4, "top1": 0.8, "top5": 0.9}
    facts = {name: word for name in words if name not in ("model", "run", "network")}
    trials = [Trial(number, DecodingConfig(8, word), test_tuning.numbers(2.0 - number / 9)) for number in range(2)]
    protocol = {**test_ablation_page.PROTOCOL, "machine": word, "dataset": word, "decoding": word,
                "variants": ["base", word], "base": {word: word}, "of": word, "at": [word]}  # fmt: skip
    variants = [
        test_ablation_page.row("base", 0, 2.0, protocol, best_steps=4, fid_by_steps={"4": 2.0}),
        test_ablation_page.row(word, 0, 3.0, protocol),
        test_ablation_page.row(word, 1, None, protocol, failure=word),
    ]
    return [
        make_generation_page(rows, [cas]),
        make_editing_page(rows),
        schedule_page(word, **facts),
        make_page(TuningResult("fid/classifier", tuple(trials), tuple(trials), 10), REAL),
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
