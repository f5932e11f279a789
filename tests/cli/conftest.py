import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.evaluation import classifier
from maskgit_pl.evaluation.options import ClassifierConfig
from tests.cli.commands import Answer, pixels
from tests.conftest import tiny_flags

QUICK = replace(ClassifierConfig(), width=4, max_steps=3, batch=20)


@pytest.fixture
def maskgit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs a command in this process."""

    def call(*words: object) -> Answer:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's own
            code = int(stop.code or 0)
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def train(
    maskgit: Callable[..., Answer], tiny_shards: Path, tiny_pretrained: Path, runs: Path
) -> Callable[..., Answer]:
    """Trains a stage of the run ``one`` with tiny sizes; words that are given later count."""

    def call(stage: str, *more: object) -> Answer:
        tokenizer = ("--tokenizer", tiny_pretrained / "tokenizer") if stage == "transformer" else ()
        where = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one", *tokenizer)
        return maskgit("train", stage, *where, *tiny_flags(stage), *more)

    return call


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
