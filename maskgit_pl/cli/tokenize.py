"""``maskgit tokenize``: turns the images of a data set into a token store for stage 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from maskgit_pl.cli.run_flags import add_run_arguments, read_folder_flags, read_recipe_flags
from maskgit_pl.progress import Bars, progress_bars
from maskgit_pl.runs.tokenizing import OnRows, ProcessRank, TokenizeOptions, find_process_rank, tokenize

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "tokenize",
        help="turn images into tokens, once",
        description="Turn images into tokens, once. The same command resumes what was interrupted. Under torchrun "
        "and srun the processes share the work; elsewhere --rank and --world-size say so. Flags that set values of the "
        "recipe are taken as by `maskgit train transformer`.",
    )
    add_run_arguments(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: what there is)")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time (default: 256)")
    parser.add_argument(
        "--num-workers", type=int, help="processes that decode (default: none on a CPU, at most 8 beside a GPU)"
    )
    parser.add_argument("--crops", type=int, help="crops of each image, the central one first (default: 1)")
    parser.add_argument("--flip", action="store_true", default=None, help="add a mirrored copy of each training image")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of the tokenizer (default: float32)")
    parser.add_argument(
        "--part-size", type=int, default=1024, help="images put on disk at a time: what a kill costs (default: 1024)"
    )
    parser.add_argument(
        "--unreadable-budget", type=float, default=1e-4, help="share of unreadable images allowed (default: 1e-4)"
    )
    parser.add_argument("--rank", type=int, help="which of the processes that share the work this is, from 0")
    parser.add_argument("--world-size", type=int, help="how many processes share the work")
    parser.set_defaults(run=run, stage="transformer", takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Makes the token store of a run, with bars."""
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
    """Returns what shows a bar for each split."""
    name = "" if process.world_size == 1 else f"rank {process.rank} of {process.world_size}: "
    shown: dict[str, Callable[[int], None]] = {}

    def on_rows(split: str, rows: int, total: int) -> None:
        if split in shown:
            shown[split](rows)
        else:  # what an earlier run has done
            shown[split] = bars(f"{name}tokens of {split}", total, done=rows, unit="images")

    return on_rows
