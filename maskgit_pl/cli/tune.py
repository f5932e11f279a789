"""``maskgit tune``: searches for a better way to decode a model, and writes it beside the weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.measuring import (
    Bars,
    add_run_arguments,
    check_wanted,
    decoding_specs,
    default_steps,
    find_run,
    flag_words,
    open_data,
    open_model,
    plain_protocol,
    progress_bars,
    ready,
    step_numbers,
)
from maskgit_pl.cli.model import check_at_least, naming_flags

if TYPE_CHECKING:
    from maskgit_pl.cli.measuring import Judge, RunFolders
    from maskgit_pl.data import ShardData
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.evaluation.decoders.schedule_curves import Figure8
    from maskgit_pl.evaluation.decoders.search_space import SearchSpace
    from maskgit_pl.evaluation.decoders.tuning import Found, Meter, Trial
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["add_parser", "run"]

_STEPS = (4, 6, 8, 12, 16)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "tune",
        help="search for a better way to decode a model",
        description="Search token selector, temperature, truncation, guidance and T on the val split; confirm the best "
        "with fresh noise; write decoding.json beside the weights, which every command uses from then on, and a page "
        "and a figure. A command that was stopped goes on where it was.",
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument("--trials", type=int, default=40, metavar="N", help="trials at most (default: 40)")
    parser.add_argument("--seconds", type=float, metavar="S", help="no further trial after so many (default: no limit)")
    parser.add_argument(
        "--metric", default="fid", help="fid, kid (in the features of the data's own classifier) or agreement "
        "(default: fid)",
    )  # fmt: skip
    parser.add_argument("--search", default="random", help="random or grid (default: random)")
    parser.add_argument(
        "--num-steps", "--steps", metavar="T,...", help="T to choose from, or a range (default: 4,6,8,12,16)"
    )
    parser.add_argument(
        "--selectors",
        default="all",
        metavar="A,B,...",
        help="names, or mappings such as '{name: remdm, strategy: loop}', whose arguments then stay (default: all)",
    )
    parser.add_argument("--num-images", type=int, default=500, metavar="N", help="images of a trial (default: 500)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="trials, page and figure (default: RUN/tuning)")
    parser.add_argument(
        "--plot-images", type=int, metavar="N", help="images of a point of the figure (default: as of a trial)"
    )
    parser.add_argument("--no-plot", action="store_true", help="without the figure, which takes longer than the search")
    parser.add_argument("--dry-run", action="store_true", help="print what would be tried, and end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Searches, confirms, writes, draws.

    Raises:
        FileNotFoundError: No such run or data.
        TypeError: A selector does not take its arguments.
        ValueError: An unknown name, a sequential model, data that are not the model's, a foreign ledger, or a number
            out of range.
    """
    numbers = None if args.num_steps is None else step_numbers(args.num_steps)
    wanted = None if args.selectors == "all" else decoding_specs("--selectors", args.selectors)
    _check_numbers(args)
    folders = find_run(args)
    with naming_flags(args):
        check_wanted(folders, "tune", numbers=numbers, selectors=wanted)
    from maskgit_pl.evaluation.decoders.search_space import check_search
    from maskgit_pl.evaluation.decoders.tuning import key_of

    key_of(args.metric)
    check_search(args.search)
    pipe = open_model(folders, args)
    space = _space(pipe, wanted, numbers)
    if args.dry_run:
        _print_trials(space, args)
        return 0
    data = open_data(folders, pipe)
    _check_images(args, data)
    _tune(folders, pipe, data, space, args, out=args.out or folders.home / "tuning")
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    check_at_least(args, trials=1, num_images=2, plot_images=2, batch=1)
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds: more than 0 is needed, got {args.seconds}")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed: a number in [0, 2**31) is needed, got {args.seed}")


def _check_images(args: argparse.Namespace, data: ShardData) -> None:
    """Refuses too few images before the classifier is trained."""
    from maskgit_pl.evaluation.protocol import Protocol

    for count in (args.num_images, args.plot_images or args.num_images):
        Protocol(count, seed=args.seed, batch_size=args.batch).labels(data.num_classes)


def _space(pipe: MaskGIT, wanted: list[Any] | None, numbers: tuple[int, ...] | None) -> SearchSpace:
    from maskgit_pl.evaluation.decoders.comparison import every_selector
    from maskgit_pl.evaluation.decoders.search_space import SearchSpace
    from maskgit_pl.evaluation.protocol import check_decoding

    space = SearchSpace(
        pipe.decoding,
        tuple(spec for _, spec in every_selector()) if wanted is None else tuple(wanted),
        numbers or default_steps(pipe, _STEPS),
        pipe.tokenizer.network.config.num_codes,
        guided=pipe.transformer.network.config.null_label is not None,
    )
    for decoding in space.corners():
        check_decoding(pipe, decoding)
    return space


def _print_trials(space: SearchSpace, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from maskgit_pl.evaluation.decodings import describe_decoding

    table = Table(title=f"what would be tried, {args.num_images} images each")
    table.add_column("trial", justify="right")
    table.add_column("decoding")
    for number in range(args.trials):
        decoding = space.trial(number, seed=args.seed, how=args.search)
        if decoding is None:
            break
        table.add_row(str(number), describe_decoding(decoding))
    Console().print(table)


def _tune(
    folders: RunFolders, pipe: MaskGIT, data: ShardData, space: SearchSpace, args: argparse.Namespace, *, out: Path
) -> None:
    from maskgit_pl.evaluation.decoders.schedule_curves import draw_curves
    from maskgit_pl.evaluation.decoders.trials import Ledger
    from maskgit_pl.evaluation.decoders.tuning import Meter, key_of
    from maskgit_pl.evaluation.decoders.tuning_report import as_markdown
    from maskgit_pl.files import write_atomically

    key = key_of(args.metric)
    with progress_bars() as bars:
        judge = ready(folders, pipe, data, bars, num_images=2 * args.num_images)
        ledger = Ledger(out / "trials.jsonl", plain_protocol(folders, pipe, data, judge, batch_size=args.batch))
        space = space.resumed(ledger, trials=args.trials, seed=args.seed, how=args.search)
        meter = Meter(pipe, judge.classifier, judge.real, ledger, batch_size=args.batch)
        found = _search(meter, space, args, key, bars, current=pipe.decoding)
        _print_found(found, key)
        _write_recipe(folders.pretrained, pipe, data, found, args, key)
        figure = None if args.no_plot else _figure(pipe, meter, found, args, key, bars)
    page = as_markdown(
        found,
        key=key,
        command=_command(args),
        floor=judge.floor,
        accuracy=judge.real.accuracy,
        num_images=args.num_images,
        figure=figure,
    )
    with write_atomically(out / "tuning.md") as stream:
        stream.write(page.encode())
    if figure is not None:
        draw_curves(figure, out / "tuning.png", key=key, floor=_floor(judge, data, figure, key))
    print(f"{out}: {meter.measured} measured now; trials.jsonl, tuning.md" + (" and tuning.png" if figure else ""))


def _search(
    meter: Meter, space: SearchSpace, args: argparse.Namespace, key: str, bars: Bars, *, current: DecodingConfig
) -> Found:
    from maskgit_pl.evaluation.decoders.tuning import search
    from maskgit_pl.evaluation.decodings import describe_decoding

    advance = bars("trials", args.trials + 4)  # and the confirmation

    def on_trial(trial: Trial) -> None:
        advance(1)
        print(f"trial {trial.number:3d}  {key} {trial.numbers[key]:8.4f}  {describe_decoding(trial.decoding)}")

    return search(
        meter,
        space,
        key=key,
        trials=args.trials,
        num_images=args.num_images,
        seed=args.seed,
        how=args.search,
        seconds=args.seconds,
        current=current,
        on_trial=on_trial,
    )


def _print_found(found: Found, key: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from maskgit_pl.evaluation.decoders.comparison import in_two_lines
    from maskgit_pl.evaluation.decodings import describe_decoding

    table = Table(title=f"measured again with fresh noise, {found.num_images} images each", box=SIMPLE, padding=0)
    for column in ("trial", "decoding", key, "agreement %", "diversity", "ms an image"):
        table.add_column(in_two_lines(column), justify="left" if column == "decoding" else "right")
    for trial in found.confirmed:
        numbers = trial.numbers
        table.add_row(
            str(trial.number),
            describe_decoding(trial.decoding),
            f"{numbers[key]:.4f}",
            f"{100 * numbers['class_agreement']:.1f}",
            f"{numbers['diversity']:.2f}",
            f"{1000 * numbers['seconds_per_image']:.1f}",
            style="bold" if trial.number == found.winner.number else "",
        )
    Console().print(table)


def _write_recipe(
    folder: Path, pipe: MaskGIT, data: ShardData, found: Found, args: argparse.Namespace, key: str
) -> None:
    from maskgit_pl.pipeline.card import refresh_card
    from maskgit_pl.pretrained import save_decoding
    from maskgit_pl.provenance import describe_environment

    if found.winner.decoding == pipe.decoding:
        print(f"the model is decoded in the best way of {len(found.trials)} trials already: nothing is changed")
        return
    tuned = {
        "metric": key,
        "value": found.winner.numbers[key],
        "before": found.before.numbers[key],
        "trials": len(found.trials),
        "search": args.search,
        "num_images": found.num_images,
        "seed": found.seed,
        "data": data.summary.fingerprint,
        "split": "val",
        "commit": describe_environment()["commit"],
    }
    old = save_decoding(folder, found.winner.decoding, tuned=tuned)
    refresh_card(folder)
    kept = f"; the one before is kept as {old.name}" if old is not None else ""
    print(f"{folder / 'decoding.json'}: how this model is decoded from now on{kept}")


def _figure(
    pipe: MaskGIT, meter: Meter, found: Found, args: argparse.Namespace, key: str, bars: Bars
) -> Figure8 | None:
    from maskgit_pl.evaluation.decoders.schedule_curves import (
        Figure8,
        following,
        plot_steps,
        schedule_curves,
        schedule_specs,
    )
    from maskgit_pl.evaluation.decodings import describe_decoding

    num_tokens, num_images = pipe.tokenizer.grid[0] * pipe.tokenizer.grid[1], args.plot_images or args.num_images
    trial = following(found, key)
    if trial is None:
        print("no trial follows a mask schedule: no figure is drawn")
        return None
    trained_with = pipe.transformer.schedule_for("tune")
    _, specs = schedule_specs(trained_with)
    advance = bars("mask schedules", len(specs) * sum(plot_steps(num_tokens)))
    trained, curves = schedule_curves(
        meter,
        trial.decoding,
        trained_with,
        num_tokens=num_tokens,
        num_images=num_images,
        seed=args.seed,
        on_point=advance,
    )
    return Figure8(curves, trained, describe_decoding(trial.decoding, steps=False), num_images)


def _floor(judge: Judge, data: ShardData, figure: Figure8, key: str) -> float | None:
    from maskgit_pl.evaluation.protocol import real_floor

    floor = real_floor(judge.classifier, data, judge.real, num_images=figure.num_images)
    return {"fid/classifier": floor.fid, "kid/classifier": floor.kid, "class_agreement": judge.real.accuracy}[key]


def _command(args: argparse.Namespace) -> str:
    """What makes the same search again."""
    words = ["maskgit tune", str(args.folder), f"--trials {args.trials} --metric {args.metric}"]
    words += [f"--num-images {args.num_images} --seed {args.seed}"]
    given = {"seconds": args.seconds, "num_steps": args.num_steps, "plot_images": args.plot_images}
    given |= {"selectors": None if args.selectors == "all" else args.selectors}
    given |= {"search": None if args.search == "random" else args.search}
    return " ".join([*words, *flag_words(given)])
