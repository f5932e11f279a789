import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from maskgit_pl.cli import _call, _parse, main
from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.evaluation import classifier
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.options import ClassifierConfig
from tests.conftest import save_tiny_pretrained, tiny_flags

QUICK = replace(ClassifierConfig(), width=4, max_steps=3, batch=20)


class Answer(NamedTuple):
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    error: str


def call_command(command: str, *words: object) -> int:
    """Runs a command without what ``main`` makes of an error."""
    return _call(_parse((command, *map(str, words))))


def refused(answer: Answer, *parts: str) -> None:
    """Checks for exit code 2 and one line that has all parts."""
    assert answer.code == 2, answer
    assert len(answer.error.splitlines()) == 1, answer.error
    for part in parts:
        assert part in answer.error


def pixels(height: int = 8, width: int = 8) -> torch.Tensor:
    """Returns (H, W) uint8, always the same."""
    return torch.randint(0, 256, (height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yields every command with its words, including subcommands."""
    yield " ".join(words), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from parsers(inner, (*words, word))


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
def own_judge(judge: Path, tmp_path: Path) -> None:
    """A classifier of the data in the place of those that the run ``tmp_path / "run"`` is measured with."""
    shutil.copytree(judge, tmp_path / "shards-classifier" / "small")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A grey picture of 8 x 8 pixels, to be edited."""
    Image.fromarray(pixels().numpy()).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    """Makes two runs with different weights; the second one has another schedule."""
    folders = [tmp_path / "runs" / name for name in ("shoes-square", "shoes-cosine")]
    for seed, folder in enumerate(folders):
        save_tiny_pretrained(folder / "pretrained", seed=seed)
    file = folders[1] / "pretrained" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mask_schedule": "cosine"}))
    return folders


def common(data: Path, judge: Path, results: Path) -> list[object]:
    words = ["--data", data, "--features", f"classifier={judge}", "--results", results, "--num-images", 12]
    return [*words, "--device", "cpu"]


def rows(results: Path, measurement: str) -> list[dict[str, Any]]:
    return Ledger(results / "ledger.jsonl").rows(measurement)
