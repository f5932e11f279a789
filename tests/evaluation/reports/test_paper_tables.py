import csv
import io
import math

import pytest
import torch

from maskgit_pl.evaluation.ledger import REAL
from maskgit_pl.evaluation.reports.paper_tables import (
    FORMULAS,
    compare_with_paper,
    make_editing_page,
    make_generation_page,
    make_schedule_page,
)
from maskgit_pl.evaluation.reports.schedule_ablation import EDITING, GENERATION, SCHEDULES, ScheduleResult
from maskgit_pl.schedules import mask_schedules
from tests.hostile_words import HOSTILE
from tests.test_errors import structure


def row(model: str, network: str, **numbers: object) -> dict[str, object]:
    common = {"run": "" if model == REAL else "run-a", "num_images": 100, "real_images": 500, "num_steps": 8,
              "parameters": 850_000, "seconds_per_image": 0.015, "commit": "a" * 40, "dataset": "shoes", "data": "f00",
              "split": "val", "date": "2026-01-02", "device": "cpu"}  # fmt: skip
    return {**common, "model": model, "network": network, **numbers}


def cells(page: str, start: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def result(schedule: str, fid: float, *, best: int = 8) -> ScheduleResult:
    likelihood = {"masked_nll": 3.5, "masked_nll_error": 0.01, "elbo_bits_per_token": 5.25}
    fresh = {
        "classifier": row("MaskGIT", "classifier", fid=fid, **{"is": 6.0}),
        "lite0": row("MaskGIT", "lite0", fid=90),
    }
    built = mask_schedules.build("cosine")  # which one, a table does not look at
    return ScheduleResult(schedule, f"shoes-{schedule}", best, {4: fid + 1, best: fid - 0.1}, fresh, likelihood, built)


def test_each_network_has_a_table_of_its_own() -> None:
    page = make_generation_page(
        [row("MaskGIT", "classifier", fid=1.234, **{"is": 5.5}), row(REAL, "classifier", fid=0.1, **{"is": 9.0}),
         row("MaskGIT", "lite0", fid=77.7), row(REAL, "lite0", fid=66.6)],
        [{**row("MaskGIT", ""), "classifier": "resnet18", "training_images": 5000, "training_steps": 400,
          "top1": 0.8, "top5": 0.99}],
        command="maskgit table 1 runs/a",
    )  # fmt: skip
    first, second = page.markdown.split("## In the features of ")[1:]
    assert "FID (classifier)" in first
    assert "1.23" in first
    assert "77.70" not in first
    assert "IS" not in second.split("## ")[0]  # lite0 does not know the classes
    assert "80.00" in second
    assert "    maskgit table 1 runs/a" in page.markdown
    assert page.markdown.count("MaskGIT") >= 4
    read = list(csv.DictReader(io.StringIO(page.csv)))
    assert [each["fid"] for each in read] == ["1.234", "0.1", "77.7", "66.6", ""]


def test_every_published_row_is_printed() -> None:
    page = make_generation_page([row("MaskGIT", "lite0", fid=1.0)], [], command="x").markdown
    for published in GENERATION:
        assert f"| {published.model} | {published.size} | {published.fid:.2f} |" in page
    tasks = [row("MaskGIT", "lite0", fid=1.0, task=task) for task in ("outpaint-right", "inpaint-centre")]
    page = make_editing_page(tasks, command="x").markdown
    for edited in EDITING:
        assert f"| {edited.model} | {edited.size} | {edited.fid:.2f} | {edited.inception_score:.2f} |" in page


def test_pages_name_the_reference_and_the_feature_networks() -> None:
    digests = {
        "reference": "0123456789abcdef",
        "judge": "fedcba9876543210",
        "tokenizer": "aa" * 8,
        "transformer": "b" * 16,
    }
    file = {"split": "", "reference_file": "imagenet.npz", "real_images": None}
    for changes, compared in (({}, "500 real images of the val split"), (file, "the statistics of imagenet.npz")):
        tasks = [row("MaskGIT", "lite0", fid=1.0, task="outpaint-right", **{**digests, **changes})]
        for page in (
            make_generation_page(tasks, [], command="x").markdown,
            make_editing_page(tasks, command="x").markdown,
        ):
            said = " ".join(page.split())
            assert f"compared with {compared}" in said
            assert f"Reference: {changes.get('reference_file', 'the val split')} 01234567." in said
            assert "feature networks: lite0 fedcba98." in said
            assert "`run-a` tokenizer aaaaaaaa, transformer bbbbbbbb." in said
    old = " ".join(
        make_editing_page([row("MaskGIT", "lite0", fid=1.0, task="outpaint-right")], command="x").markdown.split()
    )
    assert "feature networks: lite0 not recorded." in old


def test_table_3_shows_our_values_next_to_the_paper_s_in_its_order() -> None:
    page = make_schedule_page([result("cosine", 2.0), result("log", 9.0, best=24)], command="maskgit ablation").markdown
    assert page.index("| `cosine`") < page.index("| `log`")
    assert cells(page, "| `cosine`") == [
        "`cosine`", "cos(pi r / 2)", "8", "2.00", "90.00", "6.00", "3.500 ± 0.010", "5.250", "10", "6.06", "181.5",
        "4.22",
    ]  # fmt: skip


def test_a_schedule_that_the_paper_does_not_have_also_gets_a_row() -> None:
    page = make_schedule_page([result("cosine", 2.0), result("sine", 3.0)], command="x").markdown
    assert cells(page, "| `sine`")[-4:] == ["", "", "", ""]
    read = list(csv.DictReader(io.StringIO(make_schedule_page([result("sine", 3.0)], command="x").csv)))
    assert read[0]["fid/classifier at T = 4"] == "4.0"


@pytest.mark.parametrize(("fids", "verdict", "pairs"), [
    ({row.schedule: row.fid for row in SCHEDULES}, "holds here", "21 of 21"),
    ({row.schedule: -row.fid for row in SCHEDULES}, "does not hold here", "0 of 21"),
    ({"cosine": 1.0, "square": 3.0, "linear": 2.0}, "does not hold here", "2 of 3"),
])  # fmt: skip
def test_the_paper_s_order_is_judged_pair_by_pair(fids: dict[str, float], verdict: str, pairs: str) -> None:
    text = " ".join(compare_with_paper(fids, "classifier"))
    assert verdict in text
    assert f"{pairs} pairs" in text
    assert "cannot be compared" in compare_with_paper({"cosine": 1.0}, "classifier")[0]


@pytest.mark.parametrize("name", FORMULAS)
def test_the_printed_formulas_are_those_of_the_schedules(name: str) -> None:
    formula = FORMULAS[name].replace("^", "**").replace("-log2(r)", "-log2(max(r, 1 / N))").replace("(N) (", "(N) * (")
    formula = formula.replace("pi r", "pi * r")
    names = {"log2": math.log2, "cos": math.cos, "pi": math.pi, "max": max, "N": 49, "__builtins__": {}}
    for progress in (0.1, 0.5, 0.9):
        expected = float(eval(formula, {**names, "r": progress}))  # of this file's own text
        ratio = mask_schedules.build(name)(torch.tensor([progress]), 49)
        assert float(ratio) == pytest.approx(expected, abs=1e-5)


def pages(word: str) -> list[str]:
    """Returns every page, with all words of its rows replaced by one word."""
    words = dict.fromkeys(("model", "run", "network", "commit", "dataset", "data", "split", "date", "device"), word)
    rows = [{**row("", ""), **words, "fid": 1.5, "task": task} for task in ("outpaint-right", "inpaint-centre")]
    cas = {**rows[0], "classifier": word, "training_images": 5, "training_steps": 4, "top1": 0.8, "top5": 0.9}
    likelihood = {"masked_nll": 3.5, "masked_nll_error": 0.01, "elbo_bits_per_token": 5.25}
    found = ScheduleResult(word, word, 8, {8: 1.0}, {word: rows[0]}, likelihood, mask_schedules.build("cosine"))
    made = (
        make_generation_page(rows, [cas], command=word),
        make_editing_page(rows, command=word),
        make_schedule_page([found], command=word),
    )
    return [page.markdown for page in made]


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=lambda word: ascii(word[:30]))
def test_no_word_of_the_ledger_becomes_markup(word: str) -> None:
    for page, plain in zip(pages(word), pages("name"), strict=True):
        of_page, of_plain = ([each for each in structure(text) if each != "code_inline"] for text in (page, plain))
        assert of_page == of_plain
        assert all(line.isprintable() for line in page.split("\n"))
