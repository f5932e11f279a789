"""Batches of images, some of which cannot be read."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskgit_pl.data import ShardData
from maskgit_pl.errors import DataBudgetError, DataChangedError, DataWorkerError
from tests.data_folders import open_data, save_data
from tests.hostile_images import REFUSED, save

NUM_TRAIN, NUM_VAL = 40, 6
BAD = {3: "damaged", 4: "empty", 5: "not an image", 17: "too large", 39: "damaged"}


def colour(number: int) -> tuple[int, int, int]:
    return (6 * number, 255 - 6 * number, 90)


def jpeg(number: int) -> bytes:
    return save(Image.new("RGB", (10, 8), colour(number)), "JPEG", quality=100, subsampling=0)


def spoilt(reason: str) -> bytes:
    files = {"damaged": "tables.jpg", "empty": "empty.jpg", "not an image": "page.jpg", "too large": "large.jpg"}
    return REFUSED[files[reason]][0]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    train = [(spoilt(BAD[n]) if n in BAD else jpeg(n), n % 3) for n in range(NUM_TRAIN)]
    val = [(jpeg(n), n % 3) for n in range(NUM_VAL)]
    return save_data(tmp_path_factory.mktemp("spoilt"), {"train": train, "val": val})


def open_images(folder: Path, **options) -> ShardData:
    return open_data(folder, image_size=8, in_channels=3, **options)


def next_readable(number: int) -> int:
    while number in BAD:
        number = (number + 1) % NUM_TRAIN
    return number


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next_with_its_label(folder, num_workers):
    loader = open_images(folder, num_workers=num_workers).train_dataloader()
    batches = list(loader)
    assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(NUM_TRAIN))  # the order stays
    for batch in batches:
        for row, index in enumerate(batch.index.tolist()):
            readable = next_readable(index)
            assert batch.replacement[row] == (readable if index in BAD else -1)
            assert batch.labels[row] == readable % 3
            difference = batch.content[row].int() - torch.tensor(colour(readable))[:, None, None]
            assert difference.abs().max() <= 2
    assert loader.unreadable.images.keys() == BAD.keys()
    assert all(f".jpg: {reason}: " in loader.unreadable.images[index] for index, reason in BAD.items())


def test_a_budget_of_0_ends_at_the_first_unreadable_image_with_its_name(folder):
    loader = open_images(folder, num_workers=2, unreadable_budget=0.0).train_dataloader()
    with pytest.raises(DataBudgetError, match=r"train-00000\d.tar:000000\d\d.jpg: (damaged|empty|not|too)"):
        list(loader)


def test_a_split_without_a_readable_image_ends_with_the_name_of_one(tmp_path):
    folder = save_data(tmp_path, {"train": [(b"<html>", 0)] * 150, "val": [(jpeg(0), 0)]})
    loader = open_images(folder, unreadable_budget=1.0).train_dataloader()
    with pytest.raises(DataBudgetError, match=r"100 images in a row cannot be read, .* not an image: .*budget$"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_arrives_as_it_is(tmp_path, num_workers):
    folder = save_data(tmp_path, {"train": [(jpeg(n), 0) for n in range(16)], "val": [(jpeg(0), 0)]})
    loader = open_images(folder, num_workers=num_workers, global_batch=4, max_batch_per_device=4).train_dataloader()
    os.truncate(folder / "train-000001.tar", 512)
    with pytest.raises(DataChangedError, match=r"^data .*: train-000001\.tar changed while it was in use.*$") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["in an epoch", "between epochs"])
def test_a_killed_worker_is_named_with_the_likely_cause_and_the_way_out(folder, again):
    loader = open_images(folder, num_workers=2).train_dataloader()
    batches = iter(loader)
    next(batches)
    if again:
        assert len(list(batches)) == 4
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(DataWorkerError, match=r"was killed, most likely .* memory .*data\.num_workers"):
        list(loader if again else batches)


@pytest.mark.parametrize(("place", "error"), [
    ("torch.Tensor.share_memory_", RuntimeError("unable to allocate shared memory")),
    ("torch.utils.data.DataLoader.__iter__", OSError(errno.ENOSPC, "No space left on device")),
], ids=["a batch", "a lock"])  # fmt: skip
def test_full_shared_memory_is_named_with_the_way_out(folder, monkeypatch, place, error):
    def fail(this: object) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    batches = iter(open_images(folder, num_workers=1).train_dataloader())
    with pytest.raises(DataWorkerError, match=rf"failed: .*{error.args[-1]}; enlarge /dev/shm .*data\.num_workers 0"):
        next(batches)
