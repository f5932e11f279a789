"""The commands of runs: ``train``, ``tokenize``, ``slurm submit``, ``doctor`` before a run, ``demo`` for everything."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Annotated

from maskgit_pl import evaluation, runs
from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import Folder, NewRunFlags, Run, RunFlags
from maskgit_pl.data.token_store import TokenizeOptions
from maskgit_pl.errors import BAD_INPUT
from maskgit_pl.processes import catch_stop_signals, progress_bars
from maskgit_pl.runs.plan import Folders, Machines, merge_values, plan_run, read_inputs, values_without_data
from maskgit_pl.runs.recipe import Recipe, Stage, config_text, merge
from maskgit_pl.runs.slurm import JobOptions, check_submission, plan_submission

log = logging.getLogger(__name__)


def train(
    stage: Stage,
    *,
    print_config: bool = False,
    run: RunFlags = RunFlags(),
    overrides: Sequence[str] = (),
) -> None:
    """Trains the tokenizer or the transformer from a recipe, or resumes it from its last checkpoint.

    Further flags override single recipe values, such as --trainer.max_steps 2000; --print-config lists them all.

    Example: maskgit train transformer --recipe adaln --run fashion-mnist-adaln --trainer.max_steps 2000

    Args:
        stage: Stage to train.
        print_config: Print the complete recipe of the run and exit.
    """
    with catch_stop_signals(until="exit"):
        if not print_config:
            run.find_data()  # before torch is imported
        recipe = run.read(stage, overrides)
        folders = run.folders(recipe)
        if print_config:
            _print_config(recipe, folders)
        else:
            runs.fit(recipe, **folders)


def _print_config(recipe: Recipe, folders: Folders) -> None:
    """Prints the complete recipe; without data or tokenizer, with the sizes of the paper."""
    from maskgit_pl.runs.resolve import resolve

    try:
        plan = plan_run(recipe, **folders)
        values = merge_values(plan, read_inputs(plan))
    except FileNotFoundError as error:
        print(f"# Paths are empty, and sizes that data and tokenizer give are those of the paper: {error}")
        values = merge([values_without_data(recipe.stage), recipe.tree])
    print(config_text(resolve(recipe.kind, values).tree), end="")


def distill(
    model: Run,
    *,
    method: str = "dimo",
    num_steps: Annotated[int, Word("T")] = 1,
    data: Folder | None = None,
    cluster: str = "single",
    run: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Distils a model to fewer decoding steps, or resumes it.

    The student starts from the weights of the model, its teacher, and needs no guidance. Further flags override recipe
    values, as in `maskgit train transformer`.

    Example: maskgit distill runs/fashion-mnist-adaln --num-steps 1

    Args:
        model: The teacher: a run, a pretrained folder, or a model of the package.
        method: Recipe distill-METHOD: dimo or guidance.
        num_steps: Decoding steps of the student.
        data: Data folder (default: that of the training).
        cluster: Machines: a file of recipes/cluster.
        run: Name of the student's run (default: MODEL-METHOD-T).
    """
    with catch_stop_signals(until="exit"), progress_bars() as bars:
        result = evaluation.distill(
            model,
            method=method,
            num_steps=num_steps,
            data=data,
            cluster=cluster,
            run=run,
            overrides=overrides,
            bars=bars,
        )
    log.info("The student: maskgit sample %s --out sampled.png", shlex.quote(str(result.folder)))


def tokenize(
    *,
    run: RunFlags = RunFlags(),
    store: TokenizeOptions = TokenizeOptions(),
    overrides: Sequence[str] = (),
) -> None:
    """Encodes the images of a data set to tokens, once.

    The token store serves all runs with the same tokenizer. The same command resumes after a stop. Processes
    of torchrun or srun share the work. An existing store of the run keeps its crops, flips and precision unless
    --crops, --flip or --precision is given. Further flags override recipe values, as in
    `maskgit train transformer`.

    Example: maskgit tokenize --dataset fashion-mnist --run fashion-mnist-adaln
    """
    run.find_data()  # before torch is imported
    recipe = run.read("transformer", overrides)
    with progress_bars() as bars:
        runs.tokenize(recipe, **run.folders(recipe), options=store, bars=bars)


@dataclass(frozen=True)
class JobRunFlags(RunFlags):
    """The run of a job, on several devices by default."""

    cluster: str = "ddp"


def submit(
    stage: Stage, *, dry_run: bool = False, run: JobRunFlags, job: JobOptions, overrides: Sequence[str] = ()
) -> None:
    """Checks a stage of a run and submits it as a job.

    The same command resumes a run that was stopped. Further flags override single recipe values, such as
    --trainer.max_steps 2000.

    Example: maskgit slurm submit transformer --recipe paper-256 --cluster fsdp --nodes 4 --dry-run

    Args:
        stage: Stage to train.
        dry_run: Check and print the job without submitting it; works without Slurm.
    """
    run.find_data()  # before torch is imported
    recipe = run.read(stage, overrides)
    submission = plan_submission(recipe, **run.folders(recipe), job=job)
    if dry_run:
        log.info("%s", check_submission(submission))
        log.info("%s", submission)
        log.info("dry run: the job was not submitted")
        return
    log.info("job %s: %s", runs.submit(submission), submission.plan.stage_folder)


def doctor(
    stage: Stage,
    *,
    json: bool = False,
    run: RunFlags = RunFlags(),
    machines: Machines = Machines(),
    overrides: Sequence[str] = (),
) -> int:
    """Checks a run before it starts: recipe, data, batch, memory, disk.

    It takes the arguments of `maskgit train`, trains nothing, and works on any machine. The exit code is 0 if all
    checks pass, else 2.

    Example: maskgit doctor transformer --recipe paper-256 --cluster fsdp --nodes 4 --devices 8

    Args:
        stage: Stage of the run.
        json: Print JSON, an object with ok, checks and figures.
    """
    report = runs.Preflight()
    with report.catch("recipe"):
        recipe = run.read(stage, overrides)
        report = runs.preflight(recipe, **run.folders(recipe), machines=machines)
    print(dumps(report.as_dict(), indent=1) if json else report)
    return 0 if report.ok else BAD_INPUT


def demo(
    *,
    images: Annotated[Path, Word("DIR")] | None = None,
    lenient: bool = False,
    short: bool = False,
    run: NewRunFlags = NewRunFlags(),
    overrides: Sequence[str] = (),
) -> None:
    """Does everything once: fetches data, trains both stages, makes pictures, measures.

    Fashion-MNIST takes 7 to 14 minutes on 2 CPU cores. The same command resumes after a stop. Without
    --recipe, it trains the recipe adaln, and on other data than Fashion-MNIST 'adaln 15m'. Further flags
    override recipe values of both stages.

    Example: maskgit demo --dataset mine --images path/to/folder

    Args:
        images: Folder or archive of your own images, one sub-folder per class, for a --dataset of your own.
        lenient: Skip and list images that cannot be read.
        short: Train 60 steps per stage, as a quick check (run: demo-short).
    """
    from maskgit_pl.evaluation import demo_steps  # torch takes seconds to import

    folder = demo_steps.demo(**asdict(run), images=images, lenient=lenient, short=short, overrides=overrides)
    larger = "; larger pictures: --recipe 'adaln 64px'" if images is not None and not run.recipe else ""
    log.info(
        "\nThe model is in %s. Next: maskgit sample %s --out sampled.png%s", folder, shlex.quote(str(folder)), larger
    )
