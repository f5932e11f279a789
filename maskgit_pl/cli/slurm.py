"""``maskgit slurm submit``: checks a stage of a run as its training will, and puts it into Slurm's queue.

The job is ``recipes/slurm/train.sbatch``, which also works without this command. What is submitted is printed as it
can be typed.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from maskgit_pl.cli.run_flags import add_run_arguments, folders_of, read_recipe
from maskgit_pl.runs.plan import Plan, plan_run
from maskgit_pl.runs.recipe_files import recipes_folder

__all__ = ["Submission", "add_parser", "plan_submission", "run_submit"]

log = logging.getLogger(__name__)

_NEXT_LINE = " \\\n    "
_WIDTH = 110
_PROGRAM = Path(".venv/bin/maskgit")  # the script's own default
_VARIABLES = (
    "STAGE", "RUN", "RUNS", "DATASET", "DATA", "RECIPE", "CLUSTER", "TOKENIZER", "PRETRAINED", "CONTAINER", "SRUN",
    "MASKGIT",
)  # fmt: skip
_OF_SLURM = {"--trainer.num_nodes": "--nodes", "--trainer.devices": "--devices"}
_NODES, _TASKS = "--nodes of the command says it, and the batch is shared out by it", "--devices of the command says it"
_NEEDED = {
    "--nodes": _NODES, "-N": _NODES, "--ntasks": _TASKS, "-n": _TASKS, "--ntasks-per-node": _TASKS,
    "--array": "several jobs would train one run", "-a": "several jobs would train one run",
    "--chdir": "paths are those of this folder", "-D": "paths are those of this folder",
    "--comment": "the run's job is known by it in the queue",
    "--export": "the job's script needs all variables that it is submitted with",
    "--wrap": "the job is the script",
}  # fmt: skip
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d(:\d\d)?)?|UNLIMITED|INFINITE", re.IGNORECASE)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "slurm",
        help="train on a Slurm cluster",
        description="Train on a Slurm cluster; docs/slurm.md is the guide.",
        allow_abbrev=False,
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    submit = tasks.add_parser(
        "submit",
        help="check a stage of a run and put it into the queue",
        description="Check a stage of a run and put it into the queue. The same command goes on with a run that ended. "
        "Further flags set single values of the recipe, e.g. --trainer.max_steps 2000.",
        allow_abbrev=False,
    )
    submit.add_argument("stage", choices=("tokenizer", "transformer"))
    add_run_arguments(submit)
    _add_job_arguments(submit)
    submit.set_defaults(run=run_submit, takes_overrides=True, cluster="ddp")


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What is for Slurm and not for the training."""
    job = parser.add_argument_group("the job")
    job.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    job.add_argument("--devices", type=int, default=8, help="devices, and tasks, of each node (default: 8)")
    job.add_argument("--cpus", type=int, help="CPU cores of a task (default: 1 and one for each of data.num_workers)")
    job.add_argument(
        "--time", type=_time_limit, default="24:00:00", help="limit of each start, D-HH:MM:SS (default: 24:00:00)"
    )
    job.add_argument("--partition", help="where it runs (default: the cluster's choice)")
    job.add_argument("--account", help="whose budget pays")
    job.add_argument("--qos", help="quality of service")
    job.add_argument("--constraint", help="features that the nodes must have")
    job.add_argument("--sbatch", default="", metavar="WORDS", help='more for sbatch, e.g. --sbatch="--mem=0"')
    job.add_argument("--srun", default="", metavar="WORDS", help='more for srun, e.g. --srun="--cpu-bind=cores"')
    job.add_argument(
        "--container", default="", metavar="COMMAND",
        help='each task is started by it, e.g. "apptainer exec --nv image.sif"',
    )  # fmt: skip
    job.add_argument(
        "--program", help="maskgit on the nodes (default: this one; with --container, maskgit on the container's PATH)"
    )
    job.add_argument("--dry-run", action="store_true", help="check and print, submit nothing; needs no Slurm")


def _time_limit(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"a time of Slurm is needed, such as 90 (minutes), 24:00:00 or 7-0, got {text}"
        )
    return text


@dataclass(frozen=True)
class Submission:
    """What is handed to ``sbatch``.

    Args:
        options: Words of ``sbatch`` before the script.
        script: The job.
        words: Words of the script, flags of ``maskgit train``.
        variables: What the script reads.
        identity: The comment by which a job of the same stage of the same run is found.
        log_file: Where the job writes; ``%j`` stands for its number.
    """

    options: tuple[str, ...]
    script: Path
    words: tuple[str, ...]
    variables: dict[str, str]
    identity: str
    log_file: Path

    @property
    def command(self) -> list[str]:
        """The words of ``sbatch``, itself the first."""
        return ["sbatch", *self.options, str(self.script), *self.words]

    def __str__(self) -> str:
        """As it can be typed."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        options, words = map(shlex.quote, self.options), map(shlex.quote, (str(self.script), *self.words))
        return _NEXT_LINE.join(_fold([*part]) for part in (variables, ("sbatch", *options), words))


def _fold(words: Sequence[str]) -> str:
    """Words of a shell on lines of a bearable length."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > _WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return _NEXT_LINE.join(lines)


def run_submit(args: argparse.Namespace) -> int:
    """Checks, prints and submits.

    Raises:
        FileNotFoundError: No Slurm here, and it is no dry run; or something that training needs is missing.
        ValueError: Training would refuse the run, a job of it is in the queue, or ``sbatch`` refuses it.
    """
    _leave_allocation()
    if not args.dry_run and shutil.which("sbatch") is None:
        raise FileNotFoundError(
            "sbatch: Slurm's client tools are needed to submit, got none on PATH; do it on a login node of the "
            "cluster, or see with --dry-run what would be submitted"
        )
    plan, submission = plan_submission(args)
    if not args.dry_run:
        _refuse_second(plan, submission.identity)
    log.info("%s", _check(plan, args.nodes, args.devices))
    log.info("%s", submission)
    if args.dry_run:
        log.info("dry run: nothing is submitted")
        return 0
    number = _submit(plan, submission)
    log.info("job %s: %s", number, str(submission.log_file).replace("%j", number))
    return 0


def plan_submission(args: argparse.Namespace) -> tuple[Plan, Submission]:
    """The run that the command names, and the job that would train it; nothing is submitted.

    Raises:
        ValueError: A number below 1, what Slurm is told said in a second place, or words that no shell would take.
    """
    for flag, value in (("--nodes", args.nodes), ("--devices", args.devices), ("--cpus", args.cpus)):
        if value is not None and value < 1:
            raise ValueError(f"{flag}: at least 1 is needed, got {value}")
    for word in args.overrides:
        flag = word.partition("=")[0]
        if flag in _OF_SLURM:
            raise ValueError(
                f"flag {flag}: Slurm says it to the tasks, got a second place; use {_OF_SLURM[flag]} alone"
            )
    recipe = read_recipe(args)
    plan = plan_run(recipe, **folders_of(args, recipe))
    more = _more_of_sbatch(args.sbatch)
    log_file = plan.stage_folder / "slurm-%j.log"
    identity = f"maskgit {plan.stage_folder.resolve()}"
    options = (
        "--parsable", "--export=ALL", f"--job-name={plan.folder.name}-{plan.stage}", f"--comment={identity}",
        "--dependency=singleton", f"--output={log_file}", f"--nodes={args.nodes}", f"--ntasks-per-node={args.devices}",
        *_resources(plan, args, more),
        *more,
    )  # fmt: skip
    script = recipes_folder() / "slurm" / "train.sbatch"
    # A task that sees no GPU must not go on without: `auto` would train on the processor, for days.
    named = plan.recipe.get("trainer.accelerator")
    repeated = [] if args.config is None else [f"--config={args.config}"]
    words = [*repeated, *plan.recipe.words, *(["--trainer.accelerator=gpu"] if named in (None, "auto") else [])]
    return plan, Submission(options, script, tuple(words), _variables(plan, args), identity, log_file)


def _resources(plan: Plan, args: argparse.Namespace, more: Sequence[str]) -> list[str]:
    accelerator = plan.recipe.get("trainer.accelerator")
    workers, threads = _whole(plan, "data.num_workers", least=0), _whole(plan, "cpu_threads", least=1)
    found = [] if accelerator == "cpu" or _names_gpus(more) else [f"--gpus-per-node={args.devices}"]
    found += [f"--cpus-per-task={args.cpus or max(1 + workers, threads)}", f"--time={args.time}"]
    named = ("partition", "account", "qos", "constraint")
    return [*found, *(f"--{name}={value}" for name in named if (value := getattr(args, name)))]


def _whole(plan: Plan, key: str, *, least: int) -> int:
    """A whole number of the recipe; ``least`` where it says nothing."""
    value = plan.recipe.get(key)
    if value is None:
        return least
    if type(value) is not int or value < least:
        raise ValueError(f"{key}: a whole number of at least {least} is needed, got {value!r}")
    return value


def _more_of_sbatch(text: str) -> list[str]:
    """The words of --sbatch.

    Raises:
        ValueError: No words of a shell, or an option that the command itself needs.
    """
    words = _words("--sbatch", text)
    for flag, _ in _options(words):
        if flag in _NEEDED:
            raise ValueError(f"--sbatch {flag}: {_NEEDED[flag]}; leave it out of --sbatch")
    return words


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Words of ``sbatch`` as options and their values, ``-N2`` as ``-N`` and ``2``."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            yield flag, value if equals else following
        elif word.startswith("-"):
            yield word[:2], word[2:] or following


def _names_gpus(words: Sequence[str]) -> bool:
    """Whether words of ``sbatch`` say themselves which GPUs the job gets.

    Of two ways of asking, sbatch takes both, and hands both on to srun: a count of 0 in one leaves the tasks without.
    """
    return any(
        flag == "-G" or flag.startswith("--gpus") or (flag == "--gres" and ("gpu" in value or value == "none"))
        for flag, value in _options(words)
    )


def _variables(plan: Plan, args: argparse.Namespace) -> dict[str, str]:
    """What the script reads; where its default is meant, nothing."""
    for flag, words in (("--container", args.container), ("--srun", args.srun)):
        _words(flag, words)
    program = args.program or ("maskgit" if args.container else str(_this_program()))
    values = {
        "STAGE": plan.stage,
        "RUN": plan.folder.name,
        "RUNS": "" if plan.folder.parent == Path("runs") else str(plan.folder.parent),
        "DATASET": args.dataset,
        "DATA": str(args.data or ""),
        "RECIPE": args.recipe,
        "CLUSTER": args.cluster,
        "TOKENIZER": str(plan.tokenizer or ""),
        "PRETRAINED": str(args.pretrained or ""),
        "CONTAINER": args.container,
        "SRUN": args.srun,
        "MASKGIT": "" if program == str(_PROGRAM) else program,
    }
    return {name: value for name, value in values.items() if value}


def _this_program() -> Path:
    here = Path(sys.executable).parent / "maskgit"
    return _PROGRAM if _PROGRAM.exists() and _PROGRAM.samefile(here) else here


def _words(flag: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{flag}: words as in a shell are needed, got {text!r} ({error}); close the quotes") from error


def _leave_allocation() -> None:
    """Forgets a job in which this command may run: what it was told is not meant for the one that is submitted."""
    if "SLURM_JOB_ID" in os.environ:
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del os.environ[name]


class _Job(NamedTuple):
    """A job in the queue."""

    number: str
    state: str
    comment: str


def _refuse_second(plan: Plan, identity: str) -> None:
    """Two jobs that write the same folder would destroy each other's run."""
    command = ["squeue", "--noheader", "--format=%i|%T|%k"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        said = " ".join(listed.stderr.split())
        raise ValueError(f"squeue: the queue cannot be read, got {said!r}; submit where Slurm answers")
    jobs = [_Job(*line.split("|", 2)) for line in listed.stdout.splitlines() if line.count("|") >= 2]
    for job in jobs:
        if job.comment == identity:
            raise ValueError(
                f"run {plan.stage_folder}: one job at a time may train it, and job {job.number} is {job.state}; wait "
                f"for it, end it with `scancel {job.number}`, or name another run with --run"
            )


def _check(plan: Plan, nodes: int, devices: int) -> str:
    """Builds the run as each task will, on this machine's processor, and says what it will be.

    Raises:
        ValueError: Training would refuse it.
        FileNotFoundError: Something that it reads is missing.
    """
    log.info("%s: is checked as training will, some seconds ...", plan.stage_folder)
    from maskgit_pl.runs.build import build  # lightning and torch take seconds to import
    from maskgit_pl.training.checkpoint_files import newest_complete, step_of
    from maskgit_pl.training.strategies import check_accelerator

    check_accelerator(str(plan.recipe.get("trainer.accelerator") or "auto"))
    here = ["--trainer.accelerator=cpu", f"--trainer.num_nodes={nodes}", f"--trainer.devices={devices}"]
    run = build(replace(plan, recipe=plan.recipe.with_overrides(here)))
    data = run.datamodule
    if data.source != "stream":
        data.setup()
    newest, steps = newest_complete(plan.checkpoints), run.trainer.max_steps
    begins = "from the start" if newest is None else f"going on from {newest.name}"
    if newest is not None and step_of(newest) >= steps:
        begins = "which are done: the job will look whether they are exported, and end"
    ranks = nodes * devices
    return f"{plan.stage_folder}: {ranks} ranks share a global batch of {data.global_batch}; {steps} steps, {begins}"


def _submit(plan: Plan, submission: Submission) -> str:
    """The number of the job.

    Raises:
        ValueError: ``sbatch`` refuses it.
    """
    plan.stage_folder.mkdir(parents=True, exist_ok=True)  # the log lies in it, and Slurm makes no folders
    others = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    done = subprocess.run(
        submission.command, env={**others, **submission.variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"sbatch: refuses the job: {' '.join(done.stderr.split())}; see the command above")
    if done.stderr.strip():
        log.warning("%s", done.stderr.strip())
    return done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER on federated ones
