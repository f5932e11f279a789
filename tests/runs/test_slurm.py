"""Jobs and their script, with fake commands of Slurm; tests/slurm has the real ones."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from maskgit_pl import runs
from maskgit_pl.runs.slurm import JobOptions
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
    """Puts a fake sbatch on PATH. Returns the folder with its recorded input."""
    folder = tmp_path / "bin"
    folder.mkdir()
    text = f'printf "%s\\n" "$@" >{folder}/words; env >{folder}/environment; echo "4711;cluster"'
    (folder / "sbatch").write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_job_gets_its_own_variables_and_none_of_a_surrounding_job(plan, slurm, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "64", "SLURM_CONF": "/here", "TOKENIZER": "other"}.items():
        monkeypatch.setenv(name, value)
    submission = plan()
    assert runs.submit(submission) == "4711"
    assert (slurm / "words").read_text().splitlines() == submission.command[1:]
    environment = dict(line.partition("=")[::2] for line in (slurm / "environment").read_text().splitlines())
    assert {"SLURM_CONF": "/here", **submission.variables}.items() <= environment.items()
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS"} & set(environment)
    assert environment["TOKENIZER"] == ""
    assert submission.plan.stage_folder.is_dir()  # for the log
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


def test_a_percent_sign_in_the_folder_of_the_log_is_no_pattern(tiny_shards, tmp_path):
    submission = runs.plan_submission(runs.Recipe.read("tokenizer"), run=tmp_path / "100%j" / "one", data=tiny_shards)
    assert f"--output={tmp_path}/100%%j/one/tokenizer/slurm-%j.log" in submission.options


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"sbatch": "'"}, {"srun": "'"}, {"container": "'"}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must "):
        JobOptions(**wrong)


def test_devices_are_gpus_unless_the_recipe_names_an_accelerator(plan):
    job = plan("--trainer.accelerator=auto", "--data.num_workers=3", devices=2)
    assert {"--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=4"} <= {*job.options}
    assert job.words[-1] == "--trainer.accelerator=gpu"  # a task that sees no GPU ends
    assert "--trainer.accelerator=gpu" not in plan().words  # its recipe says cpu
    assert "--cpus-per-task=6" in plan("--data.num_workers=3", "--cpu_threads=6").options


def test_gpus_are_requested_in_one_way(plan):
    gpu = "--trainer.accelerator=gpu"
    for words in ("--gres=gpu:a100:8", "--mem=0 --gres gpu:8", "-G 16", "-G16", "--gpus=16", "--gpus-per-task=1"):
        options = plan(gpu, sbatch=words).options
        assert not any(option.startswith("--gpus-per-node") for option in options)
        assert options[-1] == shlex.split(words)[-1]
    assert "--gpus-per-node=1" in plan(gpu, sbatch="--gres=lscratch:100").options


def test_a_job_gets_the_names_of_its_recipe_or_the_run_that_it_repeats(tmp_path, tiny_shards):
    where = {"run": tmp_path / "runs" / "one", "data": tiny_shards}
    named = runs.Recipe.read("tokenizer", names="paper-256 log", cluster="ddp")
    submission = runs.plan_submission(named, **where)
    assert submission.variables["RECIPE"] == "paper-256 log"
    assert submission.words == ("--trainer.accelerator=gpu",)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(named.tree))
    repeated = runs.plan_submission(runs.Recipe.from_run("tokenizer", config), **where)
    assert repeated.words[0] == f"--config={config}"
    assert not any(f"{name}=" in str(repeated) for name in ("RECIPE", "CLUSTER"))


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
def test_a_stop_signal_to_the_script_saves_and_requeues(start, tmp_path, name):
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
def test_the_script_names_a_missing_variable(tmp_path, name, value, hint):
    given = {**JOB, "STAGE": "tokenizer", "PATH": os.environ["PATH"], name: value}
    environment = {key: text for key, text in given.items() if text is not None}
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert name in done.stderr
    assert hint in done.stderr
    assert not list(tmp_path.iterdir())
