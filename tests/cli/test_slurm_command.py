"""``maskgit slurm submit`` as far as it goes without a cluster; tests/slurm has the rest."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.commands import Answer, refused
from tests.conftest import tiny_flags


@pytest.fixture
def submit(
    monkeypatch: pytest.MonkeyPatch, maskgit: Callable[..., Answer], tmp_path: Path, tiny_shards: Path,
    tiny_pretrained: Path,
) -> Callable[..., Answer]:  # fmt: skip
    """Submits a stage of a tiny run on 2 nodes with a device each; words that are given later count."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # no Slurm

    def call(stage: str, *more: str) -> Answer:
        tokenizer = [f"--tokenizer={tiny_pretrained / 'tokenizer'}"] if stage == "transformer" else []
        where = [f"--data={tiny_shards}", f"--runs-folder={tmp_path / 'runs'}", "--run=one", "--nodes=2", "--devices=1"]
        return maskgit("slurm", "submit", stage, *where, *tokenizer, *tiny_flags(stage), *more)

    return call


def command_of(answer: Answer) -> list[str]:
    """Returns the words that were printed: variables, sbatch and its options, the script and its words."""
    printed = answer.out[answer.out.index("STAGE=") : answer.out.index("dry run:")]
    return shlex.split(printed.replace("\\\n", ""))


@pytest.mark.parametrize(("stage", "cluster"), [("tokenizer", "ddp"), ("transformer", "fsdp")])
def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(submit, tmp_path, stage, cluster):
    answer = submit(
        stage, f"--cluster={cluster}", "--partition=gpu", "--sbatch=--mem=0 --exclusive", "--srun=--cpu-bind=cores",
        "--container=apptainer exec --nv 'my image.sif'", "--dry-run",
    )  # fmt: skip
    assert answer.code == 0, answer
    words = command_of(answer)
    script = words.index("recipes/slurm/train.sbatch")
    assert {
        f"STAGE={stage}", f"CLUSTER={cluster}", "RUN=one", f"RUNS={tmp_path / 'runs'}", "SRUN=--cpu-bind=cores",
        "CONTAINER=apptainer exec --nv 'my image.sif'", "MASKGIT=maskgit",
    } <= set(words[:script])  # fmt: skip
    options = words[words.index("sbatch") + 1 : script]
    assert {"--nodes=2", "--ntasks-per-node=1", "--partition=gpu", "--cpus-per-task=1"} <= set(options)
    assert options[-2:] == ["--mem=0", "--exclusive"]  # the user's words come last
    assert not any(option.startswith("--gpus") for option in options)  # the tiny recipes use a CPU
    assert "--trainer.max_steps=1" in words[script:]
    assert not (tmp_path / "runs").exists()


def test_devices_are_gpus_unless_the_recipe_says_otherwise_and_loaders_get_cores(submit):
    answer = submit("tokenizer", "--trainer.accelerator=auto", "--devices=2", "--data.num_workers=3", "--dry-run")
    assert {"--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=4"} <= set(command_of(answer))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["--gres=gpu:a100:8", "--mem=0 --gres gpu:8", "-G 16", "-G16", "--gpus=16", "--gpus-per-task=1"]
)
def test_gpus_are_asked_for_in_one_way(submit, words):
    command = command_of(submit("tokenizer", "--trainer.accelerator=gpu", f"--sbatch={words}", "--dry-run"))
    assert not any(word.startswith("--gpus-per-node") for word in command)
    assert shlex.split(words)[-1] in command
    other = submit("tokenizer", "--trainer.accelerator=gpu", "--sbatch=--gres=lscratch:100", "--dry-run")
    assert "--gpus-per-node=1" in command_of(other)


def test_a_task_that_sees_no_gpu_ends_unless_the_accelerator_is_named(submit, maskgit, tiny_shards, tmp_path):
    ask = ["tokenizer", "--data", str(tiny_shards), "--runs-folder", str(tmp_path / "runs"), "--run=one"]
    words = command_of(maskgit("slurm", "submit", *ask, "--nodes=1", "--devices=1", "--dry-run"))
    given = words[words.index("recipes/slurm/train.sbatch") + 1 :]
    assert given == ["--trainer.accelerator=gpu"]
    if not torch.cuda.is_available():
        refused(maskgit("train", *ask, *given), "trainer: accelerator 'gpu'")
    assert "--trainer.accelerator=gpu" not in command_of(submit("tokenizer", "--dry-run"))  # its recipe says cpu
    assert command_of(submit("tokenizer", "--trainer.accelerator=auto", "--dry-run"))[-1] == "--trainer.accelerator=gpu"


@pytest.mark.parametrize(
    ("stage", "words", "parts"),
    [
        ("tokenizer", [], ("sbatch", "--dry-run")),  # there is no Slurm
        ("tokenizer", ["--dry-run", "--cluster=fsdp"], ("trainer.strategy must", "got 'fsdp'", "--cluster ddp")),
        ("tokenizer", ["--dry-run", "--nodes=3"], ("data.global_batch", "3 ranks", "got 4")),
        ("tokenizer", ["--dry-run", "--cpus=0"], ("--cpus must be an integer in",)),
        ("tokenizer", ["--dry-run", "--trainer.num_nodes=4"], ("--trainer.num_nodes", "--nodes")),
        ("tokenizer", ["--dry-run", "--data=nowhere"], ("data nowhere", "--data")),
        (
            "tokenizer",
            ["--dry-run", "--trainer.accelerator=gpus"],
            ("trainer.accelerator must be", "'gpu'"),
        ),
        ("tokenizer", ["--dry-run", "--data.num_workers=-1"], ("data.num_workers must be", "[0, 1024]", "got -1")),
        ("tokenizer", ["--dry-run", "--sbatch='--mem"], ("sbatch must be", "quotes")),
        ("tokenizer", ["--dry-run", "--sbatch=-N4"], ("sbatch must not have -N", "set by --nodes")),
        ("tokenizer", ["--dry-run", "--sbatch=--ntasks 8"], ("sbatch must not have --ntasks", "follows --devices")),
        ("tokenizer", ["--dry-run", "--sbatch=-D elsewhere"], ("sbatch must not have -D", "current folder")),
        ("tokenizer", ["--dry-run", "--sbatch=--array=1-4"], ("sbatch must not have --array", "the same run")),
        ("tokenizer", ["--dry-run", "--time=tomorrow"], ("time must be", "24:00:00", "got 'tomorrow'")),
        ("transformer", ["--dry-run", "--data.source=tokens"], ("token store", "maskgit tokenize")),
        ("transformer", ["--dry-run", "--model.mask_schedule=cosin"], ("cosin", "cosine")),
    ],
)
def test_what_training_would_refuse_is_refused_before_it_waits_in_a_queue(submit, tmp_path, stage, words, parts):
    refused(submit(stage, *words), *parts)
    assert not (tmp_path / "runs").exists()
