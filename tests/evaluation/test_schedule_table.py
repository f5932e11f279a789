import csv
import io
from typing import Any

from maskgit_pl.evaluation.pages import Page
from maskgit_pl.evaluation.schedule_table import ScheduleResult, make_schedule_page
from tests.evaluation.test_tables import row


def page(*runs: tuple[str, float, int], **words: Any) -> Page:
    """Returns the page of runs with a schedule, a FID and a best T, each."""
    results = []
    for number, (schedule, fid, best) in enumerate(runs):
        own = {"run": f"{schedule}-{number}", "num_steps": best, **words}
        likelihood = {"masked_nll": 3.5, "masked_nll_error": 0.01, "elbo_bits_per_token": 5.25,
                      "elbo_bits_per_token_error": 0.02}  # fmt: skip
        fresh = {"classifier": row("MaskGIT", "classifier", fid=fid, **{"is": 6.0}, **own),
                 "lite0": row("MaskGIT", "lite0", fid=90.0, **own)}  # fmt: skip
        results.append(ScheduleResult(schedule, {4: fid + 1, best: fid - 0.1}, fresh, likelihood))
    return make_schedule_page(results)


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_seeds_of_a_schedule_share_a_line_with_mean_and_range() -> None:
    table = page(("cosine", 2.0, 8), ("cosine", 3.0, 12), ("linear", 5.0, 8), ("linear", 5.5, 8))
    assert cells(table.markdown, "| `cosine`")[2:4] == ["8, 12", "2.50 (2.00 to 3.00)"]
    assert "models of its own from 2 seeds" in " ".join(table.markdown.split())
    read = list(csv.DictReader(io.StringIO(table.csv)))
    assert [(each["run"], each["best_steps"]) for each in read][:2] == [("cosine-0", "8"), ("cosine-1", "12")]
    assert read[0]["fid/classifier at T = 4"] == "3.0"
