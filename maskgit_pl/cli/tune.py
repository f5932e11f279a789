"""``maskgit tune``: searches for better decoding settings of a model, and writes them beside the weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.evaluation_flags import add_measured_run_arguments, read_measuring_flags, read_num_steps_flag
from maskgit_pl.cli.flags import FOLDER, check_at_least, check_outputs, use_flag_names
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.flag_values import parse_specs

if TYPE_CHECKING:
    from maskgit_pl.decoding import DecodingConfig

__all__ = ["add_tune_parser"]


def add_tune_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "tune",
        help="search for better decoding settings of a model",
        description="Search token selector, temperatures, truncation, guidance, mask schedule and number of steps T on "
        "the val split, confirm the best settings with new noise, and write decoding.json beside the weights, a page "
        "and a figure. Every command uses decoding.json from then on. The same command resumes after a stop.",
        epilog="Example: maskgit tune runs/fashion-mnist-adaln --trials 40 --metric fid",
    )
    add_measured_run_arguments(parser)
    parser.add_argument("--trials", type=int, default=40, metavar="N", help="maximum number of trials (default: 40)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="start no further trial after this time (default: no limit)"
    )
    parser.add_argument(
        "--metric", default="fid", metavar="NAME", help="fid or kid in the features of the data's own classifier, or "
        "agreement with it (default: fid)",
    )  # fmt: skip
    parser.add_argument("--search", default="random", metavar="NAME", help="random or grid (default: random)")
    parser.add_argument(
        "--num-steps",
        metavar="T,...",
        help="numbers of decoding steps to try, or a range such as 4-16 (default: 4,6,8,12,16)",
    )
    parser.add_argument(
        "--selectors",
        default="all",
        metavar="A,B,...",
        help="names, or mappings such as '{name: remdm, strategy: loop}', whose arguments are fixed (default: all)",
    )
    parser.add_argument(
        "--schedules",
        default="all",
        metavar="A,B,...",
        help="mask schedules to try besides the model's own: names, mappings such as '{name: pow, exponent: 2.5}', pow "
        "(any exponent), or free (any number of tokens per step); own: only the model's (default: all)",
    )
    parser.add_argument(
        "--num-images", type=int, default=500, metavar="N", help="images generated for each trial (default: 500)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the page, the figure and the ledger (default: RUN/tuning, and the ledger of RUN/evaluation)",
    )
    parser.add_argument(
        "--plot-images", type=int, metavar="N", help="images for each point of the figure (default: --num-images)"
    )
    parser.add_argument("--no-plot", action="store_true", help="skip the figure, which takes longer than the search")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and exit")
    parser.set_defaults(run=_run_tune)


def _run_tune(args: argparse.Namespace) -> int:
    """Searches, confirms the best settings, and writes them with a page and a figure."""
    numbers = read_num_steps_flag(args)
    selectors = None if args.selectors == "all" else parse_specs("--selectors", args.selectors)
    schedules = {"all": None, "own": ()}.get(args.schedules, args.schedules)
    if schedules:
        schedules = parse_specs("--schedules", schedules)
    check_at_least(args, trials=1, num_images=2, plot_images=2, batch_size=1)
    check_outputs(args, out=FOLDER)
    from maskgit_pl.evaluation import TuningOptions, plan_trials, tune

    with use_flag_names(args), progress_bars() as bars:
        options = TuningOptions(
            **read_measuring_flags(args),
            search=args.search,
            num_steps=numbers,
            selectors=selectors,
            schedules=schedules,
            seconds=args.seconds,
            plot=not args.no_plot,
            plot_images=args.plot_images,
        )
        # plan_trials makes the same choices as the search, without a measurement.
        if args.dry_run:
            planned = plan_trials(args.folder, data=args.data, trials=args.trials, metric=args.metric, options=options)
            _print_trials(planned, args.num_images)
            return 0
        result = tune(
            args.folder,
            data=args.data,
            trials=args.trials,
            metric=args.metric,
            num_images=args.num_images,
            out=args.out,
            options=options,
            bars=bars,
        )
    from rich.console import Console

    from maskgit_pl.evaluation.decoding_search import make_table

    Console().print(make_table(result))
    # Without a better trial, the files of the model stay as they are.
    if result.decoding_file is None:
        print(f"the current settings are the best of {len(result.trials)} trials; decoding.json is unchanged")
    else:
        kept = (
            f"; the previous settings are in {result.old_decoding_file.name}"
            if result.old_decoding_file is not None
            else ""
        )
        print(f"{result.decoding_file}: new decoding settings of this model{kept}")
    files = ["tuning.md", "tuning.csv", *(["tuning.png"] if result.figure else [])]
    print(f"{result.folder}: measured {result.num_measured} trials; {', '.join(files)}")
    return 0


def _print_trials(trials: Sequence[DecodingConfig], num_images: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from maskgit_pl.evaluation.decoding_search import FINALISTS
    from maskgit_pl.evaluation.options import describe_decoding

    # The second measurement has the model's own decoding and the best trials, with twice as many images.
    confirmed = min(len(trials), FINALISTS + 1)
    total = (len(trials) + 2 * confirmed) * num_images
    table = Table(title=f"trials, {num_images} images each; {total} images with the second measurement")
    table.add_column("trial", justify="right")
    table.add_column("decoding")
    for number, decoding in enumerate(trials):
        table.add_row(str(number), describe_decoding(decoding))
    Console().print(table)
