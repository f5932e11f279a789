"""``maskgit ablation``: trains variants of a recipe on the same budget, and compares them on one page.

``--vary`` and ``--recipes`` compare recipe keys and recipe files. Without them, the command compares the mask schedules
of the paper, and writes Table 3 and Figure 8.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from maskgit_pl.cli.evaluation_flags import add_report_arguments, read_num_steps_flag, read_report_flags, write_page
from maskgit_pl.cli.flags import format_flag, read_device_flag, use_flag_names
from maskgit_pl.errors import RunError
from maskgit_pl.evaluation import reports
from maskgit_pl.evaluation.pages import command_line
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.ablation_plan import (
    PAPER_SCHEDULES,
    AblationConfig,
    Factor,
    parse_budget,
    parse_factor,
    train_schedules,
)
from maskgit_pl.runs.flag_values import parse_integers
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Recipe

__all__ = ["add_ablation_parser"]

_SCHEDULES = ",".join(PAPER_SCHEDULES)
_SEEDS = "0,1"
_OF_SCHEDULES = ("schedules", "num_steps")
_OF_VARIANTS = ("vary", "recipes", "grid", "seeds", "stage", "stage_2", "budget", "pilot_steps", "name", "page_only")


class AblationError(RunError):
    """The end of an ablation in which some variants failed.

    Args:
        exit_code: Exit code of the first failure.
        text: The failures, for the user.
    """

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def add_ablation_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "ablation",
        help="train variants of a recipe on the same budget and compare them; by default, the schedules of Table 3",
        description="Train variants of a recipe with several seeds on the same budget, measure them, and write one "
        "page. Without --vary and --recipes: a transformer with each mask schedule of the paper, Table 3 and Figure 8. "
        "Finished runs and recorded measurements are reused. Further flags override single recipe values of all "
        "variants, such as --trainer.max_steps 2000.",
        epilog="Example: maskgit ablation --vary model.network.depth=2,4,6 --vary decoding.guidance.scale=0,1,2 "
        "--seeds 0,1,2",
    )
    add_report_arguments(parser)
    _add_variant_arguments(parser)
    parser.add_argument("--schedules", metavar="A,B,...",
                        help=f"recipes to train, one for each mask schedule (default: {_SCHEDULES})")  # fmt: skip
    parser.add_argument("--recipe", default="", metavar="NAME", help="recipes of all variants; several in quotes")
    parser.add_argument(
        "--dataset", default=DEFAULT_DATASET, metavar="NAME", help=f"name of the data set (default: {DEFAULT_DATASET})"
    )
    parser.add_argument(
        "--runs-folder", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    parser.add_argument(
        "--cluster", default="single", metavar="NAME", help="machines: a file of recipes/cluster (default: single)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="pretrained tokenizer (default: the only one of the data set)"
    )
    parser.add_argument(
        "--num-steps",
        metavar="T,...",
        help="numbers of decoding steps of --schedules (default: 2,3,4,6,8,12,16,24, at most half the tokens)",
    )
    parser.set_defaults(run=_run_ablation, takes_overrides=True)


def _add_variant_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("variants of a recipe")
    group.add_argument("--vary", action="append", metavar="KEY=A,B,...", help="recipe key with the values to compare; "
                       "repeat the flag for further keys. decoding.KEY needs no training")  # fmt: skip
    group.add_argument("--recipes", metavar="'A;B;C D'", help="sets of recipes to compare, separated by semicolons; "
                       "the first one is the base")  # fmt: skip
    group.add_argument("--grid", action="store_true", default=None, help="compare all combinations (default: change "
                       "one key of the base at a time)")  # fmt: skip
    group.add_argument("--seeds", metavar="N,...", help=f"training seeds of each variant (default: {_SEEDS})")
    group.add_argument("--stage", choices=("tokenizer", "transformer"), help="stage to train (default: transformer)")
    group.add_argument("--stage-2", nargs="?", const="", metavar="'FLAGS'", help="with --stage tokenizer: train a "
                       "transformer on each tokenizer, and measure its images, too; flags in quotes override its "
                       "recipe, such as --stage-2='--trainer.max_steps 200'")  # fmt: skip
    group.add_argument("--budget", metavar="UNIT[=N]", help="training of each variant: steps (of its recipe), steps=N, "
                       "or seconds=X of CPU or device, measured by a pilot (default: steps)")  # fmt: skip
    group.add_argument("--pilot-steps", type=int, metavar="N", help="steps of the pilot (default: 60)")
    group.add_argument("--name", metavar="NAME", help="name of the page (default: ablation-KEY)")
    group.add_argument("--page-only", action="store_true", default=None, help="make the page from the ledger, and "
                       "train and measure nothing")  # fmt: skip


def _run_ablation(args: argparse.Namespace) -> int:
    """Trains and measures what is missing, then writes the pages."""
    is_of_schedules = args.vary is None and args.recipes is None and not args.page_only
    wrong, wanted = (_OF_VARIANTS, "--vary or --recipes") if is_of_schedules else (_OF_SCHEDULES, "no --vary")
    for name in wrong:
        if getattr(args, name) is not None:
            raise ValueError(
                f"{format_flag(name)} must come with {wanted}, got it without; see maskgit ablation --help"
            )
    return _run_schedules(args) if is_of_schedules else _run_variants(args)


def _run_variants(args: argparse.Namespace) -> int:
    options = read_report_flags(args)
    factors = tuple(parse_factor(text) for text in args.vary or ())
    name = _read_name(args, factors)
    config = None
    if not args.page_only:
        if args.device is not None:  # checked before hours of training, like the recipes
            read_device_flag(args)
        config = _read_config(args, factors)
        if len(config.seeds) == 1:
            print("--seeds: with one seed, the spread is unknown, and no difference can be told from chance")
    with use_flag_names(args), progress_bars() as bars:
        page, failures = reports.ablation(config, options, name=name, command=_variant_command(args), bars=bars)
    write_page(page)
    if failures:
        listed = "; ".join(map(str, failures))
        raise AblationError(
            failures[0].exit_code,
            f"{len(failures)} runs failed, and the page has the others: {listed}. Repeat the command to try them again",
        )
    return 0


def _read_config(args: argparse.Namespace, factors: tuple[Factor, ...]) -> AblationConfig:
    sets = [""] if args.recipes is None else args.recipes.split(";")
    given = {"pilot_steps": args.pilot_steps, "stage": args.stage, "grid": args.grid}
    return AblationConfig(
        factors,
        tuple(" ".join(f"{args.recipe} {names}".split()) for names in sets),
        seeds=parse_integers("--seeds", args.seeds or _SEEDS),
        budget=parse_budget(args.budget or "steps"),
        dataset=args.dataset,
        cluster=args.cluster,
        overrides=args.overrides,
        runs=args.runs_folder,
        data=args.data,
        tokenizer=args.tokenizer,
        stage_2=None if args.stage_2 is None else tuple(shlex.split(args.stage_2)),
        **{name: value for name, value in given.items() if value is not None},
    )


def _read_name(args: argparse.Namespace, factors: tuple[Factor, ...]) -> str:
    """Returns the name of the page: ``--name``, else the last words of the varied keys."""
    if args.name is None:
        if not factors and args.recipes is None:
            raise ValueError("--page-only must come with --name, or with the --vary flags of the ablation")
        words = [*(["tokenizer"] if args.stage == "tokenizer" else []), *(["recipes"] if args.recipes else [])]
        return "-".join(["ablation", *words, *(factor.key.rpartition(".")[2] for factor in factors)])
    name = str(args.name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise ValueError(f"--name must be letters, digits and ._- only, got {name!r}")
    return name


def _variant_command(args: argparse.Namespace) -> str:
    """Returns the command that repeats an ablation of variants, for the page."""
    words = ["maskgit ablation", *(f"--vary {shlex.quote(text)}" for text in args.vary or ())]
    words += ["--grid"] if args.grid else []
    if args.stage_2 is not None:
        words.append(f"--stage-2={shlex.quote(args.stage_2)}" if args.stage_2 else "--stage-2")
    flags = {
        "recipes": args.recipes,
        "recipe": args.recipe or None,
        "dataset": args.dataset,
        "stage": args.stage,
        "seeds": args.seeds or _SEEDS,
        "budget": args.budget,
        "pilot_steps": args.pilot_steps,
        "name": args.name,
        "num_images": args.num_images,
        "seed": args.seed or None,
        "features": args.features,
        "reference": args.reference,
    }
    return " ".join([command_line(words, flags), shlex.join(args.overrides)]).rstrip()


def _run_schedules(args: argparse.Namespace) -> int:
    steps, options = read_num_steps_flag(args), read_report_flags(args)
    if args.device is not None:  # checked before hours of training, like the recipes
        read_device_flag(args)
    from maskgit_pl.evaluation.metrics import check_features

    check_features(options.features, options.reference, classifier=options.classifier)
    schedules = [name.strip() for name in (args.schedules or _SCHEDULES).split(",") if name.strip()]
    _check_numbers(args, schedules, options, steps)
    runs = train_schedules(
        schedules,
        names=args.recipe,
        dataset=args.dataset,
        cluster=args.cluster,
        overrides=args.overrides,
        runs=args.runs_folder,
        data=args.data,
        tokenizer=args.tokenizer,
    )
    with use_flag_names(args), progress_bars() as bars:
        page = reports.table_3(runs, options, num_steps=steps, command=_schedule_command(args), bars=bars)
    write_page(page)
    return 0


def _check_numbers(
    args: argparse.Namespace, schedules: Sequence[str], options: reports.ReportOptions, steps: Sequence[int] | None
) -> None:
    """Checks the numbers of images and steps, which classes and tokens limit, before hours of training."""
    from maskgit_pl.evaluation.options import PLOT_STEPS, choose_plot_steps
    from maskgit_pl.runs.resolve import merge_values

    words = {"dataset": args.dataset, "cluster": args.cluster, "overrides": args.overrides}
    first, *_ = [Recipe.read("transformer", names=f"{args.recipe} {name}", **words) for name in schedules]
    run = args.runs_folder / str(first.run_name)
    network = merge_values(plan_run(first, run=run, data=args.data, tokenizer=args.tokenizer))["model"]["network"]
    with use_flag_names(args):
        options.check_classes(network["num_classes"])
        choose_plot_steps(math.prod(network["grid"]), steps or PLOT_STEPS)


def _schedule_command(args: argparse.Namespace) -> str:
    """Returns the command that repeats an ablation of schedules, for the page."""
    flags = {
        "dataset": args.dataset,
        "schedules": None if args.schedules == _SCHEDULES else args.schedules,
        "recipe": args.recipe or None,
        "num_images": args.num_images,
        "num_steps": args.num_steps,
    }
    return " ".join([command_line(["maskgit ablation"], flags), shlex.join(args.overrides)]).rstrip()
