import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.comparison import (
    Comparison,
    MeasuredSelector,
    _introduce,
    draw_selector_sheet,
    label_selectors,
    list_selectors,
)
from maskgit_pl.evaluation.pages import Page
from maskgit_pl.pipeline import MaskGIT
from tests.evaluation.searching import numbers
from tests.hostile_words import HOSTILE
from tests.test_errors import structure

OWN = {"name": "confidence", "choice_temperature": 9.0}
REAL = {"fid/classifier": 0.5, "kid/classifier": 0.0, "class_agreement": 0.9, "num_images": 12}
ROW = {
    "tokenizer": "aaaaaaaa1",
    "transformer": "bbbbbbbb1",
    "judge": "cccccccc1",
    "mask_schedule": "Cosine()",
    "device": "a machine",
    "real_images": 24,
}


def measured(label: str, steps: int, fid: float) -> MeasuredSelector:
    return MeasuredSelector(label, DecodingConfig(steps, label), numbers(fid))


ROWS = (
    measured("confidence", 8, 2.0),
    measured("random", 8, 3.0),
    measured("confidence", 4, 5.0),
    measured("random", 4, 4.0),
)
COMPARISON = Comparison(ROWS, REAL, 12, 0)


def page_of(comparison: Comparison, command: str = "") -> Page:
    return comparison.page(command, _introduce(comparison, ROW))


def test_every_registered_selector_is_compared_and_remdm_with_each_strategy() -> None:
    labels = [label for label, _ in list_selectors()]
    assert {label.split()[0] for label in labels} == set(token_selectors.names())
    assert {"remdm cap", "remdm rescale", "remdm confidence", "remdm loop"} <= set(labels)


def test_names_take_the_model_s_choice_temperature_and_mappings_do_not() -> None:
    found = label_selectors(["margin", "halton"], OWN)
    assert found == {"margin": {"name": "margin", "choice_temperature": 9.0}, "halton": "halton"}
    remdm = label_selectors(None, OWN)["remdm loop"]
    assert remdm == {"name": "remdm", "strategy": "loop", "choice_temperature": 9.0}
    mapping = {"name": "remdm", "eta": 0.4}
    assert label_selectors([mapping], OWN) == {"remdm (eta 0.4)": mapping}
    assert label_selectors(["margin"], "halton") == {"margin": "margin"}  # there is none to take


def test_unknown_and_repeated_selectors_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'confidence'"):
        label_selectors(["confidnce"], OWN)
    with pytest.raises(ValueError, match="token selectors must be different, got margin twice"):
        label_selectors(["margin", "halton", "margin"], OWN)
    with pytest.raises(ValueError, match="unknown key 'eta'"):
        label_selectors([{"name": "margin", "eta": 1}], OWN)


def test_tables_show_every_row_and_the_lowest_distance_of_each_t_in_bold() -> None:
    page = page_of(COMPARISON, "maskgit compare runs/x").markdown
    assert "| confidence | 5.00 | **2.00** |" in page
    assert "| random | **4.00** | 3.00 |" in page
    assert "| real images, 12 | 0.50 | 0.50 |" in page
    assert "    maskgit compare runs/x\n" in page
    assert "tokenizer aaaaaaaa, transformer bbbbbbbb, classifier cccccccc." in page.replace("\n", " ")
    assert page.index("| 4 | random |") < page.index("| 4 | confidence |") < page.index("| 8 | confidence |")
    read = list(csv.DictReader(io.StringIO(page_of(COMPARISON).csv)))
    assert (read[0]["num_steps"], read[0]["selector"], read[0]["fid/classifier"]) == ("4", "random", "4.0")
    assert "| IS (classifier) |" not in page
    other = replace(COMPARISON, results=(replace(ROWS[0], numbers={**ROWS[0].numbers, "is/classifier": 3.0}),))
    assert "| IS (classifier) |" in page_of(other).markdown
    assert json.loads(read[0]["decoding"])["token_selector"] == "random"
    assert COMPARISON.table().row_count == 5
    stream = io.StringIO()
    Console(file=stream, width=120).print(COMPARISON.table())
    assert "class agreement" in stream.getvalue()


def test_an_unknown_time_is_an_empty_cell() -> None:
    row = replace(ROWS[0], numbers={name: value for name, value in numbers(1.0).items() if "seconds" not in name})
    made = replace(COMPARISON, results=(row,))
    assert "| 4.0 |  |" in page_of(made).markdown
    assert made.table().row_count == 2
    (read,) = csv.DictReader(io.StringIO(page_of(made).csv))
    assert read["seconds_per_image"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=lambda word: ascii(word[:30]))
def test_no_name_of_a_selector_becomes_markup(word: str) -> None:
    def page(name: str) -> list[str]:
        made = replace(COMPARISON, results=(replace(ROWS[0], label=name),))
        Console(file=io.StringIO()).print(made.table())
        text = page_of(made, name).markdown
        assert all(line.isprintable() for line in text.split("\n"))
        return structure(text)

    assert page(word) == page("name")


def test_the_sheet_shows_the_number_of_steps_nearest_to_eight() -> None:
    for steps, expected in (((4, 8, 16), 8), ((32, 2), 2)):
        rows = tuple(measured("random", number, 1.0) for number in steps)
        assert replace(COMPARISON, results=rows).sheet_steps == expected


def test_a_column_of_the_sheet_has_one_class_and_one_noise(tiny_pretrained: Path, monkeypatch) -> None:
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    made: list[torch.Tensor] = []
    generate = pipe.generate

    def kept(*args: object, **options: object) -> torch.Tensor:
        made.append(generate(*args, **options))
        return made[-1]

    monkeypatch.setattr(pipe, "generate", kept)
    decodings = {"a": DecodingConfig(2), "same as a": DecodingConfig(2), "b": DecodingConfig(2, "halton")}
    picture = draw_selector_sheet(pipe, decodings, seed=5)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], pipe.generate([0, 1, 2], decoding=DecodingConfig(2), seed=5, output_type="pt"))
    assert picture.width > 3 * 84
    assert picture.height > 3 * 84
