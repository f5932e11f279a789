"""A real Slurm cluster for tests, and runs that are submitted to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from maskgit_pl.training.checkpoints import newest_checkpoint, step_of

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
        code, printed = self.ask(*more)
        assert code == 0, printed
        found = re.search(r"^job (\d+): ", printed, re.MULTILINE)
        self.number = found.group(1) if found else ""
        return printed

    def ask(self, *more: str) -> tuple[int, str]:
        """Runs ``maskgit slurm``, and returns its exit code and output."""
        words = [*self.words, *more]
        return self._call(*words)

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
