import json
from pathlib import Path

import pytest
import torch

from maskgit_pl.data import OnceThrough, ShardData
from maskgit_pl.evaluation import classifier as module
from maskgit_pl.evaluation.classifier import Classifier, ClassifierConfig, obtain_classifier, train_classifier

QUICK = ClassifierConfig(width=8, max_steps=250, batch=20)


@pytest.fixture
def data(tiny_shards: Path) -> ShardData:
    return ShardData(str(tiny_shards), image_size=8, in_channels=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [7, 28, 32, 64])
def test_any_size_and_colour_gives_features_and_classes(size: int, channels: int) -> None:
    judge = Classifier(channels, size, 5, ClassifierConfig(width=4))
    judgement = judge.judge(torch.zeros(3, channels, size, size, dtype=torch.uint8), batch_size=2)
    assert judgement.classes.shape == (3,)
    assert judgement.features.ndim == 2
    assert len(judgement.features) == 3


def test_learns_to_tell_brightness_on_held_out_images(data: ShardData) -> None:
    steps: list[int] = []
    judge = train_classifier(data, config=QUICK, on_step=lambda: steps.append(1))
    batch = data.batches("val", OnceThrough(24)).__getitems__(range(24))
    assert (judge.judge(batch.content).classes == batch.labels).float().mean() > 0.9
    assert len(steps) == QUICK.max_steps


def test_training_is_repeatable(data: ShardData) -> None:
    first, second = (train_classifier(data, config=ClassifierConfig(width=4, max_steps=5, batch=20)) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_second_run_reads_what_the_first_one_kept(data: ShardData, tmp_path: Path, monkeypatch) -> None:
    first = obtain_classifier(tmp_path / "judge", data, config=QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_classifier", lambda *args, **options: pytest.fail("trained again"))
        second = obtain_classifier(tmp_path / "judge", data, config=QUICK)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not second.training


def test_a_classifier_of_other_data_is_trained_again(data: ShardData, tmp_path: Path) -> None:
    config = ClassifierConfig(width=4, max_steps=2, batch=20)
    obtain_classifier(tmp_path, data, config=config)
    key = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**key, "data": "other"}))
    steps: list[int] = []
    obtain_classifier(tmp_path, data, config=config, on_step=lambda: steps.append(1))
    assert len(steps) == 2
    assert json.loads((tmp_path / "config.json").read_text()) == key
