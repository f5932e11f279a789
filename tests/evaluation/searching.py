"""Parts that the tests of a search share: a space, a measure without a model, and numbers that it gives."""

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.comparison import list_selectors
from maskgit_pl.evaluation.decoding_search import Curves, ScheduleCurves
from maskgit_pl.evaluation.search_space import SearchSpace

FID = "fid/classifier"
OWN = DecodingConfig(4, guidance={"name": "linear", "scale": 1.0})
SPACE = SearchSpace(OWN, tuple(spec for _, spec in list_selectors()), (2, 4, 8), 256, can_guide=True)


def numbers(fid: float) -> dict[str, float]:
    return {
        "class_agreement": 0.5,
        "diversity": 0.8,
        FID: fid,
        "kid/classifier": fid / 10,
        "steps_taken": 4.0,
        "seconds_per_image": 0.01,
    }


class FakeMeasure:
    """A quality that depends on the guidance scale and, where the images are few, on luck."""

    def __init__(self, luck: float = 0.0) -> None:
        self.calls: list[tuple[DecodingConfig, int, int]] = []
        self.luck = luck

    def __call__(self, decoding: DecodingConfig, num_images: int, seed: int, purpose: str) -> dict[str, float]:
        self.calls.append((decoding, num_images, seed))
        scale = decoding.guidance["scale"] if isinstance(decoding.guidance, dict) else 0.0
        lucky = self.luck if len(self.calls) % 3 == 0 and seed < 1000 else 0.0
        return numbers(1 + scale - lucky)


def curves(values: dict[str, list[float]]) -> Curves:
    return {name: {2 * (i + 1): numbers(value) for i, value in enumerate(line)} for name, line in values.items()}


CURVES = ScheduleCurves(
    curves({"cosine": [3.0, 2.0], "linear": [9.0, 8.0], "log": [40.0, 2.01]}), "cosine", "halton", 10
)
