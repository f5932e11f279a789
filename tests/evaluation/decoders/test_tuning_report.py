from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decoders.tuning import Found, Trial
from maskgit_pl.evaluation.decoders.tuning_report import as_markdown
from maskgit_pl.evaluation.metrics import Distances
from tests.evaluation.decoders.searching import FID, FIGURE, OWN, numbers


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
