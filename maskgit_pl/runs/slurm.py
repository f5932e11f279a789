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

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from maskgit_pl.checks import check_integer
from maskgit_pl.processes import hide_launcher
from maskgit_pl.runs.plan import Folders, Plan, plan_run
from maskgit_pl.runs.recipe import Recipe, recipes_folders, split_flags

log = logging.getLogger(__name__)

_SET_BY_JOB = {"trainer.num_nodes": "--nodes", "trainer.devices": "--devices"}


@dataclass(frozen=True)
class JobOptions:
    """The nodes, devices and limits of a job, and how its tasks are started.

    Args:
        nodes: Number of nodes, >= 1.
        devices: Number of devices, and of tasks, per node, >= 1.
        cpus: CPU cores per task, >= 1 (default: one plus one per data worker).
        time: Time limit of each start in Slurm's format: ``90`` (minutes), ``24:00:00``, ``7-0``.
        sbatch: Additional ``sbatch`` options, in shell syntax, such as ``--partition=gpu --account=lab``.
        srun: Additional ``srun`` options, in shell syntax.
        container: Command that starts each task, in shell syntax, such as ``apptainer exec --nv image.sif``.
        program: ``maskgit`` on the nodes (default: this one, or with a container the one on its PATH).

    Raises:
        ValueError: if a number is out of range, or a string is not valid shell syntax.
    """

    nodes: int = 1
    devices: int = 8
    cpus: int | None = None
    time: str = "24:00:00"
    sbatch: str = ""
    srun: str = ""
    container: str = ""
    program: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "devices", "cpus"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), "[1, inf)")
        for name in ("sbatch", "srun", "container"):
            _split(name, getattr(self, name))


@dataclass(frozen=True)
class Submission:
    """An ``sbatch`` command. Made by ``plan_submission``."""

    plan: Plan
    job: JobOptions
    options: tuple[str, ...]  # of sbatch
    words: tuple[str, ...]  # arguments of the script: flags of ``maskgit train``
    variables: Mapping[str, str]  # of the environment, which the script reads; an empty one has its default

    @property
    def command(self) -> list[str]:
        """The ``sbatch`` command as a list of words."""
        script = next(file for folder in recipes_folders() if (file := folder / "slurm" / "train.sbatch").is_file())
        return ["sbatch", *self.options, str(script), *self.words]

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items() if value]
        return " \\\n    ".join([*variables, *map(shlex.quote, self.command)])


def plan_submission(recipe: Recipe, *, job: JobOptions | None = None, **folders: Unpack[Folders]) -> Submission:
    """Plans a job that trains a stage of a run. Submits nothing, and works without Slurm.

    Raises:
        ValueError: if a flag of the recipe sets nodes or devices.
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
        "--parsable", "--export=ALL", f"--job-name={plan.folder.name}-{plan.stage}",
        "--dependency=singleton", f"--output={folder}/slurm-%j.log", f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.devices}", *_resources(plan, job), *_split("sbatch", job.sbatch),
    )  # fmt: skip
    repeated = [] if recipe.config is None else [f"--config={recipe.config}"]
    # A task without a GPU must fail; with `auto` it would train on the CPU for days.
    gpu = ["--trainer.accelerator=gpu"] if recipe.get("trainer.accelerator") in (None, "auto") else []
    variables = _variables(plan, job, folders)
    return Submission(plan, job, options, (*repeated, *recipe.words, *gpu), variables)


def check_submission(submission: Submission) -> str:
    """Builds the run as each task will, on the CPU of this machine, and returns a summary; see ``submit``."""
    plan, job = submission.plan, submission.job
    log.info("%s: checking the run as training will, which takes some seconds ...", plan.stage_folder)
    from maskgit_pl.runs import fitting  # lightning and torch take seconds to import

    here = ["--trainer.accelerator=cpu", f"--trainer.num_nodes={job.nodes}", f"--trainer.devices={job.devices}"]
    with hide_launcher(), fitting.restore_process_state():
        run = fitting.build(replace(plan, recipe=plan.recipe.with_overrides(here)))
    data, steps = run.datamodule, run.trainer.max_steps
    if data.config.source != "stream":
        data.setup()
    start = fitting.describe_start(plan.stage_folder, steps)
    return f"{start}; {job.nodes * job.devices} ranks share a global batch of {data.config.global_batch}; {steps} steps"


def submit(submission: Submission) -> str:
    """Checks a job with ``check_submission``, submits it, and returns its ID.

    Raises:
        FileNotFoundError: if ``sbatch`` or a file that training needs is missing.
        ValueError: if training would reject the run, or ``sbatch`` rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise FileNotFoundError("sbatch must be on PATH; use a login node, or --dry-run to see the command")
    log.info("%s", check_submission(submission))
    log.info("%s", submission)
    submission.plan.stage_folder.mkdir(parents=True, exist_ok=True)  # for the log file: Slurm creates no folders
    # Without the variables of a surrounding job.
    others = {
        name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")
    }
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


def _resources(plan: Plan, job: JobOptions) -> list[str]:
    recipe = plan.recipe
    # One core for the task and one per data worker, but at least the threads of torch.
    cpus = job.cpus or max(1 + (recipe.get("data.num_workers") or 0), recipe.get("cpu_threads") or 1)
    is_on_cpu = recipe.get("trainer.accelerator") == "cpu"
    # A second request must not be added: with a count of 0 in one of them, srun gives the tasks no GPUs.
    names_gpus = re.search(r"(^|\s)(-G|--gpus|--gres[= ](\S*gpu|none))", job.sbatch)
    gpus = [] if is_on_cpu or names_gpus else [f"--gpus-per-node={job.devices}"]
    return [*gpus, f"--cpus-per-task={cpus}", f"--time={job.time}"]


def _variables(plan: Plan, job: JobOptions, folders: Folders) -> dict[str, str]:
    """Returns all variables that the script reads, so that none is that of the user's shell."""
    this_program = "maskgit" if job.container else str(Path(sys.executable).with_name("maskgit"))
    return {
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
        "MASKGIT": job.program or this_program,
    }
