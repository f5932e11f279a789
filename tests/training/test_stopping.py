"""Non-finite updates in one process, and the time limits of the watchdog; test_survival.py has ranks and signals."""

import signal
import time

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from maskgit_pl import runs
from maskgit_pl.errors import INTERNAL_ERROR, NonFiniteError, PreemptedError
from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.runs.fitting import build
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.tokenizer.adversarial import AdversarialConfig
from maskgit_pl.training.checkpoints import Checkpoints
from maskgit_pl.training.optimizers import LearningRate
from maskgit_pl.training.stopping import StepCheck, Watchdog, clip_gradients
from tests import short_runs
from tests.conftest import tiny_flags
from tests.forked import Command
from tests.injection import Fault, Injection
from tests.short_runs import tiny_module


class History(Callback):
    """A callback that records the state after each step: weights, averages, optimizers, and the loss of stage 2."""

    def __init__(self) -> None:
        self.states: list[list[Tensor]] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._keep(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: object, *_: object) -> None:
        self._keep(trainer, module)
        if outputs:
            self.losses.append(float(outputs["loss"]))

    def _keep(self, trainer: Trainer, module: LightningModule) -> None:
        moments = [value for made in trainer.optimizers for state in made.state.values() for value in state.values()]
        self.states.append([value.clone() for value in [*module.state_dict().values(), *moments]])

    def changed(self, step: int) -> bool:
        """Returns True if step ``step``, counted from 1, changed any state."""
        before, after = self.states[step - 1 : step + 1]
        return len(before) != len(after) or not all(map(torch.equal, before, after))


@pytest.fixture(params=["tokenizer", "transformer"])
def module(request, tiny_pretrained) -> LightningModule:
    if request.param == "transformer":
        return tiny_module("transformer", tiny_pretrained / "tokenizer", rate=LearningRate(1e-2), ema_decay=0.9)
    adversarial = AdversarialConfig(DiscriminatorConfig(channel_multiplier=1 / 64), lecam_weight=0.1)
    return tiny_module("tokenizer", adversarial=adversarial, ema_decay=0.9)


@pytest.fixture
def fit(module, tiny_shards, tmp_path):
    """Trains with faults and the checks, and returns the states after each step."""

    def run(*faults: Fault, steps: int, more: tuple[Callback, ...] = ()) -> History:
        seen, checkpoints = History(), Checkpoints(tmp_path / "checkpoints", every_n_steps=100)
        callbacks = [seen, StepCheck(checkpoints), checkpoints, Injection(faults), *more]
        source = short_runs.data(tiny_shards)
        short_runs.fit(module, source, steps=steps, folder=tmp_path, callbacks=callbacks, limit_val_batches=0)
        return seen

    return run


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nan gradient", "nan loss"])
def test_a_non_finite_step_changes_no_weight_average_code_or_moment(fit, what):
    seen = fit(Fault(what, step=3), steps=4)
    assert [seen.changed(step) for step in (1, 2, 3, 4)] == [True, True, False, True]
    assert all(value.isfinite().all() for value in seen.states[-1])
    assert torch.tensor(seen.losses).isfinite().all() == (what == "nan gradient" or not seen.losses)


def test_the_fourth_skipped_step_in_a_row_ends_the_run(fit, module):
    weights = [value.clone() for value in module.state_dict().values()]
    with pytest.raises(NonFiniteError, match="step 3: non-finite gradient, 4 steps in a row"):
        fit(Fault("nan gradient", step=1, times=9), steps=8)
    assert all(map(torch.equal, module.state_dict().values(), weights))


def test_skipped_steps_that_are_not_in_a_row_end_no_run(fit):
    seen = fit(Fault("nan gradient", step=1, times=3), Fault("nan gradient", step=5, times=2), steps=7)
    assert [seen.changed(step) for step in range(1, 8)] == [False, False, False, True, False, False, True]


def gradients(*values: list[float]) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value)
    return torch.optim.SGD([*parameters, nn.Parameter(torch.zeros(3))], lr=1.0), parameters


@pytest.mark.parametrize(("max_norm", "scale"), [(None, 1.0), (26.0, 1.0), (6.5, 0.5)])
def test_gradients_above_the_norm_are_scaled_down_to_it_together(max_norm, scale):
    optimizer, parameters = gradients([3.0, 4.0], [0.0, 12.0])
    assert clip_gradients(optimizer, max_norm).item() == pytest.approx(13.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0, 4.0]) * scale)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 12.0]) * scale)


def test_phases_without_a_median_have_the_longest_limit(tmp_path):
    trainer, module = Trainer(accelerator="cpu", logger=False, barebones=True), LightningModule()
    watchdog = Watchdog(tmp_path, seconds=0.05)
    assert watchdog.limit == 18 * 0.05  # set-up
    for _ in range(8):
        watchdog.on_train_batch_end(trainer, module)
        time.sleep(0.01)
    of_a_step = watchdog.limit
    assert 20 * 0.01 <= of_a_step < 18
    watchdog.seconds = 17.0
    assert watchdog.limit == 17  # the shortest limit of a step
    watchdog.seconds = 0.05
    for begin in (
        watchdog.on_validation_start,
        watchdog.on_train_end,
        lambda *_: watchdog.on_save_checkpoint(trainer, module, {}),
        lambda *_: watchdog.on_exception(trainer, module, PreemptedError("stopped")),
    ):
        begin(trainer, module)
        assert watchdog.limit == 18 * 0.05
        watchdog.on_train_batch_end(trainer, module)
        watchdog.on_train_batch_end(trainer, module)
        assert watchdog.limit != 18 * 0.05


@pytest.mark.parametrize(("cluster", "seconds"), [("ddp", 600.0), ("ddp", 1e9), ("fsdp", 0.5)])
def test_collectives_of_a_run_wait_longer_than_its_watchdog(tmp_path, tiny_shards, tiny_pretrained, cluster, seconds):
    stage = "tokenizer" if cluster == "ddp" else "transformer"
    words = [*tiny_flags(stage), f"--hang_seconds={seconds}", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    recipe = runs.Recipe.read(stage, cluster=cluster, overrides=words)
    tokenizer = None if stage == "tokenizer" else tiny_pretrained / "tokenizer"
    run = build(plan_run(recipe, run=tmp_path / "runs" / "one", data=tiny_shards, tokenizer=tokenizer))
    waits = run.trainer.strategy._timeout.total_seconds()
    assert waits > min(run.watchdog.longest_limit, 86400 * 365)
    assert waits * 1e9 < 2**62  # torch adds it to a time in nanoseconds, as 64 bits


WATCHED = """
import os, time
from pathlib import Path
from lightning.pytorch import Trainer
from maskgit_pl.training import stopping

stopping._GRACE_SECONDS = stopping._REPORT_SECONDS = 1.0
trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
{before}
with stopping.Watchdog(Path({folder!r}), seconds={limit} / 18).watch(trainer):
    Path({folder!r}, "begun").touch()
    time.sleep({sleep})
"""

FULL_PIPE = """
reader, writer = os.pipe()
os.set_blocking(writer, False)
while os.get_blocking(writer) is False:
    try:
        os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
os.dup2(writer, 2)
"""


@pytest.mark.slow
@pytest.mark.survival
@pytest.mark.parametrize("before", ["", FULL_PIPE], ids=["stderr", "a pipe that no process reads"])
def test_a_hang_ends_the_process_with_its_stacks(tmp_path, before):
    code = WATCHED.format(folder=str(tmp_path), limit=1, sleep=600, before=before)
    with Command(code) as process:
        _, error = process.communicate(60)
    assert process.returncode == INTERNAL_ERROR
    stacks = (tmp_path / "stacks.txt").read_text()
    assert 'File "<string>"' in stacks
    if not before:
        assert "hang, rank 0: set-up: no progress for 1 s after step 0" in error
        assert stacks in error


@pytest.mark.slow
@pytest.mark.survival
def test_time_in_which_the_process_is_stopped_does_not_count(tmp_path):
    code = WATCHED.format(folder=str(tmp_path), limit=3, sleep=5, before="")
    with Command(code) as process:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
