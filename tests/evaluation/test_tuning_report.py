import io
from dataclasses import replace

import pytest
from rich.console import Console

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decoding_search import SearchResult, Trial, make_page, make_table
from tests.evaluation.searching import CURVES, FID, OWN, numbers
from tests.hostile_words import HOSTILE
from tests.test_text import structure

REAL = {FID: 0.5, "kid/classifier": 0.001, "class_agreement": 0.9, "num_images": 20}


def test_the_page_names_the_winner_and_the_value_before() -> None:
    own, other = Trial(0, OWN, numbers(2.0)), Trial(7, DecodingConfig(8, "halton"), numbers(1.5))
    result = SearchResult((own, other), (own, other), other, 20, 0, FID)
    page = make_page(result, REAL, command="maskgit tune runs/x", figure=CURVES).markdown
    assert "Trial 7 wins: fid/classifier was 2 and is now 1.5" in page
    assert "2 trials of 10 images were compared by fid/classifier (lower is better)" in page
    assert "have FID (classifier) 0.50 and KID x 1000 (classifier) 1.00." in page.replace("\n", " ")
    assert "| trial | decoding | FID (classifier) | class agreement % |" in page
    assert '"token_selector": "halton"' in page
    assert "| cosine (trained) | 3.000 | **2.000** |" in page
    assert "Best: cosine at T = 4, 2.000" in page
    page = make_page(replace(result, winner=own), REAL, command="maskgit tune runs/x", figure=None).markdown
    assert "Nothing was changed" in page
    assert "json" not in page


def test_the_table_shows_the_second_measurement_also_without_times() -> None:
    own = Trial(0, OWN, {name: value for name, value in numbers(2.0).items() if name != "seconds_per_image"})
    stream = io.StringIO()
    Console(file=stream, width=200).print(make_table(SearchResult((own,), (own,), own, 20, 0, FID)))
    assert "20 images each" in stream.getvalue()
    assert "2.000" in stream.getvalue()


@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=lambda word: ascii(word[:30]))
def test_no_name_of_a_schedule_or_selector_becomes_markup(word: str) -> None:
    def page(name: str) -> list[str]:
        trials = Trial(0, DecodingConfig(8, name), numbers(2.0)), Trial(7, DecodingConfig(8, name), numbers(1.5))
        figure = replace(CURVES, curves={name: CURVES.curves["cosine"], "log": CURVES.curves["log"]}, trained=name)
        result = SearchResult(trials, trials, trials[1], 20, 0, FID)
        text = make_page(result, REAL, command=name, figure=figure).markdown
        assert all(line.isprintable() for line in text.split("\n"))
        return [each for each in structure(text) if each != "code_inline"]

    assert page(word) == page("name")
