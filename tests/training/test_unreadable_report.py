import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from maskgit_pl.cli import main
from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.images import encode_png
from maskgit_pl.errors import DataBudgetError, DataChangedError, DataWorkerError
from maskgit_pl.training.callbacks import UnreadableReport
from tests import forked
from tests.data_folders import save_data

TINY = Path(__file__).parents[1] / "tiny"


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


def fit(folder: Path, run: Path, *, steps: int, num_workers: int = 0, **options) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = ShardData(ShardDataConfig(
        str(folder), image_size=8, in_channels=1, global_batch=8, max_batch_per_device=8, validation_batch=4,
        num_workers=num_workers, **options,
    ))  # fmt: skip
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=CSVLogger(run, name="", version=""),
        callbacks=[UnreadableReport(run)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=2,
        check_val_every_n_epoch=None, val_check_interval=6,
    )  # fmt: skip
    trainer.fit(OneWeight(), datamodule=data)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_and_tells_what_it_replaced(tmp_path, num_workers, caplog):
    folder = folder_with(tmp_path / "data", bad={7, 8, 30}, bad_val={2})
    with caplog.at_level(logging.WARNING, logger="maskgit_pl"):
        fit(folder, tmp_path / "run", steps=12, num_workers=num_workers)
    written = json.loads((tmp_path / "run" / "unreadable.json").read_text())
    assert written["train"]["shards"] == {"train-000000.tar": 6, "train-000003.tar": 2}  # of two epochs; 7 met 8 too
    assert written["train"]["reasons"] == {"not an image": 8}
    assert [row["image"] for row in written["train"]["images"]] == [
        "train-000000.tar:00000007.jpg", "train-000000.tar:00000008.jpg", "train-000003.tar:00000030.jpg",
    ]  # fmt: skip
    assert written["val"]["reasons"] == {"empty": 2}
    assert "split train: 8 of " in caplog.text
    assert "not an image 8; train-000000.tar 6, train-000003.tar 2" in caplog.text
    logged = (tmp_path / "run" / "metrics.csv").read_text().split()
    assert logged[0].startswith("data/unreadable")
    assert float(logged[-1].split(",")[0]) == 10


def test_a_run_without_faults_leaves_no_file(tmp_path):
    fit(folder_with(tmp_path / "data", bad=set()), tmp_path / "run", steps=2)
    assert not (tmp_path / "run" / "unreadable.json").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_over_budget_ends_with_the_list_in_its_folder(tmp_path, num_workers):
    folder = folder_with(tmp_path / "data", bad=set(range(0, 48, 4)))
    with pytest.raises(DataBudgetError, match=r"train-000000.tar:00000000.jpg: not an image"):
        fit(folder, tmp_path / "run", steps=12, num_workers=num_workers)
    assert len(json.loads((tmp_path / "run" / "unreadable.json").read_text())["train"]["images"]) == 11


def train_command(shards: Path, runs: Path) -> list[str]:
    tiny = yaml.safe_load((TINY / "tokenizer.yaml").read_text())
    values = {"data": tiny["data"], "model.network": tiny["model"]["network"], "trainer": tiny["trainer"]}
    words = [f"--{part}.{key}={value}" for part, keys in values.items() for key, value in keys.items()]
    return ["train", "tokenizer", "--data", str(shards), "--runs-folder", str(runs), "--run", "tiny", *words]


def test_the_command_ends_with_76_and_the_list(tmp_path, monkeypatch, capsys):
    ours = logging.getLogger("maskgit_pl")
    monkeypatch.setattr(ours, "propagate", ours.propagate)
    monkeypatch.setattr(ours, "level", ours.level)
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    folder = folder_with(tmp_path / "data", bad=set(range(48)))
    assert main(train_command(folder, tmp_path / "runs")) == 76
    error = capsys.readouterr().err
    assert "maskgit train: data budget: 48 images in a row cannot be read:\n  train-000000.tar:00000000.jpg" in error
    assert "data.unreadable_budget" in error
    assert (tmp_path / "runs" / "tiny" / "tokenizer" / "unreadable.json").is_file()


@pytest.mark.slow  # 20 to 40 s
@pytest.mark.survival
def test_a_rank_over_budget_ends_the_run_of_two(tmp_path):
    folder = folder_with(tmp_path / "data", bad=set(range(48)))
    words = [*train_command(folder, tmp_path / "runs"), "--cluster", "ddp", "--trainer.devices=2"]
    done = forked.run(words)
    assert done.returncode == 76, done.stdout + done.stderr


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def answer_of_a_run_to(
    fault: Callable[[forked.Command, Path], None], tmp_path: Path, *more: str
) -> tuple[int, list[str]]:
    """Trains to the first checkpoint, then injects the fault. Returns the exit code and the output."""
    folder = folder_with(tmp_path / "data", bad=set())
    words = [*train_command(folder, tmp_path / "runs"), "--trainer.max_steps=1000000", "--checkpoint_every=20", *more]
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


@pytest.mark.slow  # 15 s each, 30 s for two ranks
@pytest.mark.survival
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the children of a process")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ranks", [(), TWO_RANKS], ids=["one rank", "two ranks"])
def test_a_shard_that_is_cut_while_a_run_reads_it_ends_all_ranks_with_its_name(tmp_path, num_workers, ranks):
    def cut(process: forked.Command, folder: Path) -> None:
        os.truncate(folder / "train-000001.tar", 700)

    code, lines = answer_of_a_run_to(cut, tmp_path, f"--data.num_workers={num_workers}", *ranks)
    assert code == DataChangedError.exit_code == 76, lines
    assert any(
        "maskgit train: data " in line and "train-000001.tar changed while it was in use" in line for line in lines
    )
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow  # 15 s each, 30 s for two ranks
@pytest.mark.survival
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the children of a process")
@pytest.mark.parametrize("ranks", [(), TWO_RANKS], ids=["one rank", "two ranks"])
def test_a_data_worker_that_is_killed_ends_the_run_with_one_line(tmp_path, ranks):
    def kill(process: forked.Command, folder: Path) -> None:
        # a second rank is a child too, and has children
        os.kill(next(child for child in children(process.pid) if not children(child)), signal.SIGKILL)

    code, lines = answer_of_a_run_to(kill, tmp_path, "--data.num_workers=2", *ranks)
    assert code == DataWorkerError.exit_code, lines
    assert any(
        "maskgit train: a data loading worker was killed, most likely because it ran out of memory" in line
        for line in lines
    )
    assert not any("Traceback" in line for line in lines)
