"""``maskgit slurm submit`` without a cluster; tests/runs/test_slurm.py has its options, tests/slurm a cluster."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Answer
from tests.conftest import tiny_flags


@pytest.fixture
def submit(
    monkeypatch: pytest.MonkeyPatch, maskgit: Callable[..., Answer], runs: Path, tiny_shards: Path,
    tiny_pretrained: Path,
) -> Callable[..., list[str]]:  # fmt: skip
    """Plans a tiny run on 2 nodes with a device each; returns variables, sbatch and its options, script and words."""
    monkeypatch.setenv("PATH", "")  # no Slurm

    def call(stage: str, *more: str, with_sizes: bool = True) -> list[str]:
        tokenizer = [f"--tokenizer={tiny_pretrained / 'tokenizer'}"] if stage == "transformer" else []
        where = [f"--data={tiny_shards}", f"--runs-folder={runs}", "--run=one", "--nodes=2", "--devices=1"]
        sizes = tiny_flags(stage) if with_sizes else []
        answer = maskgit("slurm", "submit", stage, *where, *tokenizer, *sizes, "--dry-run", *more)
        assert answer.code == 0, answer
        printed = answer.out[answer.out.index("STAGE=") : answer.out.index("dry run:")]
        return shlex.split(printed.replace("\\\n", ""))

    return call


@pytest.mark.parametrize(("stage", "cluster"), [("tokenizer", "ddp"), ("transformer", "fsdp")])
def test_a_dry_run_prints_the_job_and_writes_nothing(submit, runs, stage, cluster):
    words = submit(
        stage, f"--cluster={cluster}", "--partition=gpu", "--sbatch=--mem=0 --exclusive", "--srun=--cpu-bind=cores",
        "--container=apptainer exec --nv 'my image.sif'",
    )  # fmt: skip
    script = words.index("recipes/slurm/train.sbatch")
    assert {
        f"STAGE={stage}", f"CLUSTER={cluster}", "RUN=one", f"RUNS={runs}", "SRUN=--cpu-bind=cores",
        "CONTAINER=apptainer exec --nv 'my image.sif'", "MASKGIT=maskgit",
    } <= set(words[:script])  # fmt: skip
    options = words[words.index("sbatch") + 1 : script]
    assert {"--nodes=2", "--ntasks-per-node=1", "--partition=gpu", "--cpus-per-task=1"} <= set(options)
    assert options[-2:] == ["--mem=0", "--exclusive"]  # the user's words come last
    assert not any(option.startswith("--gpus") for option in options)  # the tiny recipes use a CPU
    assert "--trainer.max_steps=1" in words[script:]
    assert not runs.exists()


def test_devices_are_gpus_unless_the_recipe_names_an_accelerator(submit):
    words = submit("tokenizer", "--trainer.accelerator=auto", "--devices=2", "--data.num_workers=3")
    assert {"--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=4"} <= set(words)
    assert words[-1] == "--trainer.accelerator=gpu"  # a task that sees no GPU ends
    assert submit("tokenizer", with_sizes=False)[-1] == "--trainer.accelerator=gpu"
    assert "--trainer.accelerator=gpu" not in submit("tokenizer")  # its recipe says cpu


@pytest.mark.slow
def test_gpus_are_requested_in_one_way(submit):
    gpu = "--trainer.accelerator=gpu"
    for words in ("--gres=gpu:a100:8", "--mem=0 --gres gpu:8", "-G 16", "-G16", "--gpus=16", "--gpus-per-task=1"):
        command = submit("tokenizer", gpu, f"--sbatch={words}")
        assert not any(word.startswith("--gpus-per-node") for word in command)
        assert shlex.split(words)[-1] in command
    assert "--gpus-per-node=1" in submit("tokenizer", gpu, "--sbatch=--gres=lscratch:100")
