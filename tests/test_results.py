"""The pages that ``results/`` holds are those that the code makes of the rows beside them.

``python -m tests.test_results`` writes them anew, e.g. after a published number was corrected.
"""

import csv
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from maskgit_pl.evaluation.bench.ledger import REAL, Row
from maskgit_pl.evaluation.reports import figure4
from maskgit_pl.evaluation.reports.figure4 import Timing
from maskgit_pl.evaluation.reports.tables import Page, ScheduleResult, as_csv, table_1, table_2, table_3
from maskgit_pl.schedules import mask_schedules

RESULTS = Path(__file__).parents[1] / "results"
TABLES = RESULTS / "fashion-mnist"


def rows(kind: str, **wanted: str) -> list[Row]:
    with (RESULTS / f"{kind}.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    return [row for row in found if all(row[name] == value for name, value in wanted.items())]


def command(file: Path) -> str:
    return file.read_text().splitlines()[2].strip()


def schedule_result(run: str) -> ScheduleResult:
    first = rows("samples", run=run, seed="0", num_images="1000", network="classifier")
    curve = {int(row["num_steps"]): float(row["fid"]) for row in first}
    best = min(curve, key=lambda steps: curve[steps])
    fresh = {row["network"]: row for row in rows("samples", run=run, seed="1000", num_steps=str(best))}
    (likelihood,) = rows("likelihood", run=run)
    name = run.removeprefix("fashion-mnist-")
    return ScheduleResult(name, run, best, curve, fresh, likelihood, mask_schedules.build(name))


def timings() -> list[Timing]:
    names = [field.name for field in fields(Timing)]
    made = []
    for row in rows("timing"):
        numbers = {"seconds": float(row["seconds_per_image"]), "least": float(row["least"]), "runs": int(row["runs"])}
        counts = {name: int(row[name]) for name in ("num_tokens", "num_steps")}
        made.append(Timing(**{name: row[name] for name in names if name in row} | numbers | counts))
    order = list(figure4._METHODS)
    return sorted(made, key=lambda timing: (timing.num_tokens, order.index(timing.method)))


def page(name: str) -> Page:
    if name == "table-1":
        samples = rows("samples", num_images="2000")
        models = sorted(samples, key=lambda row: row["model"] == REAL)
        return table_1(models, rows("cas"), command=command(TABLES / "table-1.md"))
    if name == "table-2":
        return table_2(rows("editing"), command=command(TABLES / "table-2.md"))
    if name == "table-3":
        results = [schedule_result(row["run"]) for row in rows("likelihood")]
        return table_3(results, command=command(TABLES / "table-3.md"))
    made = timings()
    return Page(
        figure4.as_markdown(made, command(RESULTS / "figure-4.md")), as_csv([asdict(timing) for timing in made])
    )


PAGES = {"table-1": TABLES, "table-2": TABLES, "table-3": TABLES, "figure-4": RESULTS}
PICTURES = {"table-1": "table-1", "table-2": "table-2", "table-3": "figure-8"}


def texts(name: str) -> dict[Path, str]:
    made, picture = page(name), PICTURES.get(name)
    shown = "" if picture is None else f"\n![{picture}]({picture}.png)\n"
    return {PAGES[name] / f"{name}.md": made.markdown + shown, PAGES[name] / f"{name}.csv": made.csv}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_ledger_makes(name: str) -> None:
    for file, text in texts(name).items():
        assert file.read_text() == text, f"{file}: `python -m tests.test_results` writes it anew"


if __name__ == "__main__":
    for name in PAGES:
        for file, text in texts(name).items():
            file.write_text(text)
    figure4.draw(timings(), RESULTS / "figure-4.png")
    sys.exit()
