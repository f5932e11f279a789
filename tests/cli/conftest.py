import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.evaluation import classifier
from maskgit_pl.evaluation.options import ClassifierConfig
from tests.cli.commands import pixels

QUICK = replace(ClassifierConfig(), width=4, max_steps=3, batch=20)


@pytest.fixture
def run_folder(tiny_pretrained: Path, tmp_path: Path) -> Path:
    """A run of its own for each test, with the tiny model in it."""
    shutil.copytree(tiny_pretrained, tmp_path / "run" / "pretrained")
    return tmp_path / "run"


@pytest.fixture
def quick_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers are trained for a moment."""
    monkeypatch.setattr(classifier, "SMALL_TRAINING", QUICK)


@pytest.fixture(scope="module")
def judge(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that was trained before, for a moment."""
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    folder = tmp_path_factory.mktemp("judge")
    classifier.obtain_classifier(folder, data, config=QUICK)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A grey picture of 8 x 8 pixels, to be edited."""
    Image.fromarray(pixels().numpy()).save(tmp_path / "image.png")
    return tmp_path / "image.png"
