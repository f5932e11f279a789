"""Parts that the tests of a search share: a space, a measure without a model, and numbers that it gives."""

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.comparison import list_selectors
from maskgit_pl.evaluation.search_space import SearchSpace, list_schedules

FID = "fid/classifier"
OWN = DecodingConfig(4, guidance={"name": "linear", "scale": 1.0})
SELECTORS = tuple(spec for _, spec in list_selectors())
SPACE = SearchSpace(OWN, SELECTORS, (2, 4, 8), list_schedules(), codebook_size=256, num_tokens=49, can_guide=True)


def numbers(fid: float) -> dict[str, float]:
    return {
        "class_agreement": 0.5,
        "diversity": 0.8,
        FID: fid,
        "kid/classifier": fid / 10,
        "steps_taken": 4.0,
        "seconds_per_image": 0.01,
    }
