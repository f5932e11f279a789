"""``maskgit demo``: fetches data, trains both stages, and measures the result, one command after the other.

Each step is a process of its own, as if it had been typed: it frees its memory, has its exit code, and handles signals.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from maskgit_pl.cli.flags import add_new_run_arguments
from maskgit_pl.data.sources.public import public_datasets
from maskgit_pl.processes import SIGNALS
from maskgit_pl.runs.recipe import DEFAULT_DATASET, STAGES, Recipe

__all__ = ["Step", "add_demo_parser", "plan_demo", "run_steps"]

_log = logging.getLogger(__name__)

_RECIPE, _BUDGET = "adaln", "15m"  # the temperatures of `adaln` without a budget suit Fashion-MNIST
_SHORT_RUN = "demo-short"
_SHORT = ("--trainer.max_steps=60", "--trainer.val_check_interval=60", "--data.validation_samples=500")
# Of the default recipes, on 2 CPU cores.
_TIMES = {"data": "1 minute", "tokenizer": "2 minutes", "tokens": "20 seconds", "transformer": "5 minutes"}
_OWN_TIMES = {"tokenizer": "10 minutes", "tokens": "20 seconds", "transformer": "10 minutes"}
_SHORT_TIMES = {"data": "1 minute", "tokenizer": "20 seconds", "tokens": "20 seconds", "transformer": "1 minute"}


class Step(NamedTuple):
    """A command of the demo.

    Args:
        title: One line for people: what it does, and about how long.
        words: The command line after ``maskgit``.
    """

    title: str
    words: list[str]


def add_demo_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "demo",
        help="do everything once: fetch data, train both stages, make pictures, measure",
        description="Fetch a data set, or convert the images of --images, train both stages, and measure the model: "
        "about 10 minutes on 2 CPU cores for Fashion-MNIST. The same command resumes after a stop. Without --recipe, "
        f"it trains the recipe {_RECIPE}, and on other data than Fashion-MNIST '{_RECIPE} {_BUDGET}'. Further flags "
        "override recipe values of both stages.",
        epilog="Example: maskgit demo --dataset mine --images path/to/folder",
    )
    add_new_run_arguments(parser)
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder or archive of your own images, one "
                        "sub-folder per class, for a --dataset of your own")  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help=f"train 60 steps per stage, as a quick check (run: {_SHORT_RUN})"
    )
    parser.set_defaults(run=_run_demo, takes_overrides=True)


def _run_demo(args: argparse.Namespace) -> int:
    """Runs the steps, and says what to do next."""
    steps = plan_demo(args)
    code = run_steps(steps)
    if code == 0:
        folder = steps[-1].words[1]
        print(f"\nThe model is in {folder}. Next: maskgit sample {shlex.quote(folder)} --out sampled.png")
    return code


def plan_demo(args: argparse.Namespace) -> list[Step]:
    """Returns the steps of the demo.

    Args:
        args: Flags of the command.

    Raises:
        ValueError: if the recipe is wrong, or there are neither data nor a way to get them.
        FileNotFoundError: if there is no recipe with a given name.
    """
    usual = _RECIPE if args.dataset == DEFAULT_DATASET else f"{_RECIPE} {_BUDGET}"
    recipe = args.recipe or usual
    overrides = [*args.overrides, *(_SHORT if args.short else ())]
    for stage in STAGES:  # a mistake is reported before anything is downloaded
        read = Recipe.read(stage, names=recipe, dataset=args.dataset, cluster=args.cluster, overrides=overrides)
    name = args.run_name or (_SHORT_RUN if args.short else str(read.run_name))
    data = args.data or Path("data/shards", args.dataset)
    common = ["--dataset", args.dataset, "--data", str(data), "--recipe", recipe, "--run", name]
    common += ["--runs-folder", str(args.runs_folder), "--cluster", args.cluster]
    for flag, folder in (("--tokenizer", args.tokenizer), ("--pretrained", args.pretrained)):
        common += [] if folder is None else [flag, str(folder)]
    common += overrides
    times = _SHORT_TIMES if args.short else _TIMES if args.dataset == DEFAULT_DATASET else _OWN_TIMES
    times = times if recipe == usual else {}
    stages = [
        _step("train the tokenizer (stage 1)", times.get("tokenizer"), "train", "tokenizer", *common),
        _step("encode the images to tokens", times.get("tokens"), "tokenize", *common),
        _step("train the transformer (stage 2)", times.get("transformer"), "train", "transformer", *common),
    ]
    measure = ["evaluate", str(args.runs_folder / name), "--data", str(data), "--features", "classifier"]
    measure += ["--num-images", "50"] if args.short else []
    measured = _step("generate pictures and measure the model", "1 minute", *measure)
    return [*_data_step(args, data, times.get("data")), *stages[args.tokenizer is not None :], measured]


def _step(title: str, time: str | None, *words: str) -> Step:
    return Step(title if time is None else f"{title}, about {time} on 2 CPU cores", list(words))


def _data_step(args: argparse.Namespace, data: Path, time: str | None) -> list[Step]:
    """Returns the step that makes the data folder; none if it is the user's own and exists."""
    if args.images is not None:
        return [
            _step(
                f"write the images of {args.images} as shards",
                None,
                "data",
                "make",
                str(args.images),
                "--out",
                str(data),
            )
        ]
    datasets = public_datasets()
    if args.dataset in datasets:
        title = f"fetch {datasets[args.dataset].title}: {datasets[args.dataset].contents}"
        return [_step(title, time, "data", "fetch", args.dataset, "--out", str(data))]
    if not data.is_dir():
        raise ValueError(
            f"data {data}: no such folder; convert your own images with --images FOLDER, or name a data set that can "
            f"be fetched with --dataset: {', '.join(datasets)}"
        )
    return []


def run_steps(steps: Sequence[Step]) -> int:
    """Runs commands in their order, until one fails or a stop signal arrives.

    A stop signal to this process is passed on, so that a training saves and ends, except Ctrl-C: the terminal sends it
    to all processes, and a second one would end a training at once.

    Returns:
        0, or the exit code of the command that failed or was stopped.
    """
    running: list[subprocess.Popen[bytes]] = []  # the step that runs, or none
    received: list[int] = []
    waiting: list[int] = []  # arrived while no step was running

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT and running:
            running[-1].send_signal(number)
        elif number != signal.SIGINT:
            waiting.append(number)

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        for number, step in enumerate(steps, start=1):
            print(f"\n[{number}/{len(steps)}] {step.title}\n      maskgit {shlex.join(step.words)}", flush=True)
            code = 0
            if not received:
                process = subprocess.Popen([sys.executable, "-m", "maskgit_pl", *step.words])
                running.append(process)
                # From here on, the handler passes signals on; these have arrived while the process started.
                for missed in waiting:
                    process.send_signal(missed)
                code = process.wait()
                running.clear()
            if code == 0 and received:  # too late to stop this step, or too early: the next one does not begin
                code = 128 + received[-1]
            if code:
                _log.error("step %d of %d ended early; the same command resumes there", number, len(steps))
                return code if code > 0 else 128 - code  # a negative one is the signal that killed it
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
