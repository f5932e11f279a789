"""Training on a real Slurm cluster of this machine, through ``maskgit slurm submit`` and the job's own script.

Each job trains on two nodes. What disturbs it is what disturbs it elsewhere: a job of a higher partition, the time
limit, signals, a node that answers no more. `make test-slurm` runs these tests.
"""

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from maskgit_pl.cli import main
from maskgit_pl.training.checkpoints import newest_checkpoint, step_of
from tests.conftest import save_tiny_pretrained, save_uneven_shards

ROOT = Path(__file__).parents[2]
HERE, ELSEWHERE = "node[1-2]", "node[3-4]"  # where jobs are disturbed, and where they are not
EVERY = 40  # steps between checkpoints
SHORT, LONG = 200, 1400  # steps: long enough for a few checkpoints, and for the signal ahead of a time limit

pytestmark = pytest.mark.skipif(shutil.which("slurmctld") is None, reason="Slurm is not installed: make test-slurm")


SECONDS = 180.0  # after which a job counts as hanging
SCRIPT = Path(__file__).parent / "cluster.sh"


class Cluster:
    """A cluster with its nodes and its queue.

    Args:
        folder: Folder of the cluster.
        work: Folder in which jobs are submitted.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder = folder
        self.work = work

    def start(self, num_nodes: int) -> None:
        """Starts controller and nodes."""
        self._script("start", SLURM_TEST_NODES=str(num_nodes))
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")

    def stop(self) -> None:
        """Stops jobs and daemons."""
        self._script("stop")
        del os.environ["SLURM_CONF"]

    def start_node(self, number: int) -> None:
        """Starts a node again."""
        self._script("start-node", str(number))

    def _script(self, *words: str, **variables: str) -> None:
        name, *more = words
        subprocess.run([SCRIPT, name, self.folder, *more], check=True, timeout=60, env={**os.environ, **variables})

    def run(self, command: str) -> str:
        """Runs a command line, and returns its output."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.work, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Returns Slurm's record of a job."""
        command = ["scontrol", "--oneliner", "show", "job", number]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait_until(self, condition: Callable[[], bool], what: str, *, seconds: float = SECONDS) -> None:
        """Waits until a condition holds."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < seconds, f"after {seconds:.0f} s still not: {what}\n{self._queue()}"
            time.sleep(0.2)

    def wait_for_end(self, *numbers: str) -> None:
        """Waits until jobs have ended and are not requeued."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def all_ended() -> bool:
            return all(self.job(number)["JobState"] in ends for number in numbers)

        while True:
            self.wait_until(all_ended, f"jobs {numbers} end")
            time.sleep(1.5)  # one that Slurm itself puts back is for a moment as one that has ended
            if all_ended():
                return

    def _queue(self) -> str:
        return subprocess.run(["scontrol", "show", "job"], capture_output=True, text=True, check=False).stdout

    def processes(self, number: str, node: str) -> dict[int, dict[str, str]]:
        """Returns the processes of the tasks of a job on a node, with their environments."""
        found = {}
        for pid, variables in every_process():
            if variables.get("SLURM_JOB_ID") == number and variables.get("SLURMD_NODENAME") == node:
                found[pid] = variables
        return found

    def tasks(self, number: str, node: str) -> list[int]:
        """Returns the process IDs of the tasks of the training of a job on a node."""
        return [pid for pid, variables in self.processes(number, node).items() if "SLURM_STEP_NUM_TASKS" in variables]

    def programs(self, number: str) -> list[int]:
        """Returns the process IDs of the tasks of a job that run Python already."""
        nodes = ("node1", "node2", "node3", "node4")
        found = [pid for node in nodes for pid in self.processes(number, node)]
        return [pid for pid in found if "python" in os.path.realpath(f"/proc/{pid}/exe")]

    def freeze(self, node: str, number: str) -> list[int]:
        """Suspends a node: its daemon and the tasks of a job, so that it does not answer, as after a power failure."""
        daemon = int((self.folder / "run" / f"{node}.pid").read_text())
        tasks = self.processes(number, node)
        steps = {int(re.findall(r"PPid:\s*(\d+)", _read(Path(f"/proc/{pid}/status")))[0]) for pid in tasks}
        pids = [daemon, *steps.difference(tasks), *tasks]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids


def every_process() -> Iterator[tuple[int, dict[str, str]]]:
    """Yields each process of the machine with its initial environment."""
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            pairs = (line.partition("=") for line in _read(each / "environ").split("\0"))
            yield int(each.name), {name: value for name, _, value in pairs}


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


class Run:
    """A stage of a run, submitted with ``maskgit slurm submit``.

    Args:
        cluster: Cluster of the run.
        call: Function ``maskgit``: words -> exit code and output.
        name: Name of the run.
        stage: Stage of the run.
        flags: Additional flags of the command.
    """

    def __init__(
        self, cluster: Cluster, call: Callable[..., tuple[int, str]], name: str, stage: str, flags: Sequence[str]
    ) -> None:
        self.cluster, self._call, self.stage = cluster, call, stage
        self.words = ["slurm", "submit", stage, f"--run={name}", *flags]
        self.folder = cluster.work / "runs" / name / stage
        self.number = ""

    def submit(self, *more: str) -> str:
        """Submits the run, and returns the output."""
        code, printed = self._call(*self.words, *more)
        assert code == 0, printed
        found = re.search(r"^job (\d+): ", printed, re.MULTILINE)
        self.number = found.group(1) if found else ""
        return printed

    @property
    def log(self) -> str:
        """The log of the job."""
        return _read(self.folder / f"slurm-{self.number}.log")

    @property
    def step(self) -> int:
        """The step of the newest complete checkpoint."""
        newest = newest_checkpoint(self.folder / "checkpoints")
        return 0 if newest is None else step_of(newest)

    @property
    def restarts(self) -> int:
        """The number of restarts of the job by Slurm."""
        return int(self.cluster.job(self.number)["Restarts"])

    def wait_beyond(self, step: int) -> None:
        """Waits for a newer checkpoint."""
        self.cluster.wait_until(lambda: self.step > step, f"a checkpoint beyond step {step}: {self.log}")

    def finish(self, *, state: str = "COMPLETED") -> None:
        """Waits for the end of the job."""
        self.cluster.wait_for_end(self.number)
        assert self.cluster.job(self.number)["JobState"] == state, self.log

    def weights(self) -> dict[str, torch.Tensor]:
        """The exported weights of the run."""
        return load_file(self.folder.parent / "pretrained" / self.stage / "model.safetensors")


def assert_equal(one: Run, other: Run) -> None:
    """Asserts that the weights of two runs are bit-exact."""
    left, right = one.weights(), other.weights()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@dataclass
class Site:
    """A cluster with runs on separate nodes: some without faults, and one that only its time limit ends."""

    cluster: Cluster
    straight: dict[str, Run]
    limited: Run | None = None

    def run(self, name: str, kind: str, *flags: str, sbatch: str = f"--nodelist={HERE}") -> Run:
        """Makes a run of a kind: its stage and its strategy."""
        stage, _, strategy = kind.partition(" ")
        tokenizer = ["--tokenizer=pretrained/tokenizer"] if stage == "transformer" else []
        words = ["--dataset=tiny", "--recipe=small", *tokenizer, f"--cluster={strategy}", "--trainer.accelerator=cpu"]
        words += ["--nodes=2", "--devices=1", f"--sbatch={sbatch}"]
        return Run(self.cluster, maskgit_in(self.cluster.work), name, stage, [*words, *flags])


def maskgit_in(folder: Path) -> Callable[..., tuple[int, str]]:
    """Runs the command in a folder, within this process, which has imported torch already."""

    def call(*words: str) -> tuple[int, str]:
        before, ours, printed = Path.cwd(), logging.getLogger("maskgit_pl"), io.StringIO()
        handlers, ours.handlers = ours.handlers, []  # a handler holds the stream of the call that made it
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                code = main([str(word) for word in words])
        finally:
            os.chdir(before)
            ours.handlers = handlers
        return code, printed.getvalue()

    return call


def make_work_folder(work: Path) -> None:
    """Makes a checkout: recipes with a small one, environment, data and a tokenizer."""
    shutil.copytree(ROOT / "recipes", work / "recipes")
    (work / ".venv").symlink_to(sys.prefix)
    save_uneven_shards(work / "data" / "shards" / "tiny", (30, 30))
    save_tiny_pretrained(work / "pretrained")
    for stage in ("tokenizer", "transformer"):
        recipe: dict[str, Any] = yaml.safe_load((ROOT / "tests" / "tiny" / f"{stage}.yaml").read_text())
        recipe["trainer"] |= {"max_steps": SHORT, "val_check_interval": SHORT, "log_every_n_steps": EVERY}
        recipe["checkpoint_every"] = EVERY
        (work / "recipes" / stage / "small.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    work = folder / "work"
    work.mkdir()
    make_work_folder(work)
    cluster = Cluster(folder / "cluster", work)
    cluster.start(4)
    try:
        yield begin(Site(cluster, {}))
    finally:
        cluster.stop()


def begin(site: Site) -> Site:
    """Submits the long runs, which train while the tests run."""
    site.cluster.run("sinfo")
    elsewhere, more = f"--nodelist={ELSEWHERE}", f"--trainer.max_steps={LONG}"
    site.limited = site.run(
        "limited", "transformer ddp", more, "--time=1", sbatch=f"--signal=USR1@20 {elsewhere}"
    )  # fmt: skip
    site.limited.submit()
    for kind in ("tokenizer ddp", "transformer fsdp", "transformer ddp", "transformer ddp, long"):
        flags = [more] if kind.endswith("long") else []
        name = re.sub(r"\W+", "-", kind)
        run = site.straight[kind] = site.run(name, kind.removesuffix(", long"), *flags, sbatch=elsewhere)
        run.submit()
    return site


def test_preempted_jobs_end_like_undisturbed_ones(site: Site) -> None:
    cluster = site.cluster
    runs = {
        "tokenizer ddp": site.run("preempted-1", "tokenizer ddp"),
        "transformer fsdp": site.run("preempted-2", "transformer fsdp"),
    }
    for run in runs.values():
        run.submit()
    for run in runs.values():
        run.wait_beyond(0)
    other = cluster.run(f"sbatch --parsable --partition=high --exclusive --nodelist={HERE} --wrap 'sleep 2'")
    cluster.wait_for_end(other, *(run.number for run in runs.values()))
    for kind, run in runs.items():
        assert run.restarts >= 1
        assert re.search(r"saved at step \d+; requeueing the job", run.log), run.log
        assert "resuming from step-" in run.log
        cluster.wait_for_end(site.straight[kind].number)
        assert_equal(run, site.straight[kind])


def test_signals_to_a_job_and_to_a_task_in_a_container_without_slurm(site: Site) -> None:
    cluster = site.cluster
    container = """unshare --mount bash -c 'mount --bind /dev/null "$(type -P scontrol)" && exec "$@"' bash"""
    run = site.run("signalled", "transformer ddp", f"--container={container}", "--program=.venv/bin/maskgit")
    printed = run.submit()
    cluster.wait_until(lambda: cluster.job(run.number)["JobState"] == "RUNNING", "the job runs")
    typed = cluster.run(re.search(r"(?s)STAGE=.*?(?=\njob )", printed)[0])  # type: ignore[index]  # it is there
    cluster.wait_until(lambda: cluster.job(typed)["Reason"] == "Dependency", "the second job waits")
    cluster.run(f"scancel {typed}")

    cluster.wait_until(lambda: len(cluster.programs(run.number)) == 2, "both tasks begin")
    cluster.run(f"scancel --signal=USR1 {run.number}")  # before they can have imported anything
    cluster.wait_until(lambda: run.restarts == 1, "the job is requeued")
    run.wait_beyond(run.step)
    for restarts, words in enumerate(("", "--batch ", "--full "), start=2):  # the tasks, the script, both
        cluster.run(f"scancel {words}--signal=USR1 {run.number}")
        cluster.wait_until(lambda count=restarts: run.restarts == count, "back in the queue")  # type: ignore[misc]  # binds the loop variable
        run.wait_beyond(run.step)
    (task,) = cluster.tasks(run.number, "node2")
    os.kill(task, signal.SIGTERM)
    run.finish()
    assert run.restarts == 5
    assert run.log.count("requeueing the job") == 5
    cluster.wait_for_end(site.straight["transformer ddp"].number)
    assert_equal(run, site.straight["transformer ddp"])


def test_a_cancelled_job_is_not_requeued_and_its_run_resumes_by_hand(site: Site) -> None:
    cluster, run = site.cluster, site.run("cancelled", "transformer ddp")
    run.submit()
    run.wait_beyond(0)
    cluster.run(f"scancel {run.number}")
    run.finish(state="CANCELLED")
    assert run.restarts == 0
    assert re.search(r"saved at step \d+; Slurm ends the job", run.log), run.log
    run.submit()
    run.finish()
    assert "resuming from step-" in run.log
    cluster.wait_for_end(site.straight["transformer ddp"].number)
    assert_equal(run, site.straight["transformer ddp"])


def test_a_job_resumes_after_a_node_failure(site: Site) -> None:
    cluster, run = site.cluster, site.run("node-failure", "transformer ddp")
    run.submit()
    run.wait_beyond(0)
    frozen = cluster.freeze("node2", run.number)
    cluster.wait_until(lambda: run.restarts == 1, "Slurm requeues the job")
    cluster.run("sinfo --partition=low")
    for pid in frozen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cluster.start_node(2)
    run.finish()
    assert run.restarts == 1
    assert "requeueing the job" not in run.log
    assert "resuming from step-" in run.log
    cluster.wait_for_end(site.straight["transformer ddp"].number)
    assert_equal(run, site.straight["transformer ddp"])


def test_a_job_without_progress_is_stopped_after_three_restarts(site: Site) -> None:
    cluster = site.cluster
    asked = site.run("asked", "transformer ddp", "--container=sh -c 'exit 75'")
    back = site.run("put-back", "transformer ddp", "--container=sh -c 'sleep 600'")  # one that does not come up
    for run in (asked, back):
        run.submit()
    for restart in range(1, 5):
        cluster.wait_until(lambda: cluster.job(back.number)["JobState"] == "RUNNING", "a start")
        cluster.run(f"scontrol requeue {back.number}")
        cluster.wait_until(lambda count=restart: back.restarts == count, "a restart")  # type: ignore[misc]  # binds the loop variable
    for run, restarts in ((asked, 3), (back, 4)):
        run.finish(state="FAILED")
        assert cluster.job(run.number)["ExitCode"] == "70:0"
        assert run.restarts == restarts
        assert "3 restarts have brought no checkpoint beyond step 0" in run.log
    assert (asked.folder / "restarts").read_text() == f"job {asked.number}\nstart 4\nrestarts 3\nstep 0\n"


def test_jobs_with_errors_are_not_requeued(site: Site) -> None:
    cluster = site.cluster
    shutil.copytree(cluster.work / "data/shards/tiny", cluster.work / "data/shards/moved")
    data = "--data=data/shards/moved"
    bad = site.run("bad-input", "transformer ddp", data, sbatch=f"--hold --nodelist={HERE}")
    diverging = site.run("diverging", "transformer ddp", "--model.optimizer.learning_rate.peak=1e30")
    for run in (bad, diverging):
        run.submit()
    cluster.run("mv data/shards/moved data/shards/elsewhere")
    cluster.run(f"scontrol release {bad.number}")
    for run, code in ((bad, 2), (diverging, 77)):
        run.finish(state="FAILED")
        assert cluster.job(run.number)["ExitCode"] == f"{code}:0", run.log
        assert run.restarts == 0


def test_a_job_resumes_after_its_time_limit(site: Site) -> None:
    run, cluster = site.limited, site.cluster
    assert run is not None
    run.finish()
    assert run.restarts >= 1
    assert run.log.count("requeueing the job") == run.restarts
    cluster.wait_for_end(site.straight["transformer ddp, long"].number)
    assert_equal(run, site.straight["transformer ddp, long"])
