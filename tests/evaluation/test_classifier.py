import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from maskgit_pl.data import InOrder, ShardData, ShardDataConfig
from maskgit_pl.evaluation import classifier as module
from maskgit_pl.evaluation.classifier import (
    TrainingImages,
    classification_accuracy,
    count_hits,
    fit_classifier,
    measure_accuracy,
    obtain_classifier,
    train_classifier,
)
from maskgit_pl.evaluation.features import open_extractors
from maskgit_pl.evaluation.options import CASConfig, ClassifierConfig
from tests.evaluation.feature_networks import in_memory
from tests.forked import run_ranks

QUICK = ClassifierConfig(width=8, max_steps=150, batch=20)
MOMENT = ClassifierConfig(width=4, max_steps=2, batch=20)
SCORE = CASConfig(model="small", width=8, max_steps=150, batch=20, peak_rate=4e-3)


def opened(shards: Path | str) -> ShardData:
    data = ShardData(ShardDataConfig(str(shards), image_size=8, in_channels=1, validation_batch=10))
    data.setup()
    return data


@pytest.fixture
def data(tiny_shards: Path) -> ShardData:
    return opened(tiny_shards)


def real(data: ShardData) -> tuple[Tensor, Tensor]:
    """Returns all train images, whose brightness tells the classes apart."""
    batch = data.batches("train", InOrder(60)).__getitems__(range(60))
    return batch.content, batch.labels


def taught(images: Tensor, labels: Tensor, data: ShardData) -> TrainingImages:
    return in_memory(images, labels, data.class_names)


def test_training_does_not_depend_on_where_images_are_read_from(data: ShardData) -> None:
    config = replace(MOMENT, max_steps=5, flip_probability=0.5)
    made = [fit_classifier(source, config=config) for source in (data, taught(*real(data), data))]
    made.append(fit_classifier(data, chosen=torch.arange(60), config=config))
    for name, tensor in made[0].state_dict().items():
        assert all(torch.equal(tensor, other.state_dict()[name]) for other in made[1:]), name


def test_flips_seeds_and_arithmetic_make_another_classifier(data: ShardData) -> None:
    changes = ({}, {"flip_probability": 0.5}, {"seed": 1}, {"precision": "bf16-mixed"})
    made = [fit_classifier(data, config=replace(MOMENT, **each)).network.head.weight for each in changes]
    assert not any(torch.equal(made[0], other) for other in made[1:])


def test_accuracy_counts_the_top_1_and_the_top_5() -> None:
    logits = torch.eye(8)[[0, 1, 2, 3]] + torch.arange(8, 0, -1) / 100  # after the first: 0, 1, 2, 3, 4 ...
    assert count_hits(logits, torch.tensor([0, 0, 4, 7])).tolist() == [1, 3]


# The folder


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
    open_extractors(tmp_path / "judge", data, ["classifier"], device="cpu")  # of any training
    assert contents(tmp_path / "judge") == before


CHANGES = ("data", "class_names", "in_channels", "training", "no training", "no config", "format")


@pytest.fixture(params=CHANGES)
def other(request: pytest.FixtureRequest, data: ShardData, tmp_path: Path) -> str:
    """Fills the folder with another classifier or model, and returns its difference."""
    change: str = request.param
    obtain_classifier(tmp_path, data, config=replace(MOMENT, seed=5 if change == "training" else 0))
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    changes = {"data": {"data": "other"}, "class_names": {"class_names": ["a", "b", "c"]},
               "in_channels": {"network": {**stored["network"], "in_channels": 3}},
               "format": {"format": "maskgit_pl.tokenizer"}, "no training": {"training": None}}  # fmt: skip
    file.write_text(json.dumps({**stored, **changes.get(change, {})}))
    if change == "no config":
        file.unlink()
    return change


def test_a_named_folder_with_any_other_model_is_refused_and_kept(data: ShardData, tmp_path: Path, other: str) -> None:
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"must hold a classifier of these data.*name an empty folder"):
        obtain_classifier(tmp_path, data, config=MOMENT if other == "training" else None)
    assert contents(tmp_path) == before


def test_a_default_folder_gets_the_classifier_but_keeps_another_model(
    data: ShardData, tmp_path: Path, other: str
) -> None:
    if other == "format":
        with pytest.raises(FileExistsError, match="must hold a classifier of these data"):
            obtain_classifier(tmp_path, data, config=MOMENT, replaces=True)
    else:
        obtain_classifier(tmp_path, data, config=MOMENT, replaces=True)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert (stored["data"], stored["training"]["seed"]) == (data.summary.fingerprint, 0)


def test_a_missing_file_of_another_network_is_found_before_the_classifier_is_trained(
    data: ShardData, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        open_extractors(tmp_path / "judge", data, ["classifier", "inception=nowhere"], device="cpu")
    assert not (tmp_path / "judge").exists()


def on_a_rank(rank: int, folder: str, shards: str) -> None:
    """Trains into an empty folder, and writes the error of a folder that cannot be made."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data, steps = opened(shards), []
    obtain_classifier(Path(folder) / "judge", data, config=MOMENT, on_step=lambda: steps.append(1))
    score = classification_accuracy(
        torch.arange(40), data, replace(SCORE, max_steps=3), on_step=lambda: steps.append(1)
    )
    try:
        obtain_classifier(Path(folder) / "file" / "judge", data, config=MOMENT)
    except OSError as error:
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
def test_a_network_of_timm_is_trained_stored_and_reused(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 1)
    config = ClassifierConfig(model="resnet18", max_steps=2, batch=4)
    first, again = (train_classifier(tiny_shards, config=config, device="cpu", out=tmp_path / "kept") for _ in "ab")
    assert (first.is_reused, again.is_reused) == (False, True)
    assert first.accuracy == again.accuracy
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["network"]["model"] == "resnet18"


# The classification accuracy score


@pytest.mark.slow
def test_separable_images_teach_everything(data: ShardData) -> None:
    assert measure_accuracy(fit_classifier(data, config=SCORE), data).top1 == 1
    accuracy = classification_accuracy(taught(*real(data), data), data, SCORE)
    assert (accuracy.top1, accuracy.top5, accuracy.images) == (1, 1, 24)


@pytest.mark.slow
def test_permuted_labels_teach_the_permutation_and_missing_classes_are_not_known(data: ShardData) -> None:
    images, labels = real(data)
    permuted = torch.tensor([1, 2, 0])[labels]
    assert classification_accuracy(taught(images, permuted, data), data, SCORE).top1 == 0
    assert classification_accuracy(taught(images[labels < 2], labels[labels < 2], data), data, SCORE).top1 == (
        pytest.approx(2 / 3)
    )


def test_real_images_are_chosen_by_their_index_in_the_train_split(data: ShardData) -> None:
    images, labels = real(data)
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    config = replace(SCORE, max_steps=20)
    by_number = classification_accuracy(chosen, data, config)
    assert by_number == classification_accuracy(taught(images[chosen], labels[chosen], data), data, config)


def test_small_images_are_for_the_smaller_network() -> None:
    assert CASConfig(seed=3).for_images(28) == CASConfig(model="resnet18", seed=3)
    assert CASConfig().for_images(256).model == "resnet50"
    assert CASConfig(model="small").for_images(28).model == "small"
