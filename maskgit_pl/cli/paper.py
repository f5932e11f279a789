"""``maskgit table`` and ``maskgit figure``: the paper's tables and figures with our models, and one of tokenizers."""

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
from maskgit_pl.cli.flags import FOLDER, add_json_argument, check_at_least, check_outputs, format_flag, use_flag_names
from maskgit_pl.evaluation import reports
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.flag_values import parse_numbers

__all__ = ["add_paper_parser"]

_NUM_TOKENS = "16,64,256,1024"
_SIZES = {
    "depth": "number of layers",
    "embed_dim": "embedding dimension",
    "num_heads": "attention heads per layer",
    "mlp_dim": "hidden dimension of the MLPs",
    "codebook_size": "number of codes",
}


def add_paper_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both commands to ``maskgit``."""
    table = subparsers.add_parser(
        "table",
        help="write Table 1, 2 or 3 of the paper with our rows, or a table of tokenizers",
        description="Write a table of the paper as Markdown and CSV, with the rows of the paper and of the runs, and a "
        "sheet of images. 1: class-conditional generation. 2: outpainting and inpainting. 3: mask schedules, one run "
        "for each (`maskgit ablation` trains them). tokenizers: tokenizers side by side, without their transformers. "
        "Measurements that the ledger holds are reused.",
        epilog="Example: maskgit table 1 runs/fashion-mnist-adaln --num-images 2000",
    )
    table.add_argument(
        "number", choices=("1", "2", "3", "tokenizers"), help="number of the table in the paper, or tokenizers"
    )
    _add_runs(table)
    add_report_arguments(table)
    add_cas_arguments(table)
    table.add_argument(
        "--cas-images",
        type=int,
        metavar="N",
        help="number of images that the CAS network is trained on (default: --num-images)",
    )
    table.add_argument("--num-steps", metavar="T,...", help="decoding steps T of Table 3 (default: "
                       "2,3,4,6,8,12,16,24, at most half the tokens)")  # fmt: skip
    table.set_defaults(run=_run_table)

    figure = subparsers.add_parser(
        "figure",
        help="draw Figure 4 or 8 of the paper with our measurements",
        description="Draw a figure of the paper. 4: time per image of autoregressive decoding and of MaskGIT "
        "against the number of tokens, with random weights; a run sets the sizes of the networks. 8: mask "
        "schedules, and quality against the number of steps T, one run for each schedule.",
        epilog="Example: maskgit figure 4 --num-tokens 16,64,256",
    )
    figure.add_argument("number", type=int, choices=(4, 8), help="number of the figure in the paper")
    _add_runs(figure)
    add_report_arguments(figure)
    figure.add_argument("--num-steps", metavar="T,...", help="decoding steps T of Figure 8 (default: "
                        "2,3,4,6,8,12,16,24, at most half the tokens)")  # fmt: skip
    figure.add_argument("--num-tokens", metavar="N,...", default=_NUM_TOKENS,
                        help=f"tokens per image in Figure 4 (default: {_NUM_TOKENS})")  # fmt: skip
    sizes = figure.add_argument_group(
        "transformer of Figure 4", "Defaults are the sizes of the run, or of a network that is small enough for a CPU."
    )
    for name, text in _SIZES.items():
        sizes.add_argument(format_flag(name), type=int, metavar="N", help=text)
    figure.set_defaults(run=_run_figure)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders (runs/NAME) or pretrained folders"
    )


def _run_table(args: argparse.Namespace) -> int:
    """Measures what the ledger does not hold, and writes the table."""
    steps = read_num_steps_flag(args)
    check_at_least(args, cas_images=1)
    how = read_cas_flags(args)
    from maskgit_pl.evaluation import CASConfig

    # "none" skips the score, for which a network is trained.
    cas = None if args.cas_model == "none" else CASConfig(**how)
    options = read_report_flags(args, cas=cas, cas_images=args.cas_images)
    with use_flag_names(args), progress_bars() as bars:
        if args.number == "tokenizers":
            page = reports.compare_tokenizers(args.runs, options, bars=bars)
        elif args.number == "1":
            page = reports.table_1(args.runs, options, bars=bars)
        elif args.number == "2":
            page = reports.table_2(args.runs, options, bars=bars)
        else:
            page = reports.table_3(args.runs, options, num_steps=steps, bars=bars)
    write_page(page, as_json=args.json)
    return 0


def _run_figure(args: argparse.Namespace) -> int:
    """Measures what the ledger does not hold, and draws the figure."""
    if args.number == 8:
        steps, options = read_num_steps_flag(args), read_report_flags(args)
        with use_flag_names(args), progress_bars() as bars:
            page = reports.figure_8(args.runs, options, num_steps=steps, bars=bars)
    else:
        if len(args.runs) > 1:
            raise ValueError(f"figure 4 must have at most one RUN, which sets the sizes, got {len(args.runs)}")
        numbers = parse_numbers("--num-tokens", args.num_tokens)
        check_at_least(args, **dict.fromkeys(_SIZES, 1))
        check_outputs(args, results=FOLDER)
        # Sizes that are not given come from the run, or from a small default.
        sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
        timed = reports.TimingOptions(numbers, sizes, args.results, args.device)
        with use_flag_names(args), progress_bars() as bars:
            page = reports.figure_4(next(iter(args.runs), None), timed, bars=bars)
    write_page(page, as_json=args.json)
    return 0
