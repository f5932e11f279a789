"""``maskgit table`` and ``maskgit figure``: the paper's tables and figures with our rows in them."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.evaluation_flags import (
    add_cas_arguments,
    add_report_arguments,
    read_cas_flags,
    read_num_steps_flag,
    read_report_flags,
    write_page,
)
from maskgit_pl.cli.flags import check_at_least, format_flag, use_flag_names
from maskgit_pl.evaluation import reports
from maskgit_pl.flag_values import parse_numbers
from maskgit_pl.progress import progress_bars

__all__ = ["add_parser", "run_figure", "run_table"]

_NUM_TOKENS = "16,64,256,1024"
_SIZES = ("depth", "embed_dim", "num_heads", "mlp_dim", "codebook_size")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both commands to ``maskgit``."""
    table = subparsers.add_parser(
        "table",
        help="the paper's Table 1, 2 or 3 with our rows",
        description="Measure what a table of the paper needs and is not in the ledger yet; write the table as Markdown "
        "and CSV, with the paper's rows, and a sheet of images. 1: class-conditional generation. 2: outpainting and "
        "inpainting. 3: mask schedules, a run for each (`maskgit ablation` trains them).",
    )
    table.add_argument("number", type=int, choices=(1, 2, 3), help="of the table")
    _add_runs(table)
    add_report_arguments(table)
    add_cas_arguments(table)
    table.add_argument("--cas-images", type=int, metavar="N", help="images it is trained on (default: as --num-images)")
    table.add_argument("--num-steps", metavar="T,...", help="of Table 3 (default: 2,3,4,6,8,12,16,24, up to N/2)")
    table.set_defaults(run=run_table)

    figure = subparsers.add_parser(
        "figure",
        help="the paper's Figure 4 or 8 with our measurements",
        description="Draw a figure of the paper. 4: time of an image, autoregressive decoding against MaskGIT, by the "
        "number of tokens, in networks of random weights; a run gives its sizes. 8: mask schedules, and quality "
        "against T, a run for each.",
    )
    figure.add_argument("number", type=int, choices=(4, 8), help="of the figure")
    _add_runs(figure)
    add_report_arguments(figure)
    figure.add_argument("--num-steps", metavar="T,...", help="of Figure 8 (default: 2,3,4,6,8,12,16,24, up to N/2)")
    figure.add_argument("--num-tokens", metavar="N,...", default=_NUM_TOKENS, help="of Figure 4 (default: "
                        f"{_NUM_TOKENS})")  # fmt: skip
    for name in _SIZES:
        figure.add_argument(format_flag(name), type=int, metavar="N", help="of Figure 4's transformer "
                            "(default: the run's, or one small enough for a CPU)")  # fmt: skip
    figure.set_defaults(run=run_figure)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders (runs/NAME) or pretrained folders"
    )


def run_table(args: argparse.Namespace) -> int:
    """Measures what is missing, and writes the table."""
    steps = read_num_steps_flag(args)
    check_at_least(args, cas_images=1)
    how = read_cas_flags(args)
    from maskgit_pl.evaluation import CASConfig

    cas = None if args.cas_model == "none" else CASConfig(**how)
    options = read_report_flags(args, cas=cas, cas_images=args.cas_images)
    with use_flag_names(args), progress_bars() as bars:
        if args.number == 1:
            page = reports.table_1(args.runs, options, bars=bars)
        elif args.number == 2:
            page = reports.table_2(args.runs, options, bars=bars)
        else:
            page = reports.table_3(args.runs, options, num_steps=steps, bars=bars)
    write_page(page)
    return 0


def run_figure(args: argparse.Namespace) -> int:
    """Measures what is missing, and draws."""
    if args.number == 8:
        steps, options = read_num_steps_flag(args), read_report_flags(args)
        with use_flag_names(args), progress_bars() as bars:
            page = reports.figure_8(args.runs, options, num_steps=steps, bars=bars)
    else:
        if len(args.runs) > 1:
            raise ValueError(f"figure 4 must have at most one run, whose sizes are timed, got {len(args.runs)}")
        numbers = parse_numbers("--num-tokens", args.num_tokens)
        check_at_least(args, **dict.fromkeys(_SIZES, 1))
        sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
        timed = reports.TimingOptions(numbers, sizes, args.results, args.device)
        with use_flag_names(args), progress_bars() as bars:
            page = reports.figure_4(next(iter(args.runs), None), timed, bars=bars)
    write_page(page)
    return 0
