from dataclasses import replace

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decoders.tuning import Found, Trial
from maskgit_pl.evaluation.decoders.tuning_report import as_markdown
from maskgit_pl.evaluation.metrics import Distances
from tests.evaluation.decoders.searching import FID, FIGURE, OWN, numbers
from tests.hostile_words import HOSTILE
from tests.test_text import structure


def test_the_page_says_what_won_and_how_good_it_was_before() -> None:
    own, other = Trial(0, OWN, numbers(2.0)), Trial(7, DecodingConfig(8, "halton"), numbers(1.5))
    floor = Distances(0.5, 0.0, 0.0, 20)
    options = {"key": FID, "command": "maskgit tune runs/x", "floor": floor, "accuracy": 0.9, "num_images": 10}
    page = as_markdown(Found((own, other), (own, other), other, 20, 0), **options, figure=FIGURE)
    assert "Trial 7 wins: fid/classifier 2 before, 1.5 now" in page
    assert '"token_selector": "halton"' in page
    assert "| cosine (trained) | 3.000 | **2.000** |" in page
    assert "Best: cosine at T = 4, 2.000" in page
    page = as_markdown(Found((own, other), (own, other), own, 20, 0), **options, figure=None)
    assert "nothing is changed" in page
    assert "json" not in page


@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=lambda word: ascii(word[:30]))
def test_no_name_of_a_schedule_or_selector_becomes_markup(word: str) -> None:
    def page(name: str) -> list[str]:
        trials = Trial(0, DecodingConfig(8, name), numbers(2.0)), Trial(7, DecodingConfig(8, name), numbers(1.5))
        figure = replace(FIGURE, curves={name: FIGURE.curves["cosine"], "log": FIGURE.curves["log"]}, trained=name)
        options = {"key": FID, "command": name, "floor": Distances(0.5, 0.0, 0.0, 20), "accuracy": 0.9}
        text = as_markdown(Found(trials, trials, trials[1], 20, 0), **options, num_images=10, figure=figure)
        assert all(line.isprintable() for line in text.split("\n"))
        return [each for each in structure(text) if each != "code_inline"]

    assert page(word) == page("name")
