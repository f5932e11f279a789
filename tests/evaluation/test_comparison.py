import csv
import io
import json
from typing import Any

from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.comparison import label_selectors, make_comparison_page
from maskgit_pl.evaluation.pages import Page

OWN = {"name": "confidence", "choice_temperature": 9.0}
REAL = {"fid": 0.5, "kid": 0.0, "class_agreement": 0.9, "num_images": 12}


def measured(label: str, steps: int, fid: float, **columns: Any) -> dict[str, Any]:
    columns = {"class_agreement": 0.5, "diversity": 0.8, "seconds_per_image": 0.01, **columns}
    facts = {"tokenizer": "aaaaaaaa1", "transformer": "bbbbbbbb1", "judge": "cccccccc1", "network": "classifier",
             "device": "a machine", "real_images": 24, "run": "x", "num_images": 12,
             "seed": 0, "decoding": {"token_selector": label}}  # fmt: skip
    return {"selector": label, "num_steps": steps, "fid": fid, "kid": fid / 10, **facts, **columns}


ROWS = [
    measured("confidence", 8, 2.0),
    measured("random", 8, 3.0),
    measured("confidence", 4, 5.0),
    measured("random", 4, 4.0),
]


def page_of(rows: list[dict[str, Any]]) -> Page:
    return make_comparison_page(rows, REAL, sheet_steps=8)


def test_names_take_the_model_s_choice_temperature_and_mappings_do_not() -> None:
    labelled = label_selectors(["margin", "halton"], OWN)
    assert labelled == {"margin": {"name": "margin", "choice_temperature": 9.0}, "halton": "halton"}
    every = label_selectors(None, OWN)
    assert list(every) == token_selectors.names()
    assert every["remdm"] == {"name": "remdm", "choice_temperature": 9.0}
    mapping = {"name": "remdm", "eta": 0.4}
    assert label_selectors([mapping], OWN) == {"remdm (eta 0.4)": mapping}


def test_tables_show_every_row_and_the_lowest_distance_of_each_t_in_bold() -> None:
    made = page_of(ROWS)
    page = made.markdown
    assert "| confidence | 5.00 | **2.00** |" in page
    assert "| random | **4.00** | 3.00 |" in page
    assert "| real images, 12 | 0.50 | 0.50 |" in page
    read = list(csv.DictReader(io.StringIO(made.csv)))
    assert (read[0]["num_steps"], read[0]["selector"], read[0]["fid"]) == ("4", "random", "4.0")
    assert json.loads(read[0]["decoding"])["token_selector"] == "random"
