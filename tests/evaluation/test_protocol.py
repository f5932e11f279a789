from pathlib import Path

import pytest
import torch

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.classifier import Classifier, ClassifierConfig, Judgement
from maskgit_pl.evaluation.metrics import FeatureDistances
from maskgit_pl.evaluation.protocol import (
    Protocol,
    check_data,
    check_decoding,
    judge_real_images,
    measure_decoding,
    real_floor,
)
from maskgit_pl.pipeline import MaskGIT
from tests.conftest import save_tiny_pretrained

PROTOCOL = Protocol(num_images=14, batch_size=5)


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


@pytest.fixture(scope="module")
def data(tiny_shards: Path) -> ShardData:
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1, validation_batch=10))
    data.setup()
    return data


def in_three_steps(pipe: MaskGIT, **settings: float) -> DecodingConfig:
    return pipe.decoding_with(num_steps=3, **settings)


class Oracle(Classifier):
    """Knows what was asked: the n-th image it ever sees has the n-th label."""

    def __init__(self, labels: list[int]) -> None:
        super().__init__(1, 8, 3, ClassifierConfig(width=4))
        self.labels = labels

    def judge(self, images: torch.Tensor, *, batch_size: int = 500) -> Judgement:
        seen, self.labels = self.labels[: len(images)], self.labels[len(images) :]
        return Judgement(torch.tensor(seen), super().judge(images).features)


def test_every_val_image_is_judged_once(data: ShardData) -> None:
    done: list[int] = []
    real = judge_real_images(Classifier(1, 8, 3), data, on_images=done.append)
    assert sum(done) == len(real.labels) == len(real.judgement.classes) == 24
    assert real.labels.bincount().tolist() == [8, 8, 8]
    assert 0 <= real.accuracy <= 1


def test_a_judge_that_agrees_everywhere_gives_agreement_one(pipe: MaskGIT, data: ShardData) -> None:
    real = judge_real_images(Classifier(1, 8, 3, ClassifierConfig(width=4)), data)
    asked = PROTOCOL.labels(3)
    assert asked == [0] * 4 + [1] * 4 + [2] * 4
    steps: list[int] = []
    decoding = in_three_steps(pipe)
    samples = measure_decoding(pipe, Oracle(asked), real, PROTOCOL, decoding, on_step=lambda: steps.append(1))
    assert samples.class_agreement == 1
    assert samples.labels.tolist() == asked
    assert samples.guidance_scales == (0.0, 0.5, 1.0)
    assert len(steps) == 3 * 3  # batches of 5, 5 and 2
    always_the_last = measure_decoding(pipe, Oracle([2] * 12), real, PROTOCOL, decoding)
    assert always_the_last.class_agreement == pytest.approx(1 / 3)


def test_the_images_measured_are_those_that_the_seed_says(pipe: MaskGIT, data: ShardData) -> None:
    real = judge_real_images(Classifier(1, 8, 3), data)
    samples = measure_decoding(pipe, Classifier(1, 8, 3), real, PROTOCOL, in_three_steps(pipe, guidance_scale=0.0))
    alone = pipe.generate(PROTOCOL.labels(3), num_steps=3, guidance_scale=0.0, output_type="pt")
    assert (samples.images.int() - alone.int()).abs().max() <= 1
    assert samples.guidance_scales == (0.0, 0.0, 0.0)


def test_distances_are_those_of_the_judge_s_features(pipe: MaskGIT, data: ShardData) -> None:
    judge = Classifier(1, 8, 3)
    real = judge_real_images(judge, data)
    samples = measure_decoding(pipe, judge, real, PROTOCOL, in_three_steps(pipe))
    expected = FeatureDistances(real.judgement.features)(judge.judge(samples.images).features)
    assert samples.distances == expected
    assert samples.numbers()["fid/classifier"] == expected.fid
    assert samples.steps_taken == 3


def test_the_floor_is_the_distance_of_as_many_real_images(data: ShardData) -> None:
    judge = Classifier(1, 8, 3)
    real = judge_real_images(judge, data)
    floor, again, all_of_them = (real_floor(judge, data, real, num_images=count) for count in (30, 30, 1000))
    assert floor == again
    assert (floor.images, all_of_them.images) == (30, 60)  # there are 60
    assert 0 < all_of_them.fid < floor.fid


def test_a_selector_that_ends_early_takes_fewer_steps(pipe: MaskGIT, data: ShardData) -> None:
    judge = Classifier(1, 8, 3)
    real = judge_real_images(judge, data)
    decoding = DecodingConfig(8, {"name": "entropy", "gamma": 1000.0})
    assert measure_decoding(pipe, judge, real, PROTOCOL, decoding).steps_taken == 1


@pytest.mark.parametrize(
    ("decoding", "match"),
    [
        (DecodingConfig(17), "num_steps: at most the 16 tokens"),
        (DecodingConfig(4, "confidnce"), "did you mean 'confidence'"),
        (DecodingConfig(4, guidance={"name": "constant", "scale": -1.0}), "scale must be a number in"),
    ],
)
def test_a_decoding_that_cannot_be_is_refused_before_any_work(
    pipe: MaskGIT, decoding: DecodingConfig, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        check_decoding(pipe, decoding)


def test_guidance_of_a_model_without_a_null_class_is_refused_before_any_work(tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path, class_dropout=0.0))
    check_decoding(pipe, pipe.decoding)
    with pytest.raises(ValueError, match="no null class"):
        check_decoding(pipe, DecodingConfig(4, guidance={"name": "constant", "scale": 1.0}))


def test_numbers_out_of_range_are_refused() -> None:
    for name in ("num_images", "batch_size"):
        with pytest.raises(ValueError, match=f"evaluation {name}: at least 1"):
            Protocol(**{name: 0})
    with pytest.raises(ValueError, match="at least 2 for each of the 10 classes"):
        Protocol(num_images=19).labels(10)


def test_data_of_other_classes_are_refused(pipe: MaskGIT, data: ShardData, monkeypatch) -> None:
    check_data(pipe, data)
    monkeypatch.setattr(type(pipe), "class_names", ("a", "b"))
    with pytest.raises(ValueError, match="the classes must be the model's"):
        check_data(pipe, data)
