"""``maskgit data``: make shards from images, or index shards that are there.

Imported to build the parser, so torch, PIL and webdataset are imported by the commands alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskgit_pl.shards.manifest import DataSummary, Split
    from maskgit_pl.shards.sources import Source

__all__ = ["add_parser", "make", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data make`` and ``data index``."""
    parser = subparsers.add_parser("data", help="make and index shards", allow_abbrev=False)
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_make(commands)
    _add_index(commands)


def _add_make(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    make = commands.add_parser(
        "make", help="image folders or IDX files -> shards with train and val splits", allow_abbrev=False
    )
    make.add_argument("source", type=Path, metavar="SOURCE", help="folder: one sub-folder a class, or IDX files")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="data folder to make")
    make.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F", help="val share of a tree without val/ (default 0.1)"
    )
    make.add_argument(
        "--size", type=int, metavar="PIXELS", help="crop to a square and resize (default: keep the files)"
    )
    make.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="samples a shard (default 10000)")
    make.add_argument("--class-names", metavar="A,B,...", help="names of the classes of IDX files, in order")


def _add_index(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    index = commands.add_parser("index", help="manifests for WebDataset tars made elsewhere", allow_abbrev=False)
    index.add_argument("folder", type=Path, metavar="DIR", help="folder of tars; manifests are written into it")
    index.add_argument("--train", default="train-*.tar", metavar="PATTERN", help="tars of train (default train-*.tar)")
    index.add_argument("--val", default="val-*.tar", metavar="PATTERN", help="tars of val (default val-*.tar)")
    index.add_argument("--class-names", metavar="A,B,...", help="names of the classes, in order (default: numbers)")


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed.

    Raises:
        ValueError: The source, the folder or a shard is not what is needed; the text says what to change.
        FileNotFoundError: It is not there.
    """
    names = args.class_names.split(",") if args.class_names else None
    if args.data_command == "index":
        _index(args.folder, {"train": args.train, "val": args.val}, names)
    else:
        from maskgit_pl.shards.sources import open_source

        source = open_source(args.source, classes=names, val_fraction=args.val_fraction)
        make(source, args.out, size=args.size, shard_size=args.shard_size)
    return 0


def make(source: Source, out: Path, *, size: int | None = None, shard_size: int = 10_000) -> None:
    """Make a data folder with a progress bar, and say what it holds; the scripts in ``data/`` end here too."""
    from maskgit_pl.shards.manifest import read_manifest_summary
    from maskgit_pl.shards.writer import make_shards

    with _progress(source.counts, "samples") as advance:
        made = make_shards(source, out, size=size, shard_size=shard_size, on_sample=advance)
    _report(out, read_manifest_summary(out), "made" if made else "there already, nothing to do")


def _index(folder: Path, patterns: dict[Split, str], names: list[str] | None) -> None:
    from maskgit_pl.shards.index import find_shards, index_shards
    from maskgit_pl.shards.manifest import read_manifest_summary

    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder}: no such folder")
    shards = {split: find_shards(folder, pattern) for split, pattern in patterns.items()}
    with _progress({split: len(paths) for split, paths in shards.items()}, "shards") as advance:
        index_shards(folder, shards, classes=names, on_shard=advance)
    _report(folder, read_manifest_summary(folder), "indexed")


@contextmanager
def _progress(totals: Mapping[Split, int], unit: str) -> Iterator[Callable[[Split], None]]:
    """One bar a split; yields what advances a split's bar by one."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    done: Counter[Split] = Counter()
    with Progress(*columns, transient=True) as progress:
        bars = {split: progress.add_task(f"{split} {unit}", total=total) for split, total in totals.items()}

        def advance(split: Split) -> None:
            done[split] += 1
            if done[split] % 100 == 0 or done[split] == totals[split]:  # an update costs more than a small image
                progress.update(bars[split], completed=done[split])

        yield advance


def _report(folder: Path, summary: DataSummary, what: str) -> None:
    heights, widths = summary.images.height, summary.images.width
    counts = ", ".join(f"{count} {split}" for split, count in summary.samples.items())
    size = " x ".join(str(low) if low == high else f"{low}-{high}" for low, high in (heights, widths))
    colour = "grey" if summary.channels == 1 else "colour"
    print(f"{folder}: {what}: {counts}; {summary.num_classes} classes; {size} pixels, {colour}")
