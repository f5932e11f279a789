"""``maskgit train``, ``tokenize`` and ``slurm submit``: train a stage here or on a cluster, and encode its images."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

from maskgit_pl import runs
from maskgit_pl.cli.flags import WantedFolders, add_run_arguments, read_folder_flags, read_recipe_flags, use_flag_names
from maskgit_pl.errors import printable
from maskgit_pl.processes import Bars, catch_stop_signals, progress_bars
from maskgit_pl.runs.fitting import fit
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.recipe import STAGES, Recipe
from maskgit_pl.runs.slurm import JobOptions, check_submission, plan_submission, submit
from maskgit_pl.runs.tokenizing import OnRows, ProcessRank, TokenizeOptions, find_process_rank, tokenize

__all__ = ["add_slurm_parser", "add_tokenize_parser", "add_train_parser"]

log = logging.getLogger(__name__)


def add_train_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "train",
        help="train the tokenizer or the transformer from a recipe",
        description="Train a stage from a recipe, or resume it from its last checkpoint. Further flags override single "
        "recipe values, such as --trainer.max_steps 2000; --print-config lists them all.",
        epilog="Example: maskgit train transformer --recipe adaln --run fashion-mnist-adaln --trainer.max_steps 2000",
    )
    parser.add_argument("stage", choices=STAGES, help="stage to train")
    add_run_arguments(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print-config", action="store_true", help="print the complete recipe of the run and exit")
    instead.add_argument("--dry-run", action="store_true", help="check everything that is checked before training, "
                         "print what would be done, and exit; writes nothing")  # fmt: skip
    instead.add_argument("--fresh", action="store_true", help="start over: rename the stage folder of an earlier "
                         "training to STAGE.old-N")  # fmt: skip
    parser.set_defaults(run=_run_train, takes_overrides=True)


def _run_train(args: argparse.Namespace) -> int:
    """Trains the stage, or prints its recipe or its plan."""
    with catch_stop_signals(until="exit"):
        recipe = read_recipe_flags(args)
        folders = read_folder_flags(args, recipe)
        if args.print_config:
            _print_config(recipe, folders)
        elif args.dry_run:
            for name, text in runs.dry_run(recipe, **folders).items():
                print(f"{name:11}{printable(text)}")
        else:
            fit(recipe, **folders, fresh=args.fresh)
    return 0


def _print_config(recipe: Recipe, folders: WantedFolders) -> None:
    """Prints the complete recipe; without data or tokenizer, if they are not named, only the keys that need neither."""
    missing = None
    try:
        plan = plan_run(recipe, **folders)
    except FileNotFoundError as error:
        if any(folders[name] is not None for name in ("data", "tokenizer", "pretrained")):
            raise
        missing = str(error)
    from maskgit_pl.runs.resolve import config_text, config_text_without_data, merge_values
    from maskgit_pl.runs.settings import resolve

    if missing is None:
        print(config_text(resolve(recipe.kind, merge_values(plan))), end="")
    else:
        text = config_text_without_data(recipe)
        print(f"# Keys that data and tokenizer give (paths, sizes, classes) are left out or have defaults: {missing}")
        print(text, end="")


def add_tokenize_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "tokenize",
        help="encode the images of a data set to tokens, once",
        description="Encode the images of a data set to a token store, once for all runs with the same tokenizer. The "
        "same command resumes after a stop. Processes of torchrun or srun share the work; without a launcher, set "
        "--rank and --world-size. An existing store of the run keeps its crops, flips and precision unless --crops, "
        "--flip or --precision is given. Further flags override recipe values, as in `maskgit train transformer`.",
        epilog="Example: maskgit tokenize --dataset fashion-mnist --run fashion-mnist-adaln",
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)"
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images per batch (default: 256)")
    parser.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="processes that read images (default: 0 on a CPU, up to 8 for a GPU)",
    )
    parser.add_argument(
        "--crops",
        type=int,
        metavar="N",
        help="views of each image, the central crop first (default: data.views of the recipe, or 1)",
    )
    parser.add_argument(
        "--flip", action="store_true", default=None, help="also encode a mirrored copy of each training image"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="precision of the tokenizer (default: float32)"
    )
    parser.add_argument(
        "--part-size",
        type=int,
        default=1024,
        metavar="N",
        help="images written to disk at a time; a kill loses at most these (default: 1024)",
    )
    parser.add_argument(
        "--unreadable-budget",
        type=float,
        default=1e-4,
        metavar="F",
        help="allowed fraction of unreadable images (default: 1e-4)",
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="index of this process, from 0 (default: from torchrun or Slurm)"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="W",
        help="number of processes that share the work (default: from torchrun or Slurm)",
    )
    parser.set_defaults(run=_run_tokenize, stage="transformer", takes_overrides=True)


def _run_tokenize(args: argparse.Namespace) -> int:
    """Writes the token store of a run, with progress bars."""
    recipe = read_recipe_flags(args)
    process = find_process_rank(args.rank, args.world_size)
    options = TokenizeOptions(
        crops=args.crops,
        flip=args.flip,
        precision=args.precision,
        device=args.device,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        part_size=args.part_size,
        unreadable_budget=args.unreadable_budget,
    )
    with progress_bars() as bars:
        tokenize(
            recipe,
            **read_folder_flags(args, recipe),
            options=options,
            process=process,
            on_rows=_make_bars(bars, process),
        )
    return 0


def _make_bars(bars: Bars, process: ProcessRank) -> OnRows:
    """Returns a callback that shows a progress bar for each split."""
    name = "" if process.world_size == 1 else f"rank {process.rank} of {process.world_size}: "
    # The bar of a split is made at the first call, when its number of rows is known.
    shown: dict[str, Callable[[int], None]] = {}

    def on_rows(split: str, rows: int, total: int) -> None:
        if split in shown:
            shown[split](rows)
        else:  # the rows that an earlier run encoded
            shown[split] = bars(f"{name}tokens of {split}", total, done=rows, unit="images")

    return on_rows


def add_slurm_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "slurm",
        help="train on a Slurm cluster",
        description="Submit jobs that save before their time limit and requeue themselves.",
    )
    tasks = parser.add_subparsers(title="tasks", dest="task", required=True, metavar="TASK")
    task = tasks.add_parser(
        "submit",
        help="check a stage of a run and submit it",
        description="Check a stage of a run and submit it as a job. The same command resumes a run that was stopped. "
        "Further flags override single recipe values, such as --trainer.max_steps 2000.",
        epilog="Example: maskgit slurm submit transformer --recipe paper-256 --cluster fsdp --nodes 4 --dry-run",
    )
    task.add_argument("stage", choices=STAGES, help="stage to train")
    add_run_arguments(task)
    _add_job_arguments(task)
    task.set_defaults(run=_run_slurm, takes_overrides=True, cluster="ddp")


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


def _run_slurm(args: argparse.Namespace) -> int:
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
