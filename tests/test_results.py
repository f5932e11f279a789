"""The pages in ``results/`` are those that the code makes from the ledger.

``python -m tests.test_results`` regenerates them, e.g. after a change of the text.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from maskgit_pl.evaluation.ablation_page import make_ablation_page
from maskgit_pl.evaluation.ledger import Ledger, Row
from maskgit_pl.evaluation.pages import Page
from paper.figure_4 import METHODS, make_timing_page
from paper.table_1 import OTHER_STEPS, SETTINGS, make_generation_page
from paper.table_2 import make_editing_page
from paper.table_3 import SCHEDULES, make_schedule_page, read_results

RESULTS = Path(__file__).parents[1] / "results"
TABLES = RESULTS / "fashion-mnist"
ABLATIONS = RESULTS / "ablations"
LEDGER = Ledger(RESULTS / "ledger.jsonl")
OF_ABLATIONS = Ledger(ABLATIONS / "ledger.jsonl").rows("ablation")


def rows(measurement: str, **columns: Any) -> list[Row]:
    return [row for row in LEDGER.rows(measurement) if columns.items() <= row.items()]


def of_table_1(measurement: str, **columns: Any) -> list[Row]:
    """Returns the last measurements of the runs that the command of the page names, and of real images."""
    command = (TABLES / "table-1.md").read_text().splitlines()[2]
    runs = [*(Path(word).name for word in command.split() if word.startswith("runs/")), ""]
    last = {
        (row["run"], row.get("network"), row.get("num_steps")): row
        for row in rows(measurement, **columns)
        if row["run"] in runs
    }
    return sorted(last.values(), key=lambda row: runs.index(row["run"]))


def page(file: Path) -> Page:
    """Makes a page again from its ledger, with the command that it states."""
    command = file.read_text().splitlines()[2].strip()
    with patch("maskgit_pl.evaluation.pages.typed_command", return_value=command):
        made = make_page(file.stem) if file in PAGES else make_page_of_ablation(file.stem)
    return replace(made, folder=file.parent)


def make_page(name: str) -> Page:
    if name == "table-1":
        costs = of_table_1("cost")
        marks = {row["run"]: {column: row[column] for column in SETTINGS} for row in costs}
        samples = [{**row, **marks.get(row["run"], {})} for row in of_table_1("samples", num_images=1000)]
        other_steps = [row for row in samples if row.get("purpose") == OTHER_STEPS]
        scores = [{**row, **marks.get(row["run"], {})} for row in of_table_1("cas")]
        return make_generation_page([row for row in samples if row not in other_steps], scores, costs, other_steps)
    if name == "table-2":
        return make_editing_page(rows("editing"))
    if name == "table-3":
        measured = {row["run"] for row in rows("likelihood")}
        runs = [run for name in SCHEDULES for run in sorted(measured) if f"mask_schedule-{name}-seed" in run]
        return make_schedule_page(read_results(LEDGER, runs, num_images=1000))
    return make_timing_page(sorted(rows("timing"), key=lambda row: (row["num_tokens"], METHODS.index(row["method"]))))


def make_page_of_ablation(name: str) -> Page:
    """Makes the page of the newest ablation of a name, from the last row of each of its variants and seeds."""
    of_name = [row for row in OF_ABLATIONS if row["ablation"] == name]
    variants = of_name[-1]["protocol"]["variants"]
    last = {(row["variant"], row["seed"]): row for row in of_name if row["protocol"]["variants"] == variants}
    return make_ablation_page(name, [*last.values()])


BY_TIME = ("ablation-sizes",)  # whose variants were trained for the same time; results/README.md tells how
OF_VARIANTS = sorted(file for file in ABLATIONS.glob("*/*.md") if file.stem not in BY_TIME)
PAGES = [*(TABLES / f"table-{number}.md" for number in (1, 2, 3)), RESULTS / "figure-4.md"]


@pytest.mark.parametrize(
    "file", [*PAGES, *(pytest.param(file, marks=pytest.mark.slow) for file in OF_VARIANTS)], ids=lambda file: file.stem
)
def test_the_page_is_the_one_that_the_ledger_gives(file: Path) -> None:
    made = page(file)
    assert file.read_text() == made.markdown, f"{file}: `python -m tests.test_results` regenerates it"
    assert file.with_suffix(".csv").read_text() == made.csv


if __name__ == "__main__":
    for file in [*PAGES, *OF_VARIANTS]:
        page(file).write()
    sys.exit()
