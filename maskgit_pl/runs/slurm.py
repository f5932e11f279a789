"""Submits a stage of a run to Slurm, as ``maskgit slurm submit`` does.

::

    from maskgit_pl import runs

    recipe = runs.Recipe.read("transformer", names="paper-256", cluster="fsdp")
    submission = runs.plan_submission(recipe, data="data/shards/imagenet", job=runs.JobOptions(nodes=4))
    print(submission)  # the shell command
    job_id = runs.submit(submission)

The job script is ``recipes/slurm/train.sbatch``, which can also be submitted by hand. This file imports no
torch, so that invalid options are rejected immediately.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from maskgit_pl.checks import check_integer
from maskgit_pl.processes import hide_launcher
from maskgit_pl.runs.layers import split_flags
from maskgit_pl.runs.plan import Folders, Plan, plan_run
from maskgit_pl.runs.recipe import Recipe, recipes_folders

__all__ = [
    "JobOptions",
    "Submission",
    "check_submission",
    "plan_submission",
    "submit",
]

log = logging.getLogger(__name__)

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d(:\d\d)?)?|UNLIMITED|INFINITE", re.IGNORECASE)
_NODES = "it is set by --nodes of this command, which also divides the batch"
_TASKS = "it follows --devices of this command, with one task per device"
_LIMIT = "it is set by --time of this command"
_REFUSED = {  # options of sbatch that the job sets itself -> the reason
    "--nodes": _NODES, "-N": _NODES, "--ntasks": _TASKS, "-n": _TASKS, "--ntasks-per-node": _TASKS,
    "--time": _LIMIT, "-t": _LIMIT,
    "--array": "several jobs would train the same run", "-a": "several jobs would train the same run",
    "--chdir": "paths are relative to the current folder", "-D": "paths are relative to the current folder",
    "--comment": "it identifies the job of a run in the queue",
    "--export": "the script needs all variables of the submission",
    "--wrap": "the job runs a script of its own",
}  # fmt: skip

_SIGNALS = ("USR1", "USR2", "TERM", "INT", "10", "12", "15", "2")  # those that script and training catch
_SET_BY_JOB = {"trainer.num_nodes": "--nodes", "trainer.devices": "--devices"}
_VARIABLES = (  # of the environment, which the script reads
    "STAGE", "RUN", "RUNS", "DATASET", "DATA", "RECIPE", "CLUSTER", "TOKENIZER", "PRETRAINED", "CONTAINER", "SRUN",
    "MASKGIT",
)  # fmt: skip
_PROGRAM = Path(".venv/bin/maskgit")  # the script's own default


@dataclass(frozen=True)
class JobOptions:
    """The nodes, devices and limits of a job, and how its tasks are started.

    Args:
        nodes: Number of nodes, >= 1.
        devices: Number of devices, and of tasks, per node, >= 1.
        cpus: CPU cores per task, >= 1; None means one plus one per data worker.
        time: Time limit of each start in Slurm's format: ``90`` (minutes), ``24:00:00``, ``7-0``.
        partition: Partition; None means the cluster's default.
        account: Account to charge, if any.
        qos: Quality of service, if any.
        constraint: Required features of the nodes, if any.
        sbatch: Additional ``sbatch`` options, in shell syntax.
        srun: Additional ``srun`` options, in shell syntax.
        container: Command that starts each task, in shell syntax, such as ``apptainer exec --nv image.sif``.
        program: ``maskgit`` on the nodes; None means this one, or with a container the one on its PATH.

    Raises:
        ValueError: if a number is out of range, ``time`` is not a time, a string is not valid shell syntax,
            or ``sbatch`` or ``srun`` has an option that the job sets itself.
    """

    nodes: int = 1
    devices: int = 8
    cpus: int | None = None
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: str = ""
    srun: str = ""
    container: str = ""
    program: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "devices", "cpus"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), "[1, inf)")
        if not _TIME.fullmatch(self.time):
            raise ValueError(f"time must be a Slurm time such as 90 (minutes), 24:00:00 or 7-0, got {self.time!r}")
        for name in ("container", "srun"):
            if any("\n" in word for word in _split(name, getattr(self, name))):  # xargs in the job refuses it
                raise ValueError(f"{name} must have no line break within a word, got {getattr(self, name)!r}")
        for name in ("sbatch", "srun"):
            for flag, _ in _flags(_split(name, getattr(self, name))):
                reason = _REFUSED.get(flag)
                if reason is not None and (name == "sbatch" or reason in (_NODES, _TASKS)):
                    raise ValueError(f"{name} must not have {flag}: {reason}; leave it out of --{name}")
        self._check_signal()

    def _check_signal(self) -> None:
        """Checks that training catches the signal before the time limit; otherwise nothing would be saved."""
        for value in (value for flag, value in _flags(self.sbatch_words) if flag == "--signal"):
            number = value.partition("@")[0].rpartition(":")[2].upper().removeprefix("SIG")
            if number not in _SIGNALS:
                raise ValueError(
                    f"sbatch must have a --signal at which training saves, got {value!r}; use USR1@SECONDS"
                )

    @property
    def sbatch_words(self) -> list[str]:
        """The options in ``sbatch`` as a list of words."""
        return _split("sbatch", self.sbatch)

    @property
    def names_gpus(self) -> bool:
        """A bool: ``sbatch`` already requests GPUs.

        A second request must not be added: sbatch passes both to srun, and a count of 0 in one of them leaves
        the tasks without GPUs.
        """
        return any(
            flag == "-G" or flag.startswith("--gpus") or (flag == "--gres" and ("gpu" in value or value == "none"))
            for flag, value in _flags(self.sbatch_words)
        )


@dataclass(frozen=True)
class Submission:
    """An ``sbatch`` command. Made by ``plan_submission``.

    Attributes:
        plan: Plan of the run.
        job: Options of the job.
        options: Options of ``sbatch``.
        words: Arguments of the script: flags of ``maskgit train``.
        variables: Environment variables that the script reads.
    """

    plan: Plan
    job: JobOptions
    options: tuple[str, ...]
    words: tuple[str, ...]
    variables: Mapping[str, str]

    @property
    def command(self) -> list[str]:
        """The ``sbatch`` command as a list of words."""
        script = next(file for folder in recipes_folders() if (file := folder / "slurm" / "train.sbatch").is_file())
        return ["sbatch", *self.options, str(script), *self.words]

    def log_file(self, number: str) -> str:
        """Returns the log file of the job with this ID; of the patterns in ``--output``, only ``%j`` is replaced."""
        named = [value for flag, value in _flags(self.job.sbatch_words) if flag in ("--output", "-o")]
        return named[-1].replace("%j", number) if named else str(self.plan.stage_folder / f"slurm-{number}.log")

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " \\\n    ".join([*variables, *map(shlex.quote, self.command)])


def plan_submission(recipe: Recipe, *, job: JobOptions | None = None, **folders: Unpack[Folders]) -> Submission:
    """Plans a job that trains a stage of a run. Submits nothing, and works without Slurm.

    Args:
        recipe: Values of the run, and the stage.
        job: Options of the job. Default: 1 node with 8 devices.
        folders: See ``Folders``.

    Raises:
        ValueError: if a flag of the recipe sets nodes or devices, or its number of workers or threads is out of range.
        FileNotFoundError: if data, tokenizer or pretrained folder do not exist.
    """
    job = job or JobOptions()
    for key, _ in split_flags(recipe.words):
        if key in _SET_BY_JOB:
            raise ValueError(f"flag --{key} must be left out, since the job sets it; use {_SET_BY_JOB[key]} instead")
    plan = plan_run(recipe, **folders)
    folder = str(plan.stage_folder).replace("%", "%%")  # sbatch replaces patterns
    # singleton: a second job of the same name waits for the first one.
    options = (
        "--parsable", "--export=ALL", f"--job-name={plan.folder.name}-{plan.stage}", f"--comment={_job_comment(plan)}",
        "--dependency=singleton", f"--output={folder}/slurm-%j.log", f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.devices}", *_resources(plan, job), *job.sbatch_words,
    )  # fmt: skip
    repeated = [] if recipe.config is None else [f"--config={recipe.config}"]
    # A task without a GPU must fail; with `auto` it would train on the CPU for days.
    gpu = ["--trainer.accelerator=gpu"] if recipe.get("trainer.accelerator") in (None, "auto") else []
    variables = _variables(plan, job, folders)
    return Submission(plan, job, options, (*repeated, *recipe.words, *gpu), variables)


def check_submission(submission: Submission) -> str:
    """Builds the run as each task will, on the CPU of this machine, and returns a summary.

    Raises:
        ValueError: if training would reject the run.
        FileNotFoundError: if a file or folder that the run reads is missing.
    """
    plan, job = submission.plan, submission.job
    log.info("%s: checking the run as training will, which takes some seconds ...", plan.stage_folder)
    from maskgit_pl.runs import build, fitting  # lightning and torch take seconds to import

    here = ["--trainer.accelerator=cpu", f"--trainer.num_nodes={job.nodes}", f"--trainer.devices={job.devices}"]
    with hide_launcher(), build.restore_process_state():
        run = build.build(replace(plan, recipe=plan.recipe.with_overrides(here)))
    data, steps = run.datamodule, run.trainer.max_steps
    if data.config.source != "stream":
        data.setup()
    start = fitting.describe_start(plan.stage_folder, steps)
    return f"{start}; {job.nodes * job.devices} ranks share a global batch of {data.config.global_batch}; {steps} steps"


def submit(submission: Submission) -> str:
    """Checks a job with ``check_submission`` and submits it.

    Returns:
        The job ID.

    Raises:
        FileNotFoundError: if Slurm is not installed, or a file that training needs is missing.
        ValueError: if training would reject the run, a job of the run is already in the queue, or ``sbatch``
            rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise FileNotFoundError(
            "sbatch must be on PATH to submit a job; run this on a login node of the cluster, or use --dry-run to see "
            "the command"
        )
    _refuse_second_job(submission.plan)
    log.info("%s", check_submission(submission))
    log.info("%s", submission)
    submission.plan.stage_folder.mkdir(parents=True, exist_ok=True)  # for the log file: Slurm creates no folders
    # The script reads these variables, so those of the user's shell must not reach it.
    others = {name: value for name, value in _environment_outside_job().items() if name not in _VARIABLES}
    done = subprocess.run(
        submission.command, env={**others, **submission.variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"sbatch rejects the job: {' '.join(done.stderr.split())}; see the command above")
    if done.stderr.strip():
        log.warning("%s", done.stderr.strip())
    return done.stdout.strip().partition(";")[0]  # JOB_ID;CLUSTER on federated clusters


def _split(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name} must be valid shell syntax, got {text!r} ({error}); close the quotes") from error


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields each option with its value; ``-N2`` gives ``-N`` and ``2``."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            yield flag, value if equals else following
        elif word.startswith("-"):
            yield word[:2], word[2:] or following


def _job_comment(plan: Plan) -> str:
    """Returns the comment that identifies a job of this stage of this run in the queue."""
    return f"maskgit {plan.stage_folder.resolve()}"


def _resources(plan: Plan, job: JobOptions) -> list[str]:
    recipe = plan.recipe
    # One core for the task and one per data worker, but at least the threads of torch.
    cpus = job.cpus or max(1 + (recipe.get("data.num_workers") or 0), recipe.get("cpu_threads") or 1)
    is_on_cpu = recipe.get("trainer.accelerator") == "cpu"
    options = [] if is_on_cpu or job.names_gpus else [f"--gpus-per-node={job.devices}"]
    named = ("partition", "account", "qos", "constraint")
    named_options = [f"--{name}={value}" for name in named if (value := getattr(job, name))]
    return [*options, f"--cpus-per-task={cpus}", f"--time={job.time}", *named_options]


def _variables(plan: Plan, job: JobOptions, folders: Folders) -> dict[str, str]:
    """Returns the variables that the script reads, without those that have their default value."""
    program = job.program or ("maskgit" if job.container else str(_this_program()))
    values = {
        "STAGE": plan.stage,
        "RUN": plan.folder.name,
        "RUNS": "" if plan.folder.parent == Path("runs") else str(plan.folder.parent),
        "DATASET": plan.recipe.dataset,
        "DATA": str(folders.get("data") or ""),
        "RECIPE": " ".join(plan.recipe.names),
        "CLUSTER": plan.recipe.cluster,
        "TOKENIZER": str(plan.tokenizer or ""),
        "PRETRAINED": str(folders.get("pretrained") or ""),
        # With quotes that the script, which uses xargs, reads as a shell does.
        "CONTAINER": shlex.join(_split("container", job.container)),
        "SRUN": shlex.join(_split("srun", job.srun)),
        "MASKGIT": "" if program == str(_PROGRAM) else program,
    }
    return {name: value for name, value in values.items() if value}


def _this_program() -> Path:
    here = Path(sys.executable).parent / "maskgit"
    return _PROGRAM if _PROGRAM.exists() and _PROGRAM.samefile(here) else here


def _environment_outside_job() -> dict[str, str]:
    """Returns the environment of this process without the variables of a surrounding Slurm job."""
    if "SLURM_JOB_ID" not in os.environ:
        return {**os.environ}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}


def _refuse_second_job(plan: Plan) -> None:
    """Rejects a second job of the same run, since both would write the same folder.

    Raises:
        ValueError: if the queue has a job of this run, or cannot be read.
    """
    command = ["squeue", "--all", "--noheader", "--format=%i|%T|%k"]  # all: also those of hidden partitions
    # Variables such as SQUEUE_STATES leave jobs out.
    chosen = _environment_outside_job().items()
    plain = {name: value for name, value in chosen if not name.startswith("SQUEUE_") or name == "SQUEUE_CLUSTERS"}
    listed = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if listed.returncode:
        reason = " ".join(listed.stderr.split())
        raise ValueError(f"squeue cannot read the queue: {reason}; submit on a machine where Slurm responds")
    # The comment comes last, since it may contain the separator.
    jobs = [line.split("|", 2) for line in listed.stdout.splitlines() if line.count("|") >= 2]
    for number, state, comment in jobs:
        if comment == _job_comment(plan):
            raise ValueError(
                f"run {plan.stage_folder}: only one job at a time may train it, and job {number} is {state}; wait for "
                f"it, end it with `scancel {number}`, or name another run with --run"
            )
