"""The callbacks of pictures and unreadable images, and runs whose data change or whose workers die."""

import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import nn

from maskgit_pl.data.images import encode_png
from maskgit_pl.errors import DataBudgetError, DataChangedError, DataWorkerError
from maskgit_pl.runs.callbacks import ReconstructionPictures, SamplePictures, UnreadableReport
from maskgit_pl.training.loggers import TensorBoard, TolerantLogger
from tests import forked, short_runs
from tests.conftest import tiny_flags, tiny_tokenizer
from tests.data_folders import save_data
from tests.pipeline.conftest import random_images, step


class FakeModel:
    """A model that decodes to its labels and counts completed generations."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.asked: list[tuple[list[int], list[int]]] = []
        self.reconstructions = random_images(20), random_images(20)

    def sample(self, labels, seeds):
        yield step(0, list(range(16)), [0], len(labels))
        yield step(1, [0], [], len(labels))
        self.asked.append((list(labels), list(seeds)))


def trainer(tmp_path, *, rank: int = 0, sanity: bool = False) -> SimpleNamespace:
    loggers = [TolerantLogger(TensorBoard(), tmp_path / "logs", name="tensorboard", settings={})] if rank == 0 else []
    return SimpleNamespace(sanity_checking=sanity, is_global_zero=rank == 0, global_step=7, loggers=loggers)


def test_callbacks_write_their_pictures_and_tensorboard_events(tmp_path) -> None:
    there = trainer(tmp_path)
    ReconstructionPictures(tmp_path).on_validation_end(there, FakeModel())
    SamplePictures(tmp_path, class_names=["a", "b"]).on_validation_end(there, FakeModel())
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert picture.height == 8 + 4 * 84 + 3 * 4 + 8  # 16 pairs, 8 a row
    assert (tmp_path / "samples.png").is_file()
    there.loggers[0].save()
    events = b"".join(file.read_bytes() for file in tmp_path.rglob("events.out*"))
    assert b"reconstructions" in events
    assert b"samples" in events


def test_every_rank_samples_the_same_but_rank_0_alone_writes(tmp_path) -> None:
    callback = SamplePictures(tmp_path, class_names=[str(number) for number in range(25)])
    model = FakeModel()
    callback.on_validation_end(trainer(tmp_path, rank=1), model)
    ReconstructionPictures(tmp_path).on_validation_end(trainer(tmp_path, rank=1), model)
    ((labels, seeds),) = model.asked
    assert sorted(set(labels)) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert seeds == list(range(80))
    assert list(tmp_path.glob("*.png")) == []


def test_nothing_is_drawn_in_the_sanity_check(tmp_path) -> None:
    model = FakeModel()
    for callback in (ReconstructionPictures(tmp_path), SamplePictures(tmp_path, class_names=["a"])):
        callback.on_validation_end(trainer(tmp_path, sanity=True), model)
    assert model.asked == []
    assert list(tmp_path.glob("*.png")) == []


def image(number: int) -> bytes:
    return encode_png(torch.full((1, 8, 8), number * 5 % 256, dtype=torch.uint8))


def folder_with(path: Path, *, bad: set[int], bad_val: set[int] = frozenset(), num_train: int = 48) -> Path:
    """Makes a folder of images, some of which are HTML pages."""
    train = [(b"<html>" if n in bad else image(n), n % 3) for n in range(num_train)]
    val = [(b"" if n in bad_val else image(n), n % 3) for n in range(8)]
    return save_data(path, {"train": train, "val": val})


class OneWeight(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch.content.float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(folder: Path, run: Path, *, steps: int, num_workers: int = 0) -> None:
    source = short_runs.data(folder, validation_batch=4, num_workers=num_workers)
    short_runs.fit(
        OneWeight(), source, steps=steps, folder=run, callbacks=[UnreadableReport(run)],
        num_sanity_val_steps=0, check_val_every_n_epoch=None, val_check_interval=6,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_replaces_unreadable_images_and_lists_them(tmp_path, num_workers, caplog):
    folder = folder_with(tmp_path / "data", bad={7, 8, 30}, bad_val={2})
    with caplog.at_level(logging.WARNING, logger="maskgit_pl"):
        fit(folder, tmp_path / "run", steps=12, num_workers=num_workers)
    written = json.loads((tmp_path / "run" / "unreadable.json").read_text())
    assert written["train"]["unreadable"] == 8  # of two epochs; 7 met 8 too
    assert list(written["train"]["images"]) == ["7", "8", "30"]
    assert written["train"]["images"]["30"].startswith("train-000003.tar:00000030.jpg: not an image: ")
    assert [text.split(": ")[1] for text in written["val"]["images"].values()] == ["empty"]
    assert "split train: 8 of " in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_over_budget_ends_with_the_list_in_its_folder(tmp_path, num_workers):
    folder = folder_with(tmp_path / "data", bad=set(range(0, 48, 4)))
    with pytest.raises(DataBudgetError, match=r"train-000000.tar:00000000.jpg: not an image"):
        fit(folder, tmp_path / "run", steps=12, num_workers=num_workers)
    assert len(json.loads((tmp_path / "run" / "unreadable.json").read_text())["train"]["images"]) == 11


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def answer_of_a_run_to(
    fault: Callable[[forked.Command, Path], None], tmp_path: Path, *more: str
) -> tuple[int, list[str]]:
    """Trains to the first checkpoint, then injects the fault. Returns the exit code and the output."""
    folder = folder_with(tmp_path / "data", bad=set())
    words = ["train", "tokenizer", "--data", str(folder), "--runs-folder", str(tmp_path / "runs"), "--run", "tiny"]
    words += [*tiny_flags("tokenizer"), "--trainer.max_steps=1000000", "--checkpoint_every=20", *more]
    with forked.Command(words) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/tiny/tokenizer/checkpoints/step-*/COMPLETE.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        fault(process, folder)
        texts = process.communicate(timeout=120)
        return process.wait(), [line for text in texts for line in text.splitlines()]


TWO_RANKS = ("--cluster", "ddp", "--trainer.devices=2")


def cut_a_shard(process: forked.Command, folder: Path) -> None:
    os.truncate(folder / "train-000001.tar", 700)


def kill_a_worker(process: forked.Command, folder: Path) -> None:
    # a second rank is a child too, and has children
    os.kill(next(child for child in children(process.pid) if not children(child)), signal.SIGKILL)


@pytest.mark.slow  # 15 s each, 30 s for two ranks
@pytest.mark.survival
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the children of a process")
@pytest.mark.parametrize(
    ("fault", "more", "error", "message"),
    [
        (cut_a_shard, (), DataChangedError, "data .*train-000001.tar changed while it was in use"),
        (cut_a_shard, ("--data.num_workers=2", *TWO_RANKS), DataChangedError, "data .*train-000001.tar changed while"),
        (kill_a_worker, ("--data.num_workers=2", *TWO_RANKS), DataWorkerError, "a data loading worker was killed"),
    ],
    ids=["a shard, one rank", "a shard, two ranks", "a worker"],
)
def test_a_fault_of_the_data_ends_all_ranks_with_one_line(tmp_path, fault, more, error, message):
    code, lines = answer_of_a_run_to(fault, tmp_path, *more)
    assert code == error.exit_code, lines
    assert any(re.search(f"maskgit train: {message}", line) for line in lines)
    assert not any("Traceback" in line for line in lines)
