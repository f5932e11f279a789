import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from maskgit_pl.data import InOrder, ShardData
from maskgit_pl.evaluation import classifier
from maskgit_pl.evaluation.classifier import (
    LabelledImages,
    classification_accuracy,
    count_hits,
    find_classifier,
    fit_classifier,
    obtain_classifier,
)
from maskgit_pl.evaluation.extractors import open_extractors
from maskgit_pl.evaluation.options import SMALL_TRAINING, CASConfig, ClassifierConfig
from maskgit_pl.networks.classifiers import load_classifier, weights_digest
from tests.evaluation.feature_networks import open_shards
from tests.forked import run_ranks

MOMENT = ClassifierConfig(width=4, max_steps=2, batch=20)
SCORE = CASConfig(model="small", width=8, max_steps=150, batch=20, peak_rate=4e-3)


@pytest.fixture
def data(tiny_shards: Path) -> ShardData:
    return open_shards(tiny_shards)


def real(data: ShardData) -> tuple[Tensor, Tensor]:
    """Returns all train images, whose brightness tells the classes apart."""
    batch = data.batches("train", InOrder(60)).__getitems__(range(60))
    return batch.content, batch.labels


def taught(images: Tensor, labels: Tensor) -> LabelledImages:
    return LabelledImages(images.__getitem__, labels)


def test_training_depends_on_the_configuration_but_not_on_the_source(data: ShardData) -> None:
    def head(source: LabelledImages | Tensor | None = None, **changes: Any) -> Tensor:
        return fit_classifier(data, source, config=replace(MOMENT, **changes)).network.head.weight

    first = head()
    assert torch.equal(first, head(taught(*real(data))))
    images, labels = real(data)
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]  # by their index in the train split
    by_index, by_row = (head(each) for each in (chosen, taught(images[chosen], labels[chosen])))
    assert torch.equal(by_index, by_row)
    for changes in ({"seed": 1}, {"precision": "bf16-mixed"}):
        assert not torch.equal(first, head(**changes))


def test_accuracy_counts_the_top_1_and_the_top_5() -> None:
    logits = torch.eye(8)[[0, 1, 2, 3]] + torch.arange(8, 0, -1) / 100  # after the first: 0, 1, 2, 3, 4 ...
    assert count_hits(logits, torch.tensor([0, 0, 4, 7])).tolist() == [1, 3]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_stored_classifier_is_read_and_not_trained_again(data: ShardData, tmp_path: Path) -> None:
    steps: list[int] = []
    first = obtain_classifier(tmp_path / "judge", data, config=MOMENT, on_step=lambda: steps.append(1))
    before = contents(tmp_path / "judge")
    second = obtain_classifier(tmp_path / "judge", data, config=MOMENT, on_step=lambda: steps.append(1))
    assert len(steps) == MOMENT.max_steps
    images = real(data)[0]
    assert torch.equal(first(images).logits, second(images).logits)
    assert find_classifier(tmp_path / "judge", data) == tmp_path / "judge"  # of any training
    assert contents(tmp_path / "judge") == before


@pytest.mark.parametrize("change", ["data", "class_names", "network", "training", "no config", "format"])
def test_another_model_is_kept_unless_its_folder_is_the_default(data: ShardData, tmp_path: Path, change: str) -> None:
    obtain_classifier(tmp_path, data, config=replace(MOMENT, seed=5 if change == "training" else 0))
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    changed = {"data": "other", "class_names": ["a", "b", "c"], "network": {**stored["network"], "in_channels": 3},
               "format": "maskgit_pl.tokenizer.module"}  # fmt: skip
    file.write_text(json.dumps({**stored, **({change: changed[change]} if change in changed else {})}))
    if change == "no config":
        file.unlink()
    before = contents(tmp_path)
    for replaces in (False, True) if change == "format" else (False,):
        with pytest.raises(FileExistsError, match=r"must hold a classifier of these data.*name an empty folder"):
            obtain_classifier(tmp_path, data, config=MOMENT if change == "training" else None, replaces=replaces)
    assert contents(tmp_path) == before
    if change != "format":
        obtain_classifier(tmp_path, data, config=MOMENT, replaces=True)
        stored = json.loads(file.read_text())
        assert (stored["data"], stored["training"]["seed"]) == (data.summary.fingerprint, 0)


def test_a_default_folder_gets_the_classifier_of_the_package_in_place_of_an_equal_training(
    data: ShardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "_SHIPPED", tmp_path / "shipped")
    obtain_classifier(tmp_path / "shipped", data, config=MOMENT)

    def count_steps(name: str, **options: Any) -> int:
        steps: list[int] = []
        obtain_classifier(tmp_path / name, data, on_step=lambda: steps.append(1), **options)
        return len(steps)

    assert count_steps("default", config=MOMENT, replaces=True) == 0
    assert contents(tmp_path / "default") == contents(tmp_path / "shipped")
    assert (
        count_steps("named", config=MOMENT) == count_steps("other", config=replace(MOMENT, seed=1), replaces=True) == 2
    )


def test_the_classifier_of_the_package_is_that_of_the_demo() -> None:
    models, page = classifier._SHIPPED.parent, Path(__file__).parents[2] / "docs" / "demo" / "evaluation.json"
    config = json.loads((classifier._SHIPPED / "config.json").read_text())
    model = json.loads((models / "fashion-mnist-demo" / "transformer" / "config.json").read_text())
    assert (config["training"], config["class_names"]) == (asdict(SMALL_TRAINING), model["class_names"])
    measured = json.loads(page.read_text())["protocol"]["features"]["classifier"]
    assert weights_digest(load_classifier(classifier._SHIPPED)) == measured["weights"]


def test_a_missing_classifier_is_refused_with_the_command_and_that_of_the_package_is_taken(
    data: ShardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = rf"`maskgit train-classifier --data {data.config.path} --runs-folder {tmp_path}`"
    with pytest.raises(FileNotFoundError, match=rf"must be one of data .*, got none; train it with {command}"):
        open_extractors(tmp_path / "data-classifier" / "small", data, ["classifier"], device="cpu")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(classifier, "_SHIPPED", tmp_path / "shipped")
    obtain_classifier(tmp_path / "shipped", data, config=MOMENT)
    assert find_classifier(tmp_path / "none", data) == tmp_path / "shipped"


def on_a_rank(rank: int, folder: str, shards: str) -> None:
    """Trains into an empty folder, and writes down the error of a folder that cannot be made."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data, steps = open_shards(shards), []
    obtain_classifier(Path(folder) / "judge", data, config=MOMENT, on_step=lambda: steps.append(1))
    score = classification_accuracy(
        torch.arange(40), data, replace(SCORE, max_steps=3), on_step=lambda: steps.append(1)
    )
    try:
        obtain_classifier(Path(folder) / "file" / "judge", data, config=MOMENT)
    except ValueError as error:
        (Path(folder) / str(rank)).write_text(f"{len(steps)} {score.top1} {error}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_first_rank_trains_and_all_have_its_results_and_its_errors(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run_ranks(on_a_rank, str(tmp_path), str(tiny_shards))
    first, second = ((tmp_path / str(rank)).read_text().split(" ", 2) for rank in (0, 1))
    assert [first[0], second[0]] == ["5", "0"]
    assert first[1:] == second[1:]
    assert "Not a directory" in first[2]


@pytest.mark.slow
def test_the_score_is_the_fraction_that_the_images_teach(data: ShardData) -> None:
    images, labels = real(data)
    known = labels < 2
    for pixels, given, top1 in (
        (images, labels, 1),
        (images, torch.tensor([1, 2, 0])[labels], 0),
        (images[known], labels[known], pytest.approx(2 / 3)),
    ):
        accuracy = classification_accuracy(taught(pixels, given), data, SCORE)
        assert (accuracy.top1, accuracy.top5, accuracy.images) == (top1, 1, 24)


def test_small_images_are_for_the_smaller_network() -> None:
    assert [CASConfig().for_images(size).model for size in (28, 256)] == ["resnet18", "resnet50"]
    assert CASConfig(model="small").for_images(28).model == "small"
