"""Runs from Python: both stages in one process, the return values, and the files that remain."""

import gc
import inspect
import logging
import os
import random
import re
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from maskgit_pl import MaskGIT, files, processes, runs
from maskgit_pl.errors import PreemptedError
from maskgit_pl.pretrained.networks import fingerprint
from maskgit_pl.runs.fitting import build, leave_no_trace
from maskgit_pl.training.checkpoints import newest_checkpoint
from maskgit_pl.training.stopping import StepCheck
from tests.conftest import tiny_flags
from tests.forked import holder


def recipe(stage: str, **overrides: object) -> runs.Recipe:
    """Returns the tiny recipe of a stage; ``a__b`` means ``a.b``."""
    more = {key.replace("__", "."): value for key, value in overrides.items()}
    return runs.Recipe.read(stage, overrides=tiny_flags(stage)).with_overrides(more)


@pytest.mark.slow
def test_both_stages_train_in_one_process_and_a_second_call_does_nothing(tiny_shards, tmp_path):
    where = {"run": tmp_path / "runs" / "one", "data": tiny_shards}
    handlers = [signal.getsignal(number) for number in processes.SIGNALS]
    first = runs.fit(recipe("tokenizer"), **where)
    assert (first.folder, first.step, first.was_finished) == (where["run"], 1, False)
    assert first.metrics["val/psnr"] > 0

    second_recipe = recipe("transformer", trainer__max_steps=4, checkpoint_every=2)
    second = runs.fit(second_recipe, **where)  # with the tokenizer that the run has now
    assert (second.step, second.was_finished) == (4, False)
    assert second.metrics["val/loss"] > 0
    assert second.pretrained == first.pretrained == where["run"] / "pretrained"
    (image,) = MaskGIT.from_pretrained(second.pretrained).generate([0], num_steps=2, seed=0)
    assert image.size == (8, 8)

    weights = fingerprint(second.pretrained / "transformer")
    for stage, step in ((recipe("tokenizer"), 1), (second_recipe, 4)):
        again = runs.fit(stage, **where)
        assert (again.step, again.was_finished, again.metrics) == (step, True, {})
    assert fingerprint(second.pretrained / "transformer") == weights
    assert [signal.getsignal(number) for number in processes.SIGNALS] == handlers

    with pytest.raises(ValueError, match=r"cannot resume .* from step 1: settings changed .*data\.seed: 0 -> 7"):
        runs.fit(recipe("tokenizer", data__seed=7), **where)
    with holder(where["run"] / "tokenizer"), pytest.raises(ValueError, match="is in use by process"):
        runs.fit(recipe("tokenizer", trainer__max_steps=2), **where)
    assert runs.export(where["run"], stage="transformer", step=2, out=tmp_path / "older") == tmp_path / "older"


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_raises_and_the_same_call_resumes(tiny_shards, tmp_path, monkeypatch, presses):
    own = StepCheck.on_train_batch_end

    def on_train_batch_end(step_check: StepCheck, trainer: Trainer, *more: object) -> None:
        if trainer.global_step == 3:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
        own(step_check, trainer, *more)

    long = recipe("tokenizer", trainer__max_steps=5, checkpoint_every=2)
    where = {"run": tmp_path / "one", "data": tiny_shards}
    handlers = [signal.getsignal(number) for number in processes.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(StepCheck, "on_train_batch_end", on_train_batch_end)
        with pytest.raises(PreemptedError if presses == 1 else KeyboardInterrupt):
            runs.fit(long, **where)
    assert [signal.getsignal(number) for number in processes.SIGNALS] == handlers
    newest = newest_checkpoint(tmp_path / "one" / "tokenizer" / "checkpoints")
    assert newest.name == ("step-00000003" if presses == 1 else "step-00000002")
    assert runs.fit(long, **where).step == 5


def state() -> dict[str, object]:
    """Returns the settings of the process that results or messages may depend on."""
    loggers = [logging.getLogger(name) for name in (None, "maskgit_pl", "lightning", "lightning.pytorch")]
    return {
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # the global generator
        "python": random.getstate(),
        "warnings": list(warnings.filters),
        "lightning": [(each.level, list(each.handlers), each.propagate) for each in loggers],
        "handlers": [signal.getsignal(number) for number in processes.SIGNALS],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (
            {"trainer__deterministic": True, "cpu_threads": 3},
            {"deterministic", "tf32", "torch", "warnings", "lightning", "handlers", "threads"},
        ),
        ({"matmul_precision": "high", "trainer__benchmark": True}, {"matmul", "benchmark"}),
    ],
)
def test_the_process_is_as_before_a_training_and_its_memory_is_free(
    options, changed, tiny_shards, tmp_path, monkeypatch
):
    # The defaults, which an earlier test may have changed.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.INFO)
    inside = []
    plain = StepCheck.on_train_batch_end
    monkeypatch.setattr(StepCheck, "on_train_batch_end", lambda *args: (inside.append(state()), plain(*args))[1])
    before = state()
    runs.fit(recipe("tokenizer", **options), run=tmp_path / "run", data=tiny_shards)
    assert {name for name, value in inside[-1].items() if value != before[name]} >= changed
    assert {name for name, value in state().items() if value != before[name]} == set()
    assert [each for each in gc.get_objects() if isinstance(each, Trainer)] == []


def test_a_start_opens_each_manifest_once(tiny_shards, tiny_pretrained, tmp_path, monkeypatch):
    opened, own = list[Path](), files.open_regular
    monkeypatch.setattr(files, "open_regular", lambda path: (opened.append(Path(path)), own(path))[1])
    folders = {"run": tmp_path / "one", "data": tiny_shards, "tokenizer": tiny_pretrained / "tokenizer"}
    plan = runs.plan_run(recipe("transformer", max_passes=1), **folders)
    with leave_no_trace():
        build(plan).datamodule.setup()
    assert [opened.count(tiny_shards / f"{split}.json") for split in ("train", "val")] == [1, 1]
    # The tokenizer is loaded after the values are known.
    assert opened.count(tiny_pretrained / "tokenizer" / "config.json") == 2


def test_a_run_is_a_name_in_runs_or_a_folder(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = recipe("tokenizer")
    folders = [
        runs.plan_run(tokenizer, run=run, data=tiny_shards).folder for run in (None, "one", "a/one", Path("one"))
    ]
    assert folders == [Path("runs/fashion-mnist-base"), Path("runs/one"), Path("a/one"), Path("one")]


@pytest.mark.parametrize("blocked", [".", "tokenizer/checkpoints", "pretrained/tokenizer"])
def test_an_unwritable_output_ends_a_run_before_it_trains(tiny_shards, tmp_path, blocked):
    file = tmp_path / "one" / blocked
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a file")
    with pytest.raises(ValueError, match=r"run .*one: output must be"):
        runs.fit(recipe("tokenizer"), run=tmp_path / "one", data=tiny_shards)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert file.read_text() == "a file"


@pytest.mark.slow
def test_the_tokenizer_that_a_run_has_trained_is_not_replaced(tiny_shards, tiny_pretrained, tmp_path):
    where = {"run": tmp_path / "runs" / "one", "data": tiny_shards}
    trained = runs.fit(recipe("tokenizer"), **where)
    own = fingerprint(trained.pretrained / "tokenizer")
    wrong = (
        "run .* has trained a tokenizer of its own, which the export of .* would replace; name another run with --run"
    )
    with pytest.raises(ValueError, match=wrong):
        runs.fit(recipe("transformer"), tokenizer=tiny_pretrained / "tokenizer", **where)
    assert fingerprint(trained.pretrained / "tokenizer") == own
    assert not (where["run"] / "transformer").exists()
    copied = shutil.copytree(trained.pretrained / "tokenizer", tmp_path / "copied")  # the same weights
    assert runs.fit(recipe("transformer"), tokenizer=copied, **where).step == 1


@pytest.mark.filterwarnings("ignore:.*`srun` command is available")
def test_a_batch_script_without_srun_is_refused(tiny_shards, tmp_path, monkeypatch):
    batch = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost",
    }  # fmt: skip
    for name, value in batch.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # which Lightning sets
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("it would wait for rank 1"))
    two = recipe("tokenizer", trainer__devices=2, trainer__strategy="ddp")
    with pytest.raises(ValueError, match=r"2 ranks must be started with srun, got 1 task.*; put `srun` before"):
        runs.fit(two, run=tmp_path / "runs" / "one", data=tiny_shards)
    assert not (tmp_path / "runs").exists()


def test_the_python_page_calls_fit_with_its_arguments(monkeypatch):
    calls, signature = [], inspect.signature(runs.fit)
    monkeypatch.setattr(runs, "fit", lambda *args, **named: calls.append(signature.bind(*args, **named)), raising=False)
    page = (Path(runs.__file__).parents[2] / "docs" / "python.md").read_text()
    (block,) = re.findall(r"^```python\n(from maskgit_pl import runs\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert calls[0].args[0].get("trainer.max_steps") == 100_000
