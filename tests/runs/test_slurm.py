"""Jobs planned and submitted from Python, to fake ``sbatch`` and ``squeue`` scripts; tests/slurm uses real ones."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from maskgit_pl import runs
from maskgit_pl.runs.slurm import JobOptions, check_submission
from tests.conftest import tiny_flags

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm" / "train.sbatch"


@pytest.fixture
def plan(tmp_path, tiny_shards):
    """Plans a job of a tiny run of stage 1."""

    def call(*overrides: str, **job) -> runs.Submission:
        recipe = runs.Recipe.read("tokenizer", cluster="ddp", overrides=[*tiny_flags("tokenizer"), *overrides])
        options = JobOptions(**{"nodes": 2, "devices": 1, **job})
        return runs.plan_submission(recipe, run=tmp_path / "runs" / "one", data=tiny_shards, job=options)

    return call


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Puts fake sbatch and squeue on PATH. Returns the folder with their recorded input and their answers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "queue").touch()
    scripts = {
        "sbatch": f'printf "%s\\n" "$@" >{folder}/words; env >{folder}/environment; echo "4711;cluster"',
        "squeue": f"cat {folder}/queue",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_plan_is_words_and_variables_and_writes_nothing(plan, tmp_path):
    submission = plan(partition="gpu", sbatch="--mem=0")
    assert {"--nodes=2", "--ntasks-per-node=1", "--partition=gpu", "--mem=0"} <= set(submission.options)
    assert submission.variables["STAGE"] == "tokenizer"
    assert submission.variables["CLUSTER"] == "ddp"
    assert "RECIPE" not in submission.variables
    typed = shlex.split(str(submission).replace("\\\n", ""))
    assert typed[len(submission.variables) :] == submission.command
    assert "2 ranks share a global batch of 4" in check_submission(submission)
    assert not (tmp_path / "runs").exists()


def test_names_of_a_recipe_and_a_run_that_is_repeated_are_handed_on(tmp_path, tiny_shards, monkeypatch):
    where = {"run": tmp_path / "runs" / "one", "data": tiny_shards}
    named = runs.Recipe.read("tokenizer", names="paper-256 log", cluster="ddp")
    assert runs.plan_submission(named, **where).variables["RECIPE"] == "paper-256 log"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(named.tree))
    repeated = runs.plan_submission(runs.Recipe.from_run("tokenizer", config), **where)
    assert repeated.words[0] == f"--config={config}"
    assert not {"RECIPE", "CLUSTER"} & set(repeated.variables)


def test_a_job_gets_what_was_planned_and_nothing_of_a_job_around(plan, slurm, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "64", "SLURM_CONF": "/here", "TOKENIZER": "other"}.items():
        monkeypatch.setenv(name, value)
    submission = plan()
    assert runs.submit(submission) == "4711"
    assert (slurm / "words").read_text().splitlines() == submission.command[1:]
    environment = dict(line.partition("=")[::2] for line in (slurm / "environment").read_text().splitlines())
    assert {"SLURM_CONF": "/here", **submission.variables}.items() <= environment.items()
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "TOKENIZER"} & set(environment)
    assert Path(submission.log_file("4711")).parent.is_dir()
    assert os.environ["SLURM_NTASKS"] == "64"


@pytest.mark.parametrize("name", ["srun", "container"])
@pytest.mark.parametrize(
    "text",
    [
        r'--a="x\"y" --b', r"--a=it\'s", r'--a="back\\slash"', "--a='two  words' -b ''",
        """--a='module load cuda && exec "$@"' --b""", "--a=ü --b=$HOME",
    ],
)  # fmt: skip
def test_the_script_finds_the_words_that_were_checked(plan, name, text):
    (split,) = re.findall(r"^split\(\) \{\n.*?^\}\n", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    value = plan(**{name: text}).variables[name.upper()]
    script = f'{split}\nfound=()\nsplit found "$1"\nprintf "%s\\n" "${{found[@]}}"'
    done = subprocess.run(["bash", "-euc", script, "bash", value], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == shlex.split(text)


def test_a_second_job_of_a_run_is_refused_whatever_the_user_usually_looks_at(plan, slurm, monkeypatch):
    submission = plan()
    comment = next(option for option in submission.options if option.startswith("--comment="))
    (slurm / "queue").write_text(f"12|PENDING|{comment.removeprefix('--comment=')}\n13|RUNNING|other\n")
    # As Slurm does: variables choose jobs, and those of hidden partitions are not listed without --all.
    text = f'[[ -z ${{SQUEUE_STATES:-}} && -z ${{SQUEUE_PARTITION:-}} && " $* " == *" --all "* ]] && cat {slurm}/queue'
    (slurm / "squeue").write_text(f"#!/usr/bin/env bash\n{text}\nexit 0\n")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")
    with pytest.raises(ValueError, match=r"one job at a time may train it, and job 12 is PENDING"):
        runs.submit(submission)
    assert not (slurm / "words").exists()


@pytest.mark.parametrize(
    ("time", "signal", "fits"),
    [
        ("2", "", False),
        ("2:30", "", True),  # Slurm rounds it up to 3 minutes
        ("0-0:02", "", False),
        ("0", "", True),  # no limit
        ("UNLIMITED", "", True),
        ("1", "--signal=B:USR1@20", True),
        ("1", "--signal RB:15@20", True),
        ("10", "--signal USR1@600", False),
    ],
)
def test_a_job_must_last_longer_than_it_takes_to_stop(time, signal, fits):
    if fits:
        assert JobOptions(time=time, sbatch=signal).time == time
        return
    with pytest.raises(ValueError, match=r"^time must be longer than the (120|600) s before its end"):
        JobOptions(time=time, sbatch=signal)


def test_the_folder_of_a_run_is_no_pattern_of_the_log(tiny_shards, tmp_path):
    recipe = runs.Recipe.read("tokenizer")
    submission = runs.plan_submission(recipe, run=tmp_path / "100%j" / "one", data=tiny_shards)
    assert f"--output={tmp_path}/100%%j/one/tokenizer/slurm-%j.log" in submission.options
    assert submission.log_file("7") == f"{tmp_path}/100%j/one/tokenizer/slurm-7.log"


@pytest.mark.parametrize("option", ["--output=logs/%j.txt", "--output logs/%j.txt", "-o logs/%j.txt", "-ologs/%j.txt"])
def test_the_log_is_where_the_last_option_says(option, tiny_shards, tmp_path):
    job = JobOptions(sbatch=f"--output=elsewhere {option}")
    submission = runs.plan_submission(runs.Recipe.read("tokenizer"), run=tmp_path / "one", data=tiny_shards, job=job)
    assert submission.log_file("7") == "logs/7.txt"


@pytest.mark.parametrize(
    "wrong",
    [
        {"nodes": 0},
        {"time": "soon"},
        {"srun": "'"},
        {"sbatch": "-N 2"},
        {"srun": "--ntasks=4"},
        {"sbatch": "--time=1"},
        {"sbatch": "--signal=HUP@120"},
        {"container": "'"},
    ],
)
def test_options_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must "):
        JobOptions(**wrong)
