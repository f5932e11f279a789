import json
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from maskgit_pl.data import InOrder, ShardData, ShardDataConfig
from maskgit_pl.evaluation import classifier as module
from maskgit_pl.evaluation.classifier import (
    Accuracy,
    Classifier,
    TrainingImages,
    count_hits,
    fit_classifier,
    is_trained,
    measure_accuracy,
    obtain_classifier,
    provide_classifier,
)
from maskgit_pl.evaluation.features import check_features, open_extractors
from maskgit_pl.evaluation.options import ClassifierConfig
from maskgit_pl.files import write_tensors
from maskgit_pl.networks.feature_networks import load_classifier
from maskgit_pl.networks.weights import read_tensors
from tests.evaluation.feature_networks import in_memory
from tests.forked import run_ranks

QUICK = ClassifierConfig(width=8, max_steps=250, batch=20)


@pytest.fixture
def data(tiny_shards: Path) -> ShardData:
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    return data


def trained_on(data: ShardData, *, count: int = 60) -> TrainingImages:
    batch = data.batches("train", InOrder(60)).__getitems__(range(count))
    return in_memory(batch.content, batch.labels, data.class_names)


def test_predicts_in_batches(data: ShardData) -> None:
    judge = Classifier(1, 8, 5, ClassifierConfig(width=4))
    images = trained_on(data).read(torch.arange(3))
    output = judge.predict(images, batch_size=2)
    assert output.logits.shape == (3, 5)
    torch.testing.assert_close(output.features, judge(images).features.detach())


@pytest.mark.slow
def test_learns_to_tell_brightness_on_held_out_images(data: ShardData) -> None:
    steps: list[int] = []
    judge = fit_classifier(data, config=QUICK, on_step=lambda: steps.append(1))
    batch = data.batches("val", InOrder(24)).__getitems__(range(24))
    assert (judge.predict(batch.content).logits.argmax(1) == batch.labels).float().mean() > 0.9
    assert len(steps) == QUICK.max_steps
    accuracy = measure_accuracy(judge, data)
    assert accuracy.top1 > 0.9
    assert accuracy.top5 == 1  # of three classes
    assert accuracy.images == 24


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_stored_classifier_has_the_permissions_of_any_new_file(data: ShardData, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        obtain_classifier(tmp_path / "made", data, config=ClassifierConfig(width=4, max_steps=1, batch=20))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors"), 0o666 & ~mask)


def test_a_stored_classifier_with_non_finite_weights_is_refused_by_tensor(data: ShardData, tmp_path: Path) -> None:
    config = ClassifierConfig(width=4, max_steps=1, batch=20)
    obtain_classifier(tmp_path, data, config=config)
    file = tmp_path / "model.safetensors"
    write_tensors(file, {**read_tensors(file), "head.bias": torch.tensor([0.0, float("inf"), 0.0])})
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'head\.bias' must hold finite numbers, got inf"):
        obtain_classifier(tmp_path, data, config=config)


def test_training_is_repeatable(data: ShardData) -> None:
    first, second = (fit_classifier(data, config=ClassifierConfig(width=4, max_steps=5, batch=20)) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.slow
def test_a_second_run_reads_the_stored_classifier(data: ShardData, tmp_path: Path, monkeypatch) -> None:
    first = obtain_classifier(tmp_path / "judge", data, config=QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_classifier", lambda *args, **options: pytest.fail("trained again"))
        second = obtain_classifier(tmp_path / "judge", data, config=QUICK)
        assert is_trained(tmp_path / "judge", data, QUICK)
    batch = data.batches("val", InOrder(24)).__getitems__(range(24))
    for other in (second, load_classifier(tmp_path / "judge")):
        assert torch.equal(first(batch.content).logits, other(batch.content).logits)
        assert not other.training


def start_rank(rank: int, folder: str, shards: str) -> ShardData:
    """Joins a group of two ranks, and returns the data."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = ShardData(ShardDataConfig(shards, image_size=8, in_channels=1))
    data.setup()
    return data


def train_on_a_rank(rank: int, folder: str, shards: str) -> None:
    """Writes the error of a rank: the first one cannot write the classifier, since a file is in its place."""
    data, config = start_rank(rank, folder, shards), ClassifierConfig(width=4, max_steps=1, batch=20)
    try:
        obtain_classifier(Path(folder) / "file" / "judge", data, config=config)
    except OSError as error:
        (Path(folder) / str(rank)).write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.slow
def test_an_error_of_the_rank_that_trains_is_raised_on_all_ranks(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run_ranks(train_on_a_rank, str(tmp_path), str(tiny_shards))
    errors = {(tmp_path / str(rank)).read_text() for rank in (0, 1)}
    assert len(errors) == 1
    assert "Not a directory" in errors.pop()


def provide_on_a_rank(rank: int, folder: str, shards: str) -> None:
    """Writes what a rank finds: the first one trains into an empty folder and refuses one of another network."""
    data, config = start_rank(rank, folder, shards), ClassifierConfig(width=4, max_steps=1, batch=20)
    module.obtain_classifier = lambda *args, **options: obtain_classifier(*args, **options, config=config)
    provide_classifier(Path(folder) / "judge", data)
    provide_classifier(Path(folder) / "judge", data)
    try:
        provide_classifier(Path(folder) / "other", data)
    except FileExistsError as error:
        (Path(folder) / str(rank)).write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_first_rank_decides_whether_a_classifier_is_trained(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    run_ranks(provide_on_a_rank, str(tmp_path), str(tiny_shards))
    assert (tmp_path / "judge" / "model.safetensors").is_file()
    for rank in (0, 1):
        assert "must hold a classifier of these data" in (tmp_path / str(rank)).read_text()


def test_a_classifier_of_other_data_is_trained_again(data: ShardData, tmp_path: Path) -> None:
    config = ClassifierConfig(width=4, max_steps=2, batch=20)
    obtain_classifier(tmp_path, data, config=config)
    key = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**key, "data": "other"}))
    steps: list[int] = []
    obtain_classifier(tmp_path, data, config=config, on_step=lambda: steps.append(1))
    assert len(steps) == 2
    assert json.loads((tmp_path / "config.json").read_text()) == key


def test_a_classifier_with_another_description_is_trained_again(data: ShardData, tmp_path: Path) -> None:
    config = ClassifierConfig(width=4, max_steps=2, batch=20)
    obtain_classifier(tmp_path, data, config=config)
    for text in ("{", '{"data": "eaced5", "image_size": 8, "width": 4, "max_steps": 2}'):
        (tmp_path / "config.json").write_text(text)
        assert not is_trained(tmp_path, data, config)
    obtain_classifier(tmp_path, data, config=config)
    assert is_trained(tmp_path, data, config)
    assert not is_trained(tmp_path, data, replace(config, model="resnet18"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("replaces", [False, True])
def test_a_classifier_of_the_same_data_is_used_whatever_its_training_is(
    data: ShardData, tmp_path: Path, *, replaces: bool
) -> None:
    obtain_classifier(tmp_path, data, config=ClassifierConfig(width=4, max_steps=2, batch=20, seed=5))
    before = contents(tmp_path)
    open_extractors(tmp_path, data, features=["classifier"], device="cpu", replaces=replaces)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", ["data", "class_names", "network", "format", "weights only"])
def test_a_named_folder_with_something_else_is_refused_and_kept(data: ShardData, tmp_path: Path, change: str) -> None:
    obtain_classifier(tmp_path, data, config=ClassifierConfig(width=4, max_steps=2, batch=20))
    file = tmp_path / "config.json"
    key = json.loads(file.read_text())
    changes = {"data": "other", "class_names": ["a", "b", "c"], "network": {**key["network"], "in_channels": 3},
               "format": "maskgit_pl.tokenizer"}  # fmt: skip
    if change == "weights only":
        file.unlink()
    else:
        file.write_text(json.dumps({**key, change: changes[change]}))
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"must hold a classifier of these data.*name an empty folder"):
        open_extractors(tmp_path, data, features=["classifier"], device="cpu")
    assert contents(tmp_path) == before


def test_in_the_shared_folder_a_classifier_of_other_data_is_replaced_but_no_other_network(
    data: ShardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ClassifierConfig(width=4, max_steps=2, batch=20)
    monkeypatch.setattr(module, "obtain_classifier", lambda *args, **options: obtain_classifier(*args, config=config))
    provide_classifier(tmp_path, data, replaces=True)
    file = tmp_path / "config.json"
    key = json.loads(file.read_text())
    for old in (json.dumps({**key, "data": "other"}), '{"data": "eaced5", "width": 4}', "{"):
        file.write_text(old)
        provide_classifier(tmp_path, data, replaces=True)
        assert json.loads(file.read_text()) == key
    file.write_text(json.dumps({**key, "format": "maskgit_pl.tokenizer"}))
    with pytest.raises(FileExistsError, match="must hold a classifier of these data"):
        provide_classifier(tmp_path, data, replaces=True)


def test_a_named_folder_is_checked_before_hours_of_training(data: ShardData, tmp_path: Path) -> None:
    check_features(["classifier"], classifier=tmp_path / "missing")
    check_features(["classifier"], classifier=tmp_path)
    (tmp_path / "config.json").write_text('{"format": "maskgit_pl.tokenizer"}')
    check_features(["lite0"], classifier=tmp_path)
    with pytest.raises(FileExistsError, match="must hold a classifier of these data"):
        check_features(["classifier"], classifier=tmp_path)


def test_training_does_not_depend_on_where_images_are_read_from(data: ShardData) -> None:
    config = ClassifierConfig(width=4, max_steps=5, batch=20, flip_probability=0.5)
    made = [fit_classifier(source, config=config) for source in (data, trained_on(data))]
    made.append(fit_classifier(data, chosen=torch.arange(60), config=config))
    for name, tensor in made[0].state_dict().items():
        assert all(torch.equal(tensor, other.state_dict()[name]) for other in made[1:]), name


@pytest.mark.slow
def test_only_the_chosen_images_are_trained_on(data: ShardData) -> None:
    config = ClassifierConfig(width=8, max_steps=150, batch=20)
    labels = data.batches("train", InOrder(60)).__getitems__(range(60)).labels
    judge = fit_classifier(data, chosen=(labels != 1).nonzero()[:, 0], config=config)
    batch = data.batches("val", InOrder(24)).__getitems__(range(24))
    assert set(judge.predict(batch.content).logits.argmax(1).tolist()) == {0, 2}


def test_flips_and_seeds_make_another_classifier(data: ShardData) -> None:
    config = ClassifierConfig(width=4, max_steps=2, batch=20)
    plain, flipped, seeded = (
        fit_classifier(trained_on(data), config=changed).network.head.weight
        for changed in (config, replace(config, flip_probability=0.5), replace(config, seed=1))
    )
    assert not torch.equal(plain, flipped)
    assert not torch.equal(plain, seeded)


@pytest.mark.slow
def test_a_network_of_timm_is_trained_and_stored(data: ShardData, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 1)
    config = ClassifierConfig(model="resnet18", max_steps=2, batch=4)
    trained = obtain_classifier(tmp_path, data, config=config)
    assert json.loads((tmp_path / "config.json").read_text())["network"]["model"] == "resnet18"
    batch = data.batches("val", InOrder(24)).__getitems__(range(2))
    torch.testing.assert_close(load_classifier(tmp_path)(batch.content).logits, trained(batch.content).logits)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_steps": 0}, r"max_steps must be an integer in \[1, inf\), got 0"),
        ({"batch": 1}, "batch size of the classifier must be an integer"),
        ({"peak_rate": float("nan")}, "learning rate of the classifier must be a finite number"),
        ({"flip_probability": 1.5}, "flip_probability must be a number in"),
    ],
)
def test_numbers_of_the_training_are_bounded(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ClassifierConfig(**changes)


def test_a_deeply_nested_key_of_a_stranger_is_ignored(data: ShardData, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000)
    assert not is_trained(tmp_path, data, QUICK)


def test_accuracy_counts_the_top_1_and_the_top_5() -> None:
    logits = torch.eye(8)[[0, 1, 2, 3]] + torch.arange(8, 0, -1) / 100  # after the first: 0, 1, 2, 3, 4 ...
    accuracy = Accuracy.from_hits(count_hits(logits, torch.tensor([0, 0, 4, 7])), 4)
    assert accuracy == Accuracy(top1=1 / 4, top5=3 / 4, images=4)


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (torch.zeros(2, 8, 9, dtype=torch.uint8), [0, 1], r"\(C, H, W\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 2], r"labels in \[0, 1\]"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), [], "at least one"),
    ],
)
def test_invalid_training_images_are_refused(images, labels, match) -> None:
    with pytest.raises(ValueError, match=match):
        in_memory(images, torch.tensor(labels, dtype=torch.int64), ("a", "b"))


def test_a_stop_signal_ends_its_training_as_it_ends_the_rest_of_a_command(data: ShardData) -> None:
    before, during = signal.getsignal(signal.SIGTERM), []
    config = replace(QUICK, max_steps=2)
    fit_classifier(data, config=config, on_step=lambda: during.append(signal.getsignal(signal.SIGTERM)))
    assert during == [before, before]


def test_a_missing_file_of_another_network_is_found_before_the_classifier_is_trained(
    data: ShardData, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        open_extractors(tmp_path / "judge", data, features=["classifier", "inception=nowhere"], device="cpu")
    assert not (tmp_path / "judge").exists()
