"""``maskgit compare``: every token selector on one model, with the same noise, as tables and a sheet of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.measuring import (
    Bars,
    add_run_arguments,
    check_wanted,
    decoding_spec,
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
from maskgit_pl.cli.model import naming_flags

if TYPE_CHECKING:
    from maskgit_pl.cli.measuring import Judge, RunFolders
    from maskgit_pl.data import ShardData
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.evaluation.decoders.comparison import Contender, Rows
    from maskgit_pl.evaluation.protocol import Protocol
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["add_parser", "run"]

_STEPS = (4, 8, 16, 32)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "compare",
        help="measure every token selector on one model",
        description="Measure token selectors at several numbers of steps, with the same noise for all; write "
        "comparison.json, .md and .csv and a sheet of images. What was measured before is not measured again.",
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--selectors",
        default="all",
        metavar="A,B,...",
        help="names, or mappings such as '{name: remdm, eta: 0.4}', separated by commas (default: all, remdm with each "
        "strategy); names take the model's own choice temperature",
    )
    parser.add_argument(
        "--num-steps",
        "--steps",
        metavar="T,...",
        help="decoding steps, or a range (default: 4,8,16,32, as far as there are tokens)",
    )
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="images a row (default: 1000)")
    parser.add_argument(
        "--guidance", metavar="S", help="a scale, or name or mapping of a guidance schedule (default: the model's own)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results are kept (default: RUN/comparison)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures what was not measured yet, writes, and prints a table.

    Raises:
        FileNotFoundError: No such run or data.
        TypeError: A selector or a guidance schedule does not take its arguments.
        ValueError: An unknown name, a sequential model, data that are not the model's, or a number out of range.
    """
    numbers = None if args.num_steps is None else step_numbers(args.num_steps)
    wanted = None if args.selectors == "all" else decoding_specs("--selectors", args.selectors)
    guidance = None if args.guidance is None else decoding_spec("--guidance", args.guidance)
    folders = find_run(args)
    with naming_flags(args):
        check_wanted(folders, "compare", numbers=numbers, selectors=wanted)
    from maskgit_pl.evaluation.decoders.comparison import contenders
    from maskgit_pl.evaluation.decodings import with_steps
    from maskgit_pl.evaluation.protocol import Protocol, check_decoding

    protocol = Protocol(args.num_images, seed=args.seed, batch_size=args.batch)
    pipe = open_model(folders, args)
    base = _with_guidance(pipe, guidance)
    work = []
    # the quick ones first: what was measured when a person looks is of use
    for number in sorted(numbers or default_steps(pipe, _STEPS)):
        for contender in contenders(wanted, pipe.decoding.token_selector):
            decoding = with_steps(_with_selector(base, contender), number)
            check_decoding(pipe, decoding)
            work.append((contender.label, decoding))
    data = open_data(folders, pipe)
    protocol.labels(data.num_classes)  # refuses too few images before the classifier is trained
    _compare(folders, pipe, data, protocol, work, out=args.out or folders.home / "comparison", command=_command(args))
    return 0


def _with_guidance(pipe: MaskGIT, guidance: Any) -> DecodingConfig:
    if isinstance(guidance, int | float):
        return pipe.decoding_with(guidance_scale=float(guidance))
    return pipe.decoding_with(guidance=guidance)


def _with_selector(decoding: DecodingConfig, contender: Contender) -> DecodingConfig:
    from dataclasses import replace

    return replace(decoding, token_selector=contender.token_selector, tokens_per_step=None)


def _compare(
    folders: RunFolders,
    pipe: MaskGIT,
    data: ShardData,
    protocol: Protocol,
    work: list[tuple[str, DecodingConfig]],
    *,
    out: Path,
    command: str,
) -> None:
    from rich.console import Console

    from maskgit_pl.evaluation.decoders.comparison import Rows, as_csv, as_markdown, as_table
    from maskgit_pl.files import write_atomically
    from maskgit_pl.provenance import describe_environment

    with progress_bars() as bars:
        judge = ready(folders, pipe, data, bars, num_images=len(protocol.labels(data.num_classes)))
        rows = Rows(
            out / "comparison.json",
            plain_protocol(folders, pipe, data, judge, batch_size=protocol.batch_size)
            | {"num_images": len(protocol.labels(data.num_classes)), "seed": protocol.seed},
            {"real": _real(judge), "environment": describe_environment()},
        )
        new = [(label, decoding) for label, decoding in work if rows.find(decoding) is None]
        _measure(pipe, judge, protocol, new, rows, bars)
        _write_sheet(pipe, rows, protocol, out / "selectors.png", bars)
    for name, text in (
        ("comparison.md", as_markdown(rows.content, command=command)),
        ("comparison.csv", as_csv(rows.content)),
    ):
        with write_atomically(out / name) as stream:
            stream.write(text.encode())
    Console().print(as_table(rows.content))
    known = len(work) - len(new)
    print(f"{out}: {len(new)} rows measured, {known} known before; comparison.json, .md and .csv, and selectors.png")


def _measure(
    pipe: MaskGIT,
    judge: Judge,
    protocol: Protocol,
    work: list[tuple[str, DecodingConfig]],
    rows: Rows,
    bars: Bars,
) -> None:
    from maskgit_pl.evaluation.protocol import measure_decoding
    from maskgit_pl.provenance import describe_environment

    commit = describe_environment()["commit"]
    batches = -(-len(protocol.labels(len(pipe.class_names))) // protocol.batch_size)
    advance = bars("sampling", sum(decoding.num_steps for _, decoding in work) * batches)
    for label, decoding in work:
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            advance(1)

        measured = measure_decoding(pipe, judge.classifier, judge.real, protocol, decoding, on_step=on_step)
        advance(decoding.num_steps * batches - done)  # a selector may end early
        rows.add(label, decoding, measured.numbers(), commit=commit)


def _real(judge: Judge) -> dict[str, Any]:
    floor = judge.floor
    return {
        "accuracy": judge.real.accuracy,
        "images": len(judge.real.labels),
        "real_against_real": {"fid/classifier": floor.fid, "kid/classifier": floor.kid, "images": floor.images},
    }


def _write_sheet(pipe: MaskGIT, rows: Rows, protocol: Protocol, path: Path, bars: Bars) -> None:
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.evaluation.decoders.comparison import selector_sheet, sheet_steps
    from maskgit_pl.imaging import save_png

    number = sheet_steps(rows.rows)
    decodings = {row["selector"]: DecodingConfig(**row["decoding"]) for row in rows.rows if row["num_steps"] == number}
    advance = bars("sheet of images", len(decodings))
    save_png(selector_sheet(pipe, decodings, seed=protocol.seed, on_row=lambda: advance(1)), path)


def _command(args: argparse.Namespace) -> str:
    """What makes the same comparison again."""
    words = ["maskgit compare", str(args.folder), f"--num-images {args.num_images} --seed {args.seed}"]
    given = {"selectors": None if args.selectors == "all" else args.selectors, "num_steps": args.num_steps}
    return " ".join([*words, *flag_words({**given, "guidance": args.guidance})])
