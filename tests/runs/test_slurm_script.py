"""The job script with fake ``srun``, ``scontrol`` and ``scancel``; tests/slurm has the real ones."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm" / "train.sbatch"
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
COMMANDS = {
    # A task that saves when it is asked to.
    "srun": "printf '%s\\n' \"$@\" >words; echo >started; until [ -e asked ]; do sleep 0.05; done; exit 75",
    "scancel": 'echo "$*" >>asked',
    "scontrol": 'case $1 in show) echo node1 ;; requeue) echo "$2" >>requeued ;; esac',
}


@pytest.fixture
def start(tmp_path):
    """Starts the script in a folder of its own, with fake commands of Slurm."""
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    started = []

    def call(**variables: str) -> subprocess.Popen[str]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, **JOB, "STAGE": "tokenizer", **variables}
        started.append(subprocess.Popen(["bash", SCRIPT], cwd=tmp_path, env=environment, text=True))
        return started[-1]

    yield call
    (tmp_path / "asked").touch()  # ends a task that still waits
    for process in started:
        process.wait(timeout=30)


def wait_for(file: Path) -> None:
    until = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < until, f"{file} must exist by now"
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_a_stop_signal_to_the_script_alone_saves_and_requeues(start, tmp_path, name):
    process = start()
    wait_for(tmp_path / "started")
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "asked").read_text() == "--signal=USR1 7.0\n"
    assert (tmp_path / "requeued").read_text() == "7\n"


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("STAGE", None, "STAGE=tokenizer"),
        ("STAGE", "tokeniser", "tokenizer or transformer"),
        ("SLURM_JOB_NODELIST", None, "sbatch"),
        ("SLURM_NTASKS_PER_NODE", None, "--ntasks-per-node"),
    ],
)
def test_the_script_names_what_is_missing(tmp_path, name, value, hint):
    given = {**JOB, "STAGE": "tokenizer", "PATH": os.environ["PATH"], name: value}
    environment = {key: text for key, text in given.items() if text is not None}
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert name in done.stderr
    assert hint in done.stderr
    assert not list(tmp_path.iterdir())
