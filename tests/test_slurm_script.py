"""The Slurm script, run with an ``srun`` and a ``scontrol`` that only say what they were told."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JOB = {
    "SLURM_JOB_ID": "123456789", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "6",
}  # fmt: skip


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    for name, line in (
        ("scontrol", "printf 'node-a\\nnode-b\\n'"),
        ("srun", 'printf "%s\\n" "$MASTER_ADDR" "$MASTER_PORT" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submit(tools: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", **variables}
    script = ["bash", "recipes/slurm/train.sbatch", *words]
    return subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_nodes_and_devices_come_from_slurm_and_flags_last(tools):
    variables = {"STAGE": "transformer", "RECIPE": "paper-256 log", "CLUSTER": "fsdp", "DATA": "/shards"}
    done = submit(tools, "--trainer.max_steps", "10", **variables, **JOB)
    assert done.returncode == 0, done.stderr
    address, port, *words = done.stdout.splitlines()
    assert address == "node-a"
    assert 1024 < int(port) < 32768  # below the ports that the system hands out
    command = words[words.index(".venv/bin/maskgit") :]
    assert command == [
        ".venv/bin/maskgit", "train", "transformer", "--dataset", "fashion-mnist", "--data", "/shards",
        "--recipe", "paper-256 log", "--cluster", "fsdp", "--trainer.num_nodes", "2", "--trainer.devices", "8",
        "--trainer.max_steps", "10",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "hint"),
    [("STAGE", "STAGE=tokenizer"), ("SLURM_JOB_NODELIST", "sbatch"), ("SLURM_NTASKS_PER_NODE", "--ntasks-per-node")],
)
def test_what_is_missing_is_named(tools, missing, hint):
    done = submit(tools, **{name: value for name, value in {"STAGE": "tokenizer", **JOB}.items() if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr
    assert hint in done.stderr
    assert done.stdout == ""
