"""``maskgit tokenize``: encodes the images of a data set to a token store for stage 2."""

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
    parser.set_defaults(run=run, stage="transformer", takes_overrides=True)


def run(args: argparse.Namespace) -> int:
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
