"""``maskgit data``: make shards from images, index shards that are there, verify them, count what they hold.

Imported to build the parser, so torch, PIL and webdataset are imported by the commands alone.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.outputs import check_outputs
from maskgit_pl.files import size_text
from maskgit_pl.locks import locked
from maskgit_pl.text import printable

if TYPE_CHECKING:
    from maskgit_pl.shards.index import Indexed
    from maskgit_pl.shards.manifest import DataSummary, Split
    from maskgit_pl.shards.sources import Source
    from maskgit_pl.shards.stats import DataStatistics
    from maskgit_pl.shards.verify import BadFile

__all__ = ["add_parser", "make", "run"]

_Parsers = argparse._SubParsersAction
_BAD_INPUT = 2
_MOST_ROWS = 40  # classes of a contact sheet
_SHEET_COLUMNS = 8
_SHEET_SIDE = 84  # pixels of an image in it, at most
_MAX_NAMES_BYTES = 2**24


def add_parser(subparsers: _Parsers[argparse.ArgumentParser]) -> None:
    """Add ``data make``, ``data index``, ``data verify`` and ``data stats``."""
    parser = subparsers.add_parser(
        "data", help="make, index and verify shards, and show what is in them", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    for add in (_add_make, _add_index, _add_verify, _add_stats):
        add(commands)


def _add_make(commands: _Parsers[argparse.ArgumentParser]) -> None:
    make = commands.add_parser(
        "make", help="image folders, IDX or parquet files -> shards with train and val splits", allow_abbrev=False
    )
    make.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder: one sub-folder a class, or IDX files, or parquet files"
    )
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="data folder to make")
    make.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F", help="val share of a source without val (default 0.1)"
    )
    make.add_argument(
        "--size", type=int, metavar="PIXELS", help="crop to a square and resize (default: keep the files)"
    )
    make.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="samples a shard (default 10000)")
    make.add_argument(
        "--label-field", default="label", metavar="NAME", help="parquet column of the class numbers (default label)"
    )
    make.add_argument("--lenient", action="store_true", help="leave out images that cannot be read, and list them")
    _add_class_names(make, "where the source has none")
    _add_workers(make)


def _add_index(commands: _Parsers[argparse.ArgumentParser]) -> None:
    index = commands.add_parser("index", help="manifests for WebDataset tars made elsewhere", allow_abbrev=False)
    index.add_argument(
        "shards", metavar="DIR|PATTERN", help="folder of tars, or a glob or brace expression of them, in quotes"
    )
    index.add_argument("--train", metavar="PATTERN", help="tars of train, in the folder (default: those not val)")
    index.add_argument("--val", metavar="PATTERN", help="tars of val (default: those whose names say val or test)")
    index.add_argument(
        "--val-fraction", type=float, metavar="F", help="share of the tars that become val, the last ones (default 0.1)"
    )
    labels = index.add_mutually_exclusive_group()
    labels.add_argument("--label-field", metavar="NAME", help="labels from this field of .json (default: from .cls)")
    labels.add_argument("--no-labels", action="store_true", help="one class for all images")
    index.add_argument("--lenient", action="store_true", help="leave samples with a fault out, and count them")
    _add_class_names(index, "default: numbers")
    _add_workers(index)


def _add_verify(commands: _Parsers[argparse.ArgumentParser]) -> None:
    verify = commands.add_parser(
        "verify", help="read all shards, or all of a token store, and name each file that is bad", allow_abbrev=False
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="data folder, or token store")
    verify.add_argument("--decode", action="store_true", help="decode every image too")
    _add_workers(verify)


def _add_stats(commands: _Parsers[argparse.ArgumentParser]) -> None:
    stats = commands.add_parser("stats", help="classes, sizes and bytes of a data folder", allow_abbrev=False)
    stats.add_argument("folder", type=Path, metavar="DIR", help="data folder")
    stats.add_argument("--out", type=Path, metavar="PNG", help="draw a few images of each class")


def _add_class_names(parser: argparse.ArgumentParser, when: str) -> None:
    parser.add_argument(
        "--class-names", metavar="A,B,...|FILE", help=f"names of the classes in order, or a file of one a line ({when})"
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one a core, fewer for little data)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed.

    Raises:
        ValueError: The source, the folder or a shard is not what is needed; the text says what to change.
        FileNotFoundError: It is not there.
    """
    commands = {"make": _make, "index": _index, "verify": _verify, "stats": _stats}
    return commands[args.data_command](args)


def make(
    source: Source,
    out: Path,
    *,
    size: int | None = None,
    shard_size: int = 10_000,
    lenient: bool = False,
    workers: int | None = 1,
) -> None:
    """Make a data folder with a progress bar, and say what it holds; the scripts in ``data/`` end here too."""
    from maskgit_pl.shards.manifest import read_manifest_summary
    from maskgit_pl.shards.writer import make_shards

    with locked(out, way_out="give another --out"), _progress(source.counts, "samples") as advance:
        made = make_shards(
            source,
            out,
            size=size,
            shard_size=shard_size,
            lenient=lenient,
            workers=_workers(workers, work=sum(source.counts.values()) / 5_000),
            on_samples=advance,
        )
    _report(out, read_manifest_summary(out), "made" if made else "there already, nothing to do")
    for line in [*source.left_out, *_unreadable(out)]:
        print(f"  left out: {line}")


def _make(args: argparse.Namespace) -> int:
    from maskgit_pl.shards.sources import open_source

    source = open_source(
        args.source,
        classes=_class_names(args.class_names),
        val_fraction=args.val_fraction,
        label_field=args.label_field,
    )
    make(
        source,
        args.out,
        size=args.size,
        shard_size=args.shard_size,
        lenient=args.lenient,
        workers=args.workers,
    )
    return 0


def _unreadable(folder: Path) -> Iterator[str]:
    """A line on the images that ``data make --lenient`` left out, if there are any."""
    from maskgit_pl.shards.writer import LEFT_OUT

    if (folder / LEFT_OUT).is_file():
        with open(folder / LEFT_OUT, "rb") as file:
            yield f"{sum(1 for _ in file)} images that cannot be read, listed in {LEFT_OUT}"


def _index(args: argparse.Namespace) -> int:
    from maskgit_pl.shards.index import index_shards, locate_shards, split_shards
    from maskgit_pl.shards.manifest import read_manifest_summary

    folder, found = locate_shards(args.shards)
    shards, how = split_shards(folder, found, train=args.train, val=args.val, val_fraction=args.val_fraction)
    names = _class_names(args.class_names) or (None if args.no_labels else _names_before(folder))
    labels = "none" if args.no_labels else f"json:{args.label_field}" if args.label_field else "cls"
    with _progress({split: len(paths) for split, paths in shards.items()}, "shards") as advance:
        indexed = index_shards(
            folder,
            shards,
            classes=names,
            labels=labels,
            lenient=args.lenient,
            workers=_workers(args.workers, work=sum(path.stat().st_size for path in found) / 2**28),
            on_shard=lambda split: advance(split, 1),
        )
    _report(folder, read_manifest_summary(folder), "indexed")
    if names is not None and args.class_names is None:
        print("  class names: those of the manifest that was there")
    _report_splits(folder, shards, how)
    _report_left_out(indexed)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from maskgit_pl.shards.manifest import load_manifest, splits_of
    from maskgit_pl.shards.tokens import is_store
    from maskgit_pl.shards.verify import verify_shards

    if is_store(args.folder):
        return _verify_store(args.folder, decode=args.decode)
    splits = splits_of(args.folder) or ("train",)
    totals = {split: len(load_manifest(args.folder, split, check=False).shards) for split in splits}
    with _progress(totals, "shards") as advance:
        found = verify_shards(
            args.folder,
            decode=args.decode,
            workers=_workers(args.workers, work=_lengths(args.folder) / (2**25 if args.decode else 2**28)),
            on_shard=lambda split: advance(split, 1),
        )
    if found.bad:
        raise ValueError(f"data {args.folder}: {_listed(found.bad, 'the manifest says')}")
    what = "hashes, headers, labels and images" if args.decode else "hashes, headers and labels"
    print(
        f"{args.folder}: {_shards(found.shards)}, {found.samples} samples, {size_text(found.bytes)}: {what} "
        "are as indexed"
    )
    return 0


def _verify_store(folder: Path, *, decode: bool) -> int:
    from maskgit_pl.shards.verify import verify_store

    if decode:
        raise ValueError(f"--decode must be left out for a token store, which has no images, got {folder}")
    found = verify_store(folder)
    if found.bad:
        way_out = "make it again with `make tokenize` (or `maskgit tokenize`)"
        raise ValueError(f"token store {folder}: {_listed(found.bad, 'store.json says')}\n{way_out}")
    size = f"{folder}: {found.rows} rows, {size_text(found.bytes)}"
    if found.has_hashes:
        print(f"{size}: hashes and ranges are as written")
    else:
        print(f"{size}: all values are in range; an older version made this store without hashes to compare with")
    return 0


def _listed(bad: Sequence[BadFile], rule: str) -> str:
    files = "1 file is" if len(bad) == 1 else f"{len(bad)} files are"
    return "\n".join([f"{files} not what {rule}", *_verdicts(bad)])


def _stats(args: argparse.Namespace) -> int:
    from maskgit_pl.shards.stats import read_statistics

    check_outputs(args, out=".png")
    statistics = read_statistics(args.folder)
    print("\n".join(_statistics_lines(args.folder, statistics)))
    if args.out is not None:
        _draw_sheet(statistics, args.out)
        print(f"{args.out}: the first images of each class")
    return 0


def _class_names(given: str | None) -> list[str] | None:
    """Names after commas, or the lines of a file."""
    if given is None:
        return None
    if os.path.isfile(given):
        with open(given, "rb") as file:
            text = file.read(_MAX_NAMES_BYTES + 1)
        if len(text) > _MAX_NAMES_BYTES:
            raise ValueError(f"class names {given}: at most {_MAX_NAMES_BYTES} bytes are read")
        try:
            lines = text.decode().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"class names {given} must be UTF-8 text, one name a line: {error}") from error
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = [name.strip() for name in given.split(",")]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if not all(names) or doubled:
        raise ValueError(f"class names: each once and none empty, got {doubled[0] if doubled else given!r}")
    return names


def _names_before(folder: Path) -> list[str] | None:
    """Class names of the manifests that are there, unless they are only numbers."""
    from maskgit_pl.shards.manifest import read_manifest_summary

    try:
        names = read_manifest_summary(folder).classes
    except (FileNotFoundError, ValueError):
        return None  # none yet, or none that can be read
    return None if names == tuple(map(str, range(len(names)))) or len(names) == 1 else list(names)


def _workers(given: int | None, *, work: float) -> int:
    """Processes: what is asked for, else one a core as far as there is work, in units that take some 10 s."""
    from maskgit_pl.shards.parallel import available_cores

    return min(available_cores(), 1 + int(work)) if given is None else given


def _lengths(folder: Path) -> int:
    """Bytes of the shards of a data folder, as its manifests say."""
    from maskgit_pl.shards.manifest import load_manifest, splits_of

    manifests = [load_manifest(folder, split, check=False) for split in splits_of(folder)]
    return sum(shard.bytes for manifest in manifests for shard in manifest.shards)


@contextmanager
def _progress(totals: Mapping[Split, int], unit: str) -> Iterator[Callable[[Split, int], None]]:
    """One bar a split, if a person watches; yields what advances a split's bar."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    done: Counter[Split] = Counter()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bars = {split: progress.add_task(f"{split} {unit}", total=total) for split, total in totals.items()}
        step = {split: max(1, total // 200) for split, total in totals.items()}

        def advance(split: Split, count: int) -> None:
            before = done[split]
            done[split] += count
            # an update costs more than a small image
            if before // step[split] != done[split] // step[split] or done[split] == totals[split]:
                progress.update(bars[split], completed=done[split])

        yield advance


def _report(folder: Path, summary: DataSummary, what: str) -> None:
    heights, widths = summary.images.height, summary.images.width
    counts = ", ".join(f"{count} {split}" for split, count in summary.samples.items())
    size = " x ".join(str(low) if low == high else f"{low}-{high}" for low, high in (heights, widths))
    colour = "grey" if summary.channels == 1 else "colour"
    classes = "1 class" if summary.num_classes == 1 else f"{summary.num_classes} classes"
    print(f"{folder}: {what}: {counts}; {classes}; {size} pixels, {colour}")


def _report_splits(folder: Path, shards: Mapping[Split, Sequence[Path]], how: str) -> None:
    for split, paths in shards.items():
        names = [path.relative_to(folder).as_posix() for path in paths]
        listed = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        print(f"  {split}: {_shards(len(names))}, {listed}")
    print(f"  {how}")


def _report_left_out(indexed: Indexed) -> None:
    from maskgit_pl.shards.scan import format_counts

    for split, manifest in indexed.manifests.items():
        for fault, count in manifest.left_out.items():
            print(f"  {split}: left out: {count} {printable(fault)}")
        if indexed.ignored[split]:
            print(f"  {split}: members not read: {format_counts(indexed.ignored[split])}")
    for note in indexed.notes:
        print(f"  {printable(note, limit=None)}")


def _verdicts(bad: Sequence[BadFile]) -> Iterator[str]:
    rows = [("file", "expected", "found", "reason"), *bad]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        yield "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])


def _statistics_lines(folder: Path, statistics: DataStatistics) -> Iterator[str]:
    summary = statistics.summary
    heights, widths = summary.images.height, summary.images.width
    for split, manifest in statistics.manifests.items():
        total = size_text(sum(shard.bytes for shard in manifest.shards))
        yield f"{folder}: {split}: {manifest.samples} samples in {_shards(len(manifest.shards))}, {total}"
        for fault, count in manifest.left_out.items():
            yield f"  left out: {count} {printable(fault)}"
    for line in _unreadable(folder):
        yield f"  left out: {printable(line)}"
    yield ""
    yield from _class_table(statistics)
    yield ""
    channels = ", ".join({1: "grey", 3: "RGB", 4: "with alpha"}[channel] for channel in summary.images.channels)
    median = " x ".join(map(str, statistics.medians))
    if heights[0] == heights[1] and widths[0] == widths[1]:
        yield f"all images {heights[0]} x {widths[0]} pixels (height x width), {channels}"
        return
    smallest, largest = (f"{heights[end]} x {widths[end]}" for end in (0, 1))
    yield f"height x width: smallest {smallest}, median {median}, largest {largest} pixels; {channels}"
    yield from _size_bars(statistics)


def _class_table(statistics: DataStatistics) -> Iterator[str]:

    names, splits = [printable(name) for name in statistics.summary.classes], list(statistics.classes)
    width = max(map(len, ["class", *names]))
    digits = {split: max(len(split), len(str(statistics.classes[split].max()))) for split in splits}
    yield "  ".join(["label", "class".ljust(width), *(split.rjust(digits[split]) for split in splits)])
    for label, name in enumerate(names):
        counts = (str(statistics.classes[split][label]).rjust(digits[split]) for split in splits)
        yield "  ".join([str(label).rjust(5), name.ljust(width), *counts])


def _size_bars(statistics: DataStatistics) -> Iterator[str]:
    bars = statistics.short_sides
    if len(bars) < 2:
        return
    yield f"shorter side in pixels, {statistics.measured} images of train:"
    most = max(bar.images for bar in bars)
    spans = [f"{bar.low}-{bar.high}" if bar.low < bar.high else str(bar.low) for bar in bars]
    for span, bar in zip(spans, bars, strict=True):
        stroke = "#" * -(-40 * bar.images // most)
        yield f"  {span.rjust(max(map(len, spans)))}  {stroke} {bar.images}".rstrip()


def _draw_sheet(statistics: DataStatistics, out: Path) -> None:
    """Rows of classes; of many classes, some that are spread evenly."""
    import numpy as np
    import torch

    from maskgit_pl.imaging import image_grid, save_png
    from maskgit_pl.shards.images import load_square
    from maskgit_pl.shards.stats import images_of_classes

    summary = statistics.summary
    side = min(_SHEET_SIDE, summary.images.height[0], summary.images.width[0])
    side = _SHEET_SIDE if min(summary.images.height[1], summary.images.width[1]) > _SHEET_SIDE else side
    shown = np.unique(np.linspace(0, summary.num_classes - 1, min(_MOST_ROWS, summary.num_classes)).round().astype(int))
    tiles = []
    for files in images_of_classes(statistics.manifests["train"], shown.tolist(), each=_SHEET_COLUMNS):
        row = [
            load_square(data, image_size=side, channels=summary.channels, crop=None, name=name) for data, name in files
        ]
        paper = torch.full((summary.channels, side, side), 255, dtype=torch.uint8)
        tiles += row + [paper] * (_SHEET_COLUMNS - len(row))
    captions = [_short(summary.classes[label]) for label in shown]
    save_png(image_grid(torch.stack(tiles), columns=_SHEET_COLUMNS, row_captions=captions), out)


def _short(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"
