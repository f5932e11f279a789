"""Fault injection: a run of two ranks stops with the right exit code and message, and resumes bit-exact.

docs/faults.md lists the faults.
"""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from maskgit_pl.errors import (
    BAD_INPUT,
    INTERNAL_ERROR,
    CannotWriteError,
    DataBudgetError,
    NonFiniteError,
    PreemptedError,
    exit_code_of,
)
from maskgit_pl.training.checkpoints import FolderCheckpointIO, complete_checkpoints, newest_checkpoint, step_of
from tests.injection import Disk, Fault, kill_in_saving, kill_in_writing
from tests.observing import KILLED, Runs, StageRuns, Topology, assert_same_state

pytestmark = [pytest.mark.slow, pytest.mark.survival]

GLOBAL_BATCH, STEPS = 12, 10
TWO = Topology(ranks=2)
STAGES = ("tokenizer", "transformer")
GAN = "--model.adversarial={discriminator: {name: stylegan, channel_multiplier: 0.015625}, start_step: 2}"
PREEMPTED, NOT_FINITE, CANNOT_WRITE = PreemptedError.exit_code, NonFiniteError.exit_code, CannotWriteError.exit_code


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> StageRuns:
    words = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=4", "--trainer.limit_val_batches=2"]
    words += ["--data.validation_batch=2", "--checkpoint_every=100"]
    more = {"tokenizer": [GAN], "transformer": []}
    return StageRuns(tmp_path_factory.mktemp("survival"), words, more, GLOBAL_BATCH)


def assert_resumes(bench: StageRuns, stage: str, name: str, topology: Topology, runs: Runs | None = None) -> None:
    """Resumes a run, and compares its end with an uninterrupted run."""
    runs = runs or bench.runs[stage]
    runs.leg(name, topology)
    assert_same_state(runs.seen(name), bench.straight(stage, topology))


def line(text: str, pattern: str) -> str:
    """Returns the first line of an output that matches a pattern."""
    found = [each for each in text.splitlines() if re.search(pattern, each)]
    assert found, f"{pattern!r} is not in:\n{text[-3000:]}"
    return found[0]


# Kills while a checkpoint is written

SIZES = (10_000, 40_000)  # bytes of a tensor file of 61,700
TO_KILL = 25 - len(SIZES)


def test_25_kills_while_saving_leave_25_checkpoints_that_load(bench):
    runs, alone = bench.runs["transformer"], Topology()
    more = ("--checkpoint_every=1", "--keep_last=1", "--trainer.max_steps=200", "--trainer.val_check_interval=200")
    folder = runs.folder / "killed" / "transformer" / "checkpoints"
    kept, moments = [], []
    for number in range(1, TO_KILL + 1):
        (text,) = runs.leg("killed", alone, *more, code=KILLED, prepare=partial(kill_in_saving, folder, number))
        moments.append(line(text, "^killed in checkpoint at"))
        kept.append(loadable(folder))
    for size in SIZES:
        runs.leg("killed", alone, *more, code=-signal.SIGXFSZ, prepare=partial(kill_in_writing, size))
        assert not list(folder.glob(".step-*.partial/COMPLETE.json"))
        kept.append(loadable(folder))
    runs.leg("killed", alone, *more, f"--trainer.max_steps={kept[-1] + 1}")
    assert [path.name for path in folder.iterdir()] == [f"step-{kept[-1] + 1:08d}"]  # all that was torn is swept
    assert kept == sorted(kept)
    assert kept[-1] > TO_KILL / 2
    moments = [re.sub(r"\S*/checkpoints/|\d{8}", "", moment) for moment in moments]
    events = ("tensors", "state.json", "COMPLETE.json", "open .step-.partial", "remove", "rename", "rmtree", "rmdir")
    for event in events:
        assert any(event in moment for moment in moments), (event, "\n".join(moments))


def loadable(folder: Path) -> int:
    """Reads the newest complete checkpoint, and returns its step."""
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert FolderCheckpointIO().load_checkpoint(newest)["global_step"] == step_of(newest)
    return step_of(newest)


# Signals

FSDP = Topology(ranks=2, workers=2, cluster="fsdp")
SIGNALS = [
    ("transformer", TWO, Fault(signal.SIGUSR1, 3, rank=0), "SIGUSR1 to rank 0"),
    ("transformer", TWO, Fault(signal.SIGINT, 3), "SIGINT (Ctrl-C) to all ranks"),
    ("tokenizer", TWO, Fault(signal.SIGTERM, 3, rank=1, times=2), "SIGTERM to rank 1, twice"),
    ("transformer", TWO, Fault(signal.SIGTERM, 4, "validation", rank=1), "SIGTERM to rank 1 during validation"),
    ("transformer", TWO, Fault(signal.SIGTERM, 4, "saving", rank=0), "SIGTERM to rank 0 while saving"),
    ("tokenizer", TWO, Fault(signal.SIGUSR2, 0, "start", rank=1), "SIGUSR2 to rank 1 before step 1"),
    ("transformer", FSDP, Fault(signal.SIGTERM, 3, to="group"), "SIGTERM to all ranks and their workers"),
]


@pytest.mark.parametrize(("stage", "topology", "fault", "name"), SIGNALS, ids=[name for *_, name in SIGNALS])
def test_a_signal_stops_all_ranks_after_the_same_step(bench, stage, topology, fault, name):
    runs, run = bench.runs[stage], name.replace(" ", "-").replace(",", "")
    every = 4 if fault.where == "saving" else 100
    texts = runs.leg(run, topology, f"--checkpoint_every={every}", faults=[fault], code=PREEMPTED)
    stopped = step_of(runs.newest(run))
    assert stopped <= fault.step + 1
    said = line(texts[0], "stopped by a signal after saving step")
    assert f"saving step {stopped};" in said
    assert "asked to stop" not in texts[1]
    assert all("Traceback" not in text for text in texts)
    assert_resumes(bench, stage, run, topology)


# Ranks that are gone


WAITED = r"maskgit train: rank {}, step \d+: another rank has ended"


@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_that_dies_ends_the_others_within_30_seconds(bench, rank):
    runs, run = bench.runs["transformer"], f"dead{rank}"
    begun: list[float] = []

    def wait(processes) -> None:
        processes[rank].join()
        begun.append(time.monotonic())
        processes[1 - rank].join()

    codes = [INTERNAL_ERROR, INTERNAL_ERROR]
    codes[rank] = KILLED
    fault = Fault(signal.SIGKILL, 3, rank=rank)
    texts = runs.leg(run, TWO, "--checkpoint_every=2", faults=[fault], code=codes, during=wait)
    took = time.monotonic() - begun[0]
    assert took < 30
    line(texts[1 - rank], WAITED.format(1 - rank))
    assert "Traceback" not in texts[1 - rank]
    assert_resumes(bench, "transformer", run, TWO)


def test_a_rank_that_dies_while_its_thread_writes_ends_the_other(bench):
    runs, run = bench.runs["transformer"], "dead-writer"
    dies = partial(kill_in_saving, runs.folder / run / "transformer" / "checkpoints", 10)
    texts = runs.leg(run, TWO, "--checkpoint_every=2", code=[KILLED, INTERNAL_ERROR], prepare=dies)
    line(texts[0], "^killed in checkpoint at .*tensors-00000")
    line(texts[1], WAITED.format(1))
    assert runs.newest(run).name == "step-00000002"
    assert_resumes(bench, "transformer", run, TWO)


@pytest.mark.parametrize(
    ("error", "rank"), [(DataBudgetError("too many unreadable"), 0), (FileNotFoundError("no such thing"), 1)], ids=repr
)
def test_a_rank_with_an_error_prints_it_and_ends_the_others(bench, error, rank):
    runs = bench.runs["transformer"]
    code, run = exit_code_of(error), f"alone{rank}-{exit_code_of(error)}"
    codes = [INTERNAL_ERROR, INTERNAL_ERROR]
    codes[rank] = code
    texts = runs.leg(run, TWO, "--checkpoint_every=2", faults=[Fault(error, 4, rank=rank)], code=codes)
    assert "Traceback" not in texts[0] + texts[1]
    said = line(texts[rank], "maskgit train: ")
    assert said == f"maskgit train: {error}"
    assert line(texts[1 - rank], "maskgit train: ").startswith(f"maskgit train: rank {1 - rank}, step 3: another rank")
    assert_resumes(bench, "transformer", run, TWO)


def test_an_export_that_fails_ends_all_ranks(bench):
    runs = bench.runs["transformer"]
    blocked, observed = runs.runs / "unexported" / "pretrained", runs.folder / "unexported-leg00-rank1.jsonl"

    def block(processes) -> None:
        while not (observed.exists() and observed.stat().st_size):  # until the first step, after the checks
            time.sleep(0.01)
        blocked.write_text("no folder")

    texts = runs.leg("unexported", TWO, code=[BAD_INPUT, INTERNAL_ERROR], during=block)
    line(texts[0], "maskgit train: .*pretrained")
    assert re.search(WAITED.format(1), texts[1])
    blocked.unlink()
    assert_resumes(bench, "transformer", "unexported", TWO)
    assert (blocked / "transformer" / "config.json").is_file()


STACKS = ("stacks.txt", "stacks-rank1.txt")


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_rank_ends_the_run_with_the_stacks_of_the_other(bench, rank):
    runs, other, run = bench.runs["transformer"], 1 - rank, f"hung{rank}"

    def wake_up(processes) -> None:
        processes[other].join(60)
        assert processes[other].exitcode == INTERNAL_ERROR
        os.kill(processes[rank].pid, signal.SIGCONT)

    fault, more = Fault(signal.SIGSTOP, 9, rank=rank), ("--hang_seconds=3", "--checkpoint_every=6")
    texts = runs.leg(run, TWO, *more, faults=[fault], code=INTERNAL_ERROR, during=wake_up)
    line(texts[other], f"^hang, rank {other}: training: no progress")
    stacks = (runs.folder / run / "transformer" / STACKS[other]).read_text()
    assert "training_step" in stacks or "backward" in stacks or "all_reduce" in stacks
    assert_resumes(bench, "transformer", run, TWO)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_both(bench, rank):
    """The other rank waits in a collective, so both reach the limit."""
    runs, run = bench.runs["transformer"], f"asleep{rank}"
    fault, more = Fault("asleep", 9, rank=rank), ("--hang_seconds=3", "--checkpoint_every=6")
    texts = runs.leg(run, TWO, *more, faults=[fault], code=INTERNAL_ERROR)
    for each, text in enumerate(texts):
        line(text, f"^hang, rank {each}: training: no progress")
    for each, file in enumerate(STACKS):
        stacks = (runs.folder / run / "transformer" / file).read_text()
        assert bool(re.search(r'injection.py", line \d+ in on_train_batch_end', stacks)) == (each == rank)
    assert_resumes(bench, "transformer", run, TWO)


def fill_stderr() -> None:
    """Sends the output to a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def test_a_hang_ends_a_run_whose_stderr_is_full(bench):
    runs, sleep = bench.runs["transformer"], Fault("asleep", 7)  # the median counts from 5 steps on
    runs.leg("mute", Topology(), "--hang_seconds=3", faults=[sleep], code=INTERNAL_ERROR, prepare=fill_stderr)


# Losses that are not finite


@pytest.mark.parametrize(("stage", "what"), [("tokenizer", "nan loss"), ("transformer", "nan gradient")])
def test_no_rank_updates_after_a_non_finite_value_of_one(bench, stage, what):
    runs, run = bench.runs[stage], what.replace(" ", "-")
    topology = Topology(ranks=2, accumulation=2)
    texts = runs.leg(run, topology, faults=[Fault(what, 5, rank=1, times=2)])
    weights = {positions[0] // GLOBAL_BATCH: batch["weights"] for positions, batch in runs.seen(run).legs[0].items()}
    assert weights[3] == weights[4] == weights[5] != weights[6] != weights[2]
    said = line(texts[0], "step 4: non-finite .*; no rank updates its weights")
    if what == "nan loss":
        assert "loss on rank 1" in said


@pytest.mark.parametrize(("stage", "cluster"), [("tokenizer", "ddp"), ("transformer", "fsdp")])
def test_four_non_finite_steps_end_the_run(bench, stage, cluster):
    runs, run = bench.runs[stage], f"nan-{cluster}"
    fault = Fault("nan loss", 5, rank=1, times=STEPS)
    texts = runs.leg(run, Topology(ranks=2, cluster=cluster), "--checkpoint_every=2", faults=[fault], code=NOT_FINITE)
    assert step_of(runs.newest(run)) <= 7
    loaded = FolderCheckpointIO().load_checkpoint(runs.newest(run))
    assert all(value.isfinite().all() for value in loaded["state_dict"].values() if value.is_floating_point())
    line(texts[0], "step 7: non-finite loss on rank 1, 4 steps in a row")
    assert "4 steps in a row" not in texts[1]


# Disks


@pytest.mark.parametrize("what", ["full disk", "read-only disk"])
def test_a_run_survives_a_checkpoint_that_cannot_be_written(bench, small_disk, tmp_path, what):
    runs = Runs(tmp_path, bench.runs["transformer"].given, GLOBAL_BATCH, small_disk)
    more = ("--checkpoint_every=2", "--keep_last=9")
    texts = runs.leg("mended", TWO, *more, faults=[Fault(what, 3, times=4)])
    kept = [step_of(path) for path in complete_checkpoints(small_disk / "mended" / "transformer" / "checkpoints")]
    assert kept == [2, 8, 10]
    line(texts[0], "checkpoint of step 4 cannot be written")
    assert "cannot be written" not in texts[1]
    assert_same_state(runs.seen("mended"), bench.straight("transformer", TWO))


@pytest.mark.parametrize("what", ["full disk", "read-only disk"])
def test_three_unwritable_checkpoints_end_the_run_with_one_line(bench, small_disk, tmp_path, what):
    runs = Runs(tmp_path, bench.runs["transformer"].given, GLOBAL_BATCH, small_disk)
    fault = Fault(what, 3, times=STEPS)
    texts = runs.leg("full", TWO, "--checkpoint_every=2", "--keep_last=1", faults=[fault], code=CANNOT_WRITE)
    Disk().mend(small_disk / "full" / "transformer")
    assert runs.newest("full").name == "step-00000002"
    assert FolderCheckpointIO().load_checkpoint(runs.newest("full"))["global_step"] == 2
    line(texts[0], "3 failures in a row")
    assert "Traceback" not in texts[0]
    assert_resumes(bench, "transformer", "full", TWO, runs)


# Lightning's own launcher

LAUNCHED = {
    "SIGTERM to the command": (PREEMPTED, "stopped by a signal after saving step"),
    "SIGKILL to the process of rank 1": (INTERNAL_ERROR, r"rank 1 \(process \d+\) ended with -9"),
    "DataBudgetError on rank 1 only": (DataBudgetError.exit_code, r"rank 1 \(process \d+\) ended with 76"),
    "SIGKILL to the command": (KILLED, "maskgit train: rank 1, step .*: another rank has ended"),
}
COMMAND = """
import sys
from maskgit_pl.cli import main
from maskgit_pl.errors import DataBudgetError
from maskgit_pl.runs import fitting
from tests.injection import Fault, Injection

own, faults = fitting._build_callbacks, (Fault(DataBudgetError("too many unreadable"), 100, rank=1),)
fitting._build_callbacks = lambda *given: [*own(*given), Injection(faults)]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("fault", LAUNCHED)
def test_a_command_that_starts_its_ranks_exits_with_the_code_of_the_run(bench, tmp_path, fault):
    (code, pattern), runs = LAUNCHED[fault], bench.runs["transformer"]
    run = fault.replace(" ", "-")
    words = runs.words(
        run, TWO, "--trainer.max_steps=100000", "--checkpoint_every=5", "--trainer.val_check_interval=100000"
    )
    (tmp_path / "command.py").write_text(COMMAND)
    program = [str(tmp_path / "command.py")] if "Error" in fault else ["-m", "maskgit_pl"]
    log = runs.folder / f"{run}.txt"
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen([sys.executable, *program, *words], stdout=output, stderr=output, env=environment)
        while process.poll() is None and newest_checkpoint(runs.folder / run / "transformer" / "checkpoints") is None:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        commands = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children}
        (rank1,) = (int(child) for child, typed in commands.items() if f"--run={run}" in typed)
        if fault.startswith("SIG"):
            name, _, receiver = fault.partition(" to ")
            os.kill(process.pid if receiver == "the command" else rank1, signal.Signals[name])
        begun = time.monotonic()
        assert process.wait(90) == code, log.read_text()[-3000:]
        while Path(f"/proc/{rank1}").exists() and time.monotonic() - begun < 60:
            time.sleep(0.05)
    took = time.monotonic() - begun
    assert took < 60
    assert "Traceback" not in log.read_text()
    line(log.read_text(), pattern)
