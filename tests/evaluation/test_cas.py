import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maskgit_pl.data import InOrder, ShardData, ShardDataConfig
from maskgit_pl.evaluation import cas as module
from maskgit_pl.evaluation import classifier
from maskgit_pl.evaluation.cas import classification_accuracy
from maskgit_pl.evaluation.classifier import Accuracy, TrainingImages
from maskgit_pl.evaluation.generation import GeneratedImages
from maskgit_pl.evaluation.npz import open_samples
from maskgit_pl.evaluation.options import CASConfig
from tests.evaluation.feature_networks import in_memory

QUICK = CASConfig(model="small", width=8, max_steps=150, batch=20, peak_rate=4e-3)


def opened(shards: Path) -> ShardData:
    data = ShardData(ShardDataConfig(str(shards), image_size=8, in_channels=1, validation_batch=10))
    data.setup()
    return data


@pytest.fixture
def data(tiny_shards: Path) -> ShardData:
    return opened(tiny_shards)


def taught(images: Tensor, labels: Tensor, data: ShardData) -> TrainingImages:
    return in_memory(images, labels, data.class_names)


def real(data: ShardData) -> tuple[Tensor, Tensor]:
    """Returns all train images, whose brightness tells the classes apart."""
    batch = data.batches("train", InOrder(60)).__getitems__(range(60))
    return batch.content, batch.labels


@pytest.mark.slow
def test_separable_images_teach_everything(data: ShardData) -> None:
    steps: list[int] = []
    accuracy = classification_accuracy(taught(*real(data), data), data, QUICK, on_step=lambda: steps.append(1))
    assert accuracy.top1 == accuracy.top5 == 1
    assert accuracy.images == 24
    assert len(steps) == QUICK.max_steps


@pytest.mark.slow
def test_shuffled_labels_teach_nothing(data: ShardData) -> None:
    images, labels = real(data)
    scores = [
        classification_accuracy(
            taught(images, labels[torch.randperm(60, generator=torch.Generator().manual_seed(seed))], data), data, QUICK
        ).top1
        for seed in range(3)
    ]
    assert abs(sum(scores) / 3 - 1 / 3) < 0.2  # 72 random answers deviate by 0.06, and those of a class are correlated


@pytest.mark.slow
def test_permuted_labels_teach_the_permutation(data: ShardData) -> None:
    images, labels = real(data)
    permuted = torch.tensor([1, 2, 0])[labels]
    assert classification_accuracy(taught(images, permuted, data), data, QUICK).top1 == 0
    back = torch.tensor([2, 0, 1])[permuted]
    assert classification_accuracy(taught(images, back, data), data, QUICK).top1 == 1


@pytest.mark.slow
def test_a_class_that_was_not_generated_is_not_known(data: ShardData) -> None:
    images, labels = real(data)
    accuracy = classification_accuracy(taught(images[labels < 2], labels[labels < 2], data), data, QUICK)
    assert accuracy.top1 == pytest.approx(2 / 3)


def test_the_score_is_a_function_of_images_and_seed(data: ShardData) -> None:
    config = replace(QUICK, max_steps=4)
    images, labels = real(data)
    first, second = (classification_accuracy(taught(images, labels, data), data, config) for _ in range(2))
    assert first == second


def test_real_images_are_chosen_by_their_index_in_the_train_split(data: ShardData) -> None:
    images, labels = real(data)
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    config = replace(QUICK, max_steps=20)
    by_number = classification_accuracy(chosen, data, config)
    assert by_number == classification_accuracy(taught(images[chosen], labels[chosen], data), data, config)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Compares the peak memory of processes that read files of two sizes in random order."""
    peaks = []
    for count in (1000, 6000):
        file = tmp_path / f"{count}.npz"
        np.savez(file, arr_0=np.zeros((count, 64, 64, 3), np.uint8), arr_1=np.zeros(count, np.int64))
        done = subprocess.run([sys.executable, "-c", READ, file], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 20_000  # kB; the images are 61 MB more


READ = """
import sys
import torch
from maskgit_pl.evaluation.generation import GeneratedImages
from maskgit_pl.evaluation.npz import open_samples

file = open_samples(sys.argv[1])
images = GeneratedImages(file, 3, file.labels, None)
for rows in torch.randperm(len(file)).split(64):
    assert images.read_at(rows).shape == (len(rows), 3, 64, 64)
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(peak)  # not ru_maxrss, which starts from that of the parent
"""


@pytest.mark.parametrize("channels", [1, 3])
def test_generated_images_are_read_in_any_order(tmp_path: Path, channels) -> None:
    pixels = torch.randint(0, 256, (9, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    as_saved = pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=as_saved, arr_1=np.arange(9))
        file = open_samples(tmp_path / "a.npz")
        made = GeneratedImages(file, channels, file.labels, None)
        assert made.shape == (channels, 8, 8)
        order = torch.tensor([8, 0, 3, 3])
        assert torch.equal(made.read_at(order), pixels[order])


def test_small_images_are_for_the_smaller_network() -> None:
    assert CASConfig(seed=3).for_images(28) == CASConfig(model="resnet18", seed=3)
    assert CASConfig().for_images(256).model == "resnet50"
    assert CASConfig(model="small").for_images(28).model == "small"


@pytest.mark.slow
def test_a_network_of_timm_is_tested_too(data: ShardData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "available_cores", lambda: 1)
    accuracy = classification_accuracy(taught(*real(data), data), data, CASConfig(max_steps=3, batch=4).for_images(8))
    assert 0 <= accuracy.top1 <= accuracy.top5 == 1


@pytest.mark.parametrize(
    ("shape", "label", "match"),
    [((4, 1, 9, 9), 0, r"\(1, 8, 8\)"), ((4, 2, 8, 8), 0, r"\(1, 8, 8\)"), ((4, 1, 8, 8), 3, r"labels in \[0, 2\]")],
)
def test_images_with_another_shape_than_the_data_are_refused(data: ShardData, shape, label, match) -> None:
    images = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=match):
        classification_accuracy(taught(images, torch.full((4,), label), data), data, QUICK)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_trains_and_all_have_its_score(data: ShardData, monkeypatch: pytest.MonkeyPatch, rank) -> None:
    sent: list[Accuracy | None] = []

    def on_all_ranks(work: Callable[[], Accuracy | None]) -> list[Accuracy | None]:
        sent.append(work())
        return [Accuracy(0.25, 0.75, 24), None]

    monkeypatch.setattr(module, "rank_and_world", lambda: (rank, 2))
    monkeypatch.setattr(module, "on_all_ranks", on_all_ranks)
    steps: list[int] = []
    config = replace(QUICK, max_steps=3)
    assert classification_accuracy(
        taught(*real(data), data), data, config, on_step=lambda: steps.append(1)
    ) == Accuracy(0.25, 0.75, 24)
    assert len(steps) == (0 if rank else 3)
    assert (sent[0] is None) == (rank == 1)
