"""``maskgit slurm submit``: checks a stage of a run as training does, and submits it to Slurm."""

from __future__ import annotations

import argparse
import logging

from maskgit_pl.cli.flags import use_flag_names
from maskgit_pl.cli.run_flags import add_run_arguments, read_folder_flags, read_recipe_flags
from maskgit_pl.runs.job_options import JobOptions
from maskgit_pl.runs.slurm import check_submission, plan_submission, submit

__all__ = ["add_parser", "run"]

log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "slurm",
        help="train on a Slurm cluster",
        description="Submit jobs that save before their time limit and requeue themselves.",
    )
    tasks = parser.add_subparsers(title="tasks", dest="task", required=True, metavar="TASK")
    submit = tasks.add_parser(
        "submit",
        help="check a stage of a run and submit it",
        description="Check a stage of a run and submit it as a job. The same command resumes a run that was stopped. "
        "Further flags override single recipe values, such as --trainer.max_steps 2000.",
        epilog="Example: maskgit slurm submit transformer --recipe paper-256 --cluster fsdp --nodes 4 --dry-run",
    )
    submit.add_argument("stage", choices=("tokenizer", "transformer"), help="stage to train")
    add_run_arguments(submit)
    _add_job_arguments(submit)
    submit.set_defaults(run=run, takes_overrides=True, cluster="ddp")


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the Slurm job."""
    job = parser.add_argument_group("job")
    job.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    job.add_argument(
        "--devices", type=int, default=8, metavar="M", help="devices, and tasks, of each node (default: 8)"
    )
    job.add_argument("--cpus", type=int, metavar="N", help="CPU cores of each task (default: data.num_workers + 1)")
    job.add_argument(
        "--time", default="24:00:00", metavar="D-HH:MM:SS", help="time limit of each start (default: 24:00:00)"
    )
    job.add_argument("--partition", metavar="NAME", help="partition (default: that of the cluster)")
    job.add_argument("--account", metavar="NAME", help="account that is charged")
    job.add_argument("--qos", metavar="NAME", help="quality of service")
    job.add_argument("--constraint", metavar="FEATURES", help="features that the nodes must have")
    job.add_argument(
        "--sbatch", default="", metavar="WORDS", help='further options of sbatch, such as --sbatch="--mem=0"'
    )
    job.add_argument(
        "--srun", default="", metavar="WORDS", help='further options of srun, such as --srun="--cpu-bind=cores"'
    )
    job.add_argument(
        "--container", default="", metavar="COMMAND",
        help='command that starts each task, such as "apptainer exec --nv image.sif"',
    )  # fmt: skip
    job.add_argument(
        "--program",
        metavar="FILE",
        help="maskgit on the nodes (default: this one; with --container, the one on its PATH)",
    )
    job.add_argument(
        "--dry-run", action="store_true", help="check and print the job without submitting it; works without Slurm"
    )


def run(args: argparse.Namespace) -> int:
    """Checks the job, prints it and submits it."""
    with use_flag_names(args):
        job = JobOptions(
            args.nodes, args.devices, args.cpus, args.time, args.partition, args.account, args.qos, args.constraint,
            args.sbatch, args.srun, args.container, args.program,
        )  # fmt: skip
    recipe = read_recipe_flags(args)
    submission = plan_submission(recipe, **read_folder_flags(args, recipe), job=job)
    if args.dry_run:
        log.info("%s", check_submission(submission))
        log.info("%s", submission)
        log.info("dry run: the job was not submitted")
        return 0
    number = submit(submission)
    log.info("job %s: %s", number, submission.log_file(number))
    return 0
