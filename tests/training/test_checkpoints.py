"""Checkpoints come back exactly; what is damaged or half written is noticed; failed writes end a run only in a row."""

import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from maskgit_pl.errors import CannotWriteError
from maskgit_pl.files import sha256_of, write_tensors
from maskgit_pl.training.checkpoints import (
    Checkpoints,
    FolderCheckpointIO,
    complete_checkpoints,
    find_leftovers,
    newest_checkpoint,
    read_settings,
)
from tests.forked import run_ranks
from tests.short_runs import assert_equal

STATE = {
    "state_dict": {"weight": torch.arange(6.0).reshape(2, 3).t(), "half": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "param_groups": [{"betas": (0.9, 0.96)}]}],
    "loops": {"done": 3, "name": None, "is_last_batch": True, "none": {}},
}


def save(folder, state=STATE):
    FolderCheckpointIO().save_checkpoint(state, folder)
    return folder


def test_tensors_and_plain_values_are_restored_with_their_types(tmp_path):
    back = FolderCheckpointIO().load_checkpoint(save(tmp_path / "step-00000003"))
    assert torch.equal(back["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert back["state_dict"]["half"].dtype == torch.bfloat16
    assert back["loops"] == STATE["loops"]
    assert list(back["optimizer_states"][0]["state"]) == [0, 7]
    assert back["optimizer_states"][0]["param_groups"] == [{"betas": (0.9, 0.96)}]


def test_a_failed_save_names_the_key_and_leaves_the_older_checkpoint(tmp_path):
    folder = save(tmp_path / "step-00000003")
    with pytest.raises(TypeError, match="/loops/schedule"):
        save(folder, {"loops": {"schedule": object()}})
    assert list(tmp_path.iterdir()) == [folder]
    assert FolderCheckpointIO().load_checkpoint(folder)["loops"] == STATE["loops"]


def test_a_checkpoint_without_room_is_not_begun(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=31)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="a checkpoint needs 32 bytes, 31 bytes are free"):
        save(tmp_path / "step-00000003")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensors-00000-of-00001.safetensors", "state.json", "COMPLETE.json"])
@pytest.mark.parametrize("damage", ["one bit", "cut", "missing"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    file = save(tmp_path / "step-00000003") / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[-3] ^= 1 << 7
        file.write_bytes(content if damage == "one bit" else content[:-3])
    with pytest.raises(ValueError, match=rf"checkpoint {file.parent}.* {name}.* an older one"):
        FolderCheckpointIO().load_checkpoint(file.parent)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    file = save(tmp_path / "step-00000003") / "COMPLETE.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    for read in (FolderCheckpointIO().load_checkpoint, read_settings):
        with pytest.raises(ValueError, match=f"checkpoint {file.parent}: version must be 3, got 2; start a new run"):
            read(file.parent)


def test_a_tensor_in_pieces_of_any_order_is_read_whole(tmp_path):
    folder, files = tmp_path / "step-00000003", {}
    folder.mkdir()
    for number, (start, count) in enumerate([(8, 4), (4, 4), (4, 0), (0, 4)]):
        name = f"tensors-{number:05d}-of-00004.safetensors"
        rows = {"/weight": torch.arange(start, start + count).float().unsqueeze(1).expand(-1, 3).contiguous()}
        write_tensors(folder / name, rows, metadata={"first_rows": json.dumps({"/weight": start})})
    (folder / "state.json").write_text('{"items": [["weight", {"tensor": "/weight"}]]}')
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in folder.iterdir()}
    (folder / "COMPLETE.json").write_text(json.dumps({"version": 3, "files": files}))
    assert FolderCheckpointIO().load_checkpoint(folder)["weight"][:, 2].tolist() == list(range(12))
    part = FolderCheckpointIO().load_pieces(folder, lambda _, saved: saved.read_rows(3, 9))["weight"]
    assert part[:, 0].tolist() == list(range(3, 9))


@pytest.mark.parametrize("key", [1, 1.5, None, True, "a/b", ""])
def test_keys_and_numbers_beyond_json_are_restored(tmp_path, key):
    state = {key: [{"best": float("inf")}, (float("-inf"), [float("nan"), ()])]}
    back = FolderCheckpointIO().load_checkpoint(save(tmp_path / "step-00000003", state))
    assert str(back) == str(state)


def test_files_are_synced_before_the_marker_and_the_marker_before_the_name(tmp_path, monkeypatch):
    events, fsync = [], os.fsync

    def spy(descriptor):
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("sync " + re.sub(r"^\.|\.[0-9a-f]{32}|\.partial", "", file.name))
        fsync(descriptor)

    def spy_on(owner, name):
        rename = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda old, new: (events.append(f"rename {Path(new).name}"), rename(old, new))[1]
        )

    monkeypatch.setattr(os, "fsync", spy)
    spy_on(Path, "rename")
    spy_on(os, "replace")
    save(tmp_path / "step-00000003")
    files = ["tensors-00000-of-00001.safetensors", "state.json", "COMPLETE.json"]
    in_files = [event for name in files for event in (f"sync {name}", f"rename {name}")]
    assert events == [*in_files, "sync step-00000003", "rename step-00000003", f"sync {tmp_path.name}"]


def test_partial_and_half_removed_folders_are_leftovers_and_no_checkpoints(tmp_path):
    whole = save(tmp_path / "step-00000010")
    removed = save(tmp_path / "step-00000020")
    (removed / "COMPLETE.json").unlink()  # the first thing that a removal does
    emptied = tmp_path / "step-00000030"
    emptied.mkdir()
    partial = tmp_path / ".step-00000040.partial"
    partial.mkdir()
    (tmp_path / "step-of-mine").mkdir()
    assert complete_checkpoints(tmp_path) == [whole]
    assert newest_checkpoint(tmp_path) == whole
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert set(find_leftovers(tmp_path)) == {removed, emptied, partial}
    assert FolderCheckpointIO().load_checkpoint(save(emptied))["loops"] == STATE["loops"]  # its place can be taken


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    folder = save(tmp_path / "step-00000010")

    def fail(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(KeyboardInterrupt):
        FolderCheckpointIO().remove_checkpoint(folder)
    assert complete_checkpoints(tmp_path) == []
    assert find_leftovers(tmp_path) == [folder]


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_line(folder, *, steps, disk=None, accumulation=1, module=None, resume=None, callbacks=(), **options):
    """Trains a small module, with checkpoints in the folder."""
    checkpoints = Checkpoints(folder, **{"every_n_steps": 2, **options})
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[disk or FolderCheckpointIO()], callbacks=[checkpoints, *callbacks],
        accumulate_grad_batches=accumulation,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(torch.ones(60, 1, 1), batch_size=None)
    trainer.fit(module or Line(), batches, ckpt_path=resume)


def test_training_keeps_the_newest_few_and_sweeps_leftovers(tmp_path):
    (tmp_path / ".step-00000001.partial-99").mkdir()
    (save(tmp_path / "step-00000003") / "COMPLETE.json").unlink()  # its removal was cut short
    fit_line(tmp_path, steps=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000007"]
    marker = json.loads((tmp_path / "step-00000007" / "COMPLETE.json").read_text())
    assert set(marker["files"]) == {"tensors-00000-of-00001.safetensors", "state.json"}


def test_a_step_that_cannot_be_saved_is_tried_once_with_any_accumulation(tmp_path, caplog):
    (tmp_path / ".step-00000002.partial").touch()  # where a folder is to be made
    with caplog.at_level(logging.WARNING):
        fit_line(tmp_path, steps=5, accumulation=4)
    (said,) = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert "checkpoint of step 2 cannot be written: " in said
    assert "next attempt at step 4 (failure 1 of 3)" in said
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000004", "step-00000005"]


def test_keep_every_keeps_checkpoints_forever(tmp_path):
    fit_line(tmp_path, steps=8, every_n_steps=1, keep_last=1, keep_every=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006", "step-00000008"]


def test_the_last_step_is_saved_again_and_its_failure_is_an_error(tmp_path, caplog):
    (tmp_path / ".step-00000004.partial").touch()  # where a folder is to be made
    with caplog.at_level(logging.WARNING), pytest.raises(CannotWriteError, match="checkpoint of step 4"):
        fit_line(tmp_path, steps=4)
    assert sum("checkpoint of step 4" in record.message for record in caplog.records) == 1


def spoil(folder, *steps):
    """Makes a folder in which checkpoints of some steps cannot be written."""
    folder.mkdir()
    for step in steps:
        (folder / f".step-{step:08d}.partial").touch()  # where a folder is to be made
    return folder


def test_only_three_failed_saves_in_a_row_end_a_run_at_the_next_save(tmp_path):
    four_in_all = spoil(tmp_path / "four in all", 1, 2, 4, 5)
    fit_line(four_in_all, steps=6, every_n_steps=1)
    assert newest_checkpoint(four_in_all).name == "step-00000006"
    three_in_a_row = spoil(tmp_path / "three in a row", 2, 3, 4)
    with pytest.raises(CannotWriteError, match=r"step 4 .*older ones are kept; 3 failures in a row"):
        fit_line(three_in_a_row, steps=6, every_n_steps=1)
    assert newest_checkpoint(three_in_a_row).name == "step-00000001"


class Disk(FolderCheckpointIO):
    """A disk that calls a function in the thread before each write."""

    def __init__(self, before):
        self.before = before

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(
            checkpoint, path, lambda write: storage_options(lambda group: (self.before(), write(group)))
        )


class Slow(Disk):
    """A disk that writes nothing until ``is_free`` is set."""

    def __init__(self):
        self.is_free = threading.Event()
        super().__init__(self.wait)

    def wait(self):
        assert self.is_free.wait(60), "the training waits for the write"


def test_a_checkpoint_has_the_weights_of_its_step_although_training_continues_while_it_is_written(tmp_path):
    class Line2(Line):
        def on_train_batch_end(self, *_):
            if self.global_step == 2:
                self.saved = {name: value.clone() for name, value in self.state_dict().items()}
            if self.global_step == 3:
                assert newest_checkpoint(tmp_path) is None
                disk.is_free.set()

    disk, module = Slow(), Line2()
    fit_line(tmp_path, steps=4, disk=disk, module=module)
    written = FolderCheckpointIO().load_checkpoint(tmp_path / "step-00000002")["state_dict"]
    assert_equal(written, module.saved)
    assert not torch.equal(written["layer.weight"], module.layer.weight)


def test_a_failed_run_ends_after_the_checkpoint_is_written(tmp_path):
    class Frees(Callback):
        def on_exception(self, *_):
            disk.is_free.set()

    class Fails(Line):
        def on_train_batch_end(self, *_):
            if self.global_step == 3:
                raise RuntimeError("of the training")

    disk = Slow()
    with pytest.raises(RuntimeError, match="of the training"):
        fit_line(tmp_path, steps=4, disk=disk, module=Fails(), callbacks=[Frees()])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_an_error_of_the_thread_that_is_no_fault_of_the_disk_ends_the_run(tmp_path):
    def fail():
        raise RuntimeError("of the thread")

    with pytest.raises(RuntimeError, match="of the thread"):
        fit_line(tmp_path, steps=4, disk=Disk(fail))


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")  # its batches are all the same
def test_moments_resume_bit_exact_beside_weights_of_another_layout(tmp_path):
    class Images(Line):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

        def training_step(self, batch, batch_idx):
            return self.layer(batch * torch.linspace(-1, 1, 18).view(1, 2, 3, 3)).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), fused=True)

    straight, resumed = Images(), Images()
    fit_line(tmp_path / "a", steps=4, module=straight)
    fit_line(tmp_path / "b", steps=2, module=Images())
    fit_line(tmp_path / "b", steps=4, module=resumed, resume=newest_checkpoint(tmp_path / "b"))
    assert_equal(resumed.state_dict(), straight.state_dict())


def act_on_rank(rank: int, folder, case: str) -> None:
    """Resumes or loads on one of two ranks, and writes the error."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    checkpoints = Checkpoints(folder, every_n_steps=1)
    checkpoints.resumes_from = folder / ("step-00000002" if case == "same" or rank == 0 else "step-00000001")
    error = ""
    try:
        if case == "no marker":
            FolderCheckpointIO().load_checkpoint(folder / f"seen by {rank}" / "step-00000001")
        else:
            checkpoints.setup(Trainer(logger=False, accelerator="cpu"), Line(), "fit")
    except ValueError as caught:
        error = str(caught)
    (folder / f"{rank}.txt").write_text(error)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("same", ""),
        ("other", "must have the same newest .* got rank 0: step-00000002, rank 1: step-00000001"),
        ("no marker", "COMPLETE.json is missing or has changed since"),
    ],
)
def test_all_ranks_raise_the_error_of_one(tmp_path, case, message):
    for rank in range(2):
        save(tmp_path / f"seen by {rank}" / "step-00000001")
    (tmp_path / "seen by 1" / "step-00000001" / "COMPLETE.json").unlink()
    run_ranks(act_on_rank, tmp_path, case)
    (error,) = {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)}
    assert re.search(message, error) if message else not error
