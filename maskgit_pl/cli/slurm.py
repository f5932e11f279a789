"""``maskgit slurm submit``: checks a stage of a run as its training will, and puts it into Slurm's queue."""

from __future__ import annotations

import argparse
import logging

from maskgit_pl.cli.run_flags import add_run_arguments, read_folder_flags, read_recipe_flags
from maskgit_pl.runs.job_options import JobOptions
from maskgit_pl.runs.slurm import check_submission, plan_submission, submit

__all__ = ["add_parser", "run"]

log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "slurm", help="train on a Slurm cluster", description="Train on a Slurm cluster; docs/slurm.md is the guide."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    submit = tasks.add_parser(
        "submit",
        help="check a stage of a run and put it into the queue",
        description="Check a stage of a run and put it into the queue. The same command goes on with a run that ended. "
        "Further flags set single values of the recipe, e.g. --trainer.max_steps 2000.",
    )
    submit.add_argument("stage", choices=("tokenizer", "transformer"))
    add_run_arguments(submit)
    _add_job_arguments(submit)
    submit.set_defaults(run=run, takes_overrides=True, cluster="ddp")


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of Slurm."""
    job = parser.add_argument_group("the job")
    job.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    job.add_argument("--devices", type=int, default=8, help="devices, and tasks, of each node (default: 8)")
    job.add_argument("--cpus", type=int, help="CPU cores of a task (default: 1 and one for each of data.num_workers)")
    job.add_argument("--time", default="24:00:00", help="limit of each start, D-HH:MM:SS (default: 24:00:00)")
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


def run(args: argparse.Namespace) -> int:
    """Checks, prints and submits."""
    job = JobOptions(
        args.nodes, args.devices, args.cpus, args.time, args.partition, args.account, args.qos, args.constraint,
        args.sbatch, args.srun, args.container, args.program,
    )  # fmt: skip
    recipe = read_recipe_flags(args)
    submission = plan_submission(recipe, **read_folder_flags(args, recipe), job=job)
    if args.dry_run:
        log.info("%s", check_submission(submission))
        log.info("%s", submission)
        log.info("dry run: nothing is submitted")
        return 0
    number = submit(submission)
    log.info("job %s: %s", number, str(submission.log_file).replace("%j", number))
    return 0
