"""``maskgit data``: fetches public data sets, makes shards from images, indexes, verifies and counts shards.

This file is imported to build the parser, so only the functions that run a command import torch, PIL and webdataset.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.checks import ImageSize, check_choice
from maskgit_pl.cli.flags import check_outputs, use_flag_names
from maskgit_pl.data.folders import hold_lock
from maskgit_pl.data.sources.public import Dataset, public_datasets
from maskgit_pl.processes import named_bars
from maskgit_pl.runs.flag_values import parse_image_size

if TYPE_CHECKING:
    from maskgit_pl.data.samples import Source

__all__ = ["add_data_parser", "make"]

_Parsers = argparse._SubParsersAction

_MOST_COMPARED = 2**30  # bytes of shards that are read again after they are made


def add_data_parser(subparsers: _Parsers[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "data",
        help="fetch, make, index, verify and count shards of images",
        description="Download a data set, make shards from images, index existing shards, verify and count them.",
    )
    commands = parser.add_subparsers(title="commands", dest="data_command", required=True, metavar="COMMAND")
    for add in (_add_make, _add_index, _add_verify, _add_stats, _add_fetch):
        add(commands)


def _add_make(commands: _Parsers[argparse.ArgumentParser]) -> None:
    make = commands.add_parser(
        "make",
        help="write images of folders, archives or data sets as shards",
        description="Write images as shards with a train and a val split. The source is a folder, zip, tar or .tar.gz "
        "of images (one sub-folder per class, or metadata.csv or .jsonl with file_name and label, or one class; train/ "
        "and val/ are kept as splits), a folder of IDX or parquet files, or hf:OWNER/NAME[@REVISION][:SPLIT].",
        epilog="Examples: maskgit data make photos.zip --out data/shards/photos --image-size 64; "
        "maskgit data make hf:zalando-datasets/fashion_mnist --out data/shards/fashion",
    )
    make.add_argument(
        "source",
        metavar="SOURCE",
        help="folder or archive of images, folder of IDX or parquet files, or hf:OWNER/NAME of the Hugging Face Hub",
    )
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="data folder to write")
    make.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="val fraction of a source without a val split (default: 0.1)",
    )
    make.add_argument(
        "--image-size",
        metavar="S|H,W",
        help="crop the centre and resize to S x S pixels, or height H and width W (default: keep the files)",
    )
    make.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="images per shard (default: 10000)")
    make.add_argument(
        "--label-field", default="label", metavar="NAME", help="column of the labels in a table (default: label)"
    )
    make.add_argument("--lenient", action="store_true", help="skip and list images that cannot be read")
    _add_vectors(make, "files beside the images")
    _add_class_names(make, "default: those of the source")
    _add_workers(make)
    make.set_defaults(run=_run_make)


def _run_make(args: argparse.Namespace) -> int:
    from maskgit_pl.data.sources.opening import HUB_PREFIX, open_source

    names = _class_names(args)
    size = None if args.image_size is None else parse_image_size("--image-size", args.image_size)
    # Several workers would each read a stream from its beginning.
    is_stream = args.source.startswith(HUB_PREFIX)
    workers = 1 if is_stream and args.num_workers is None else args.num_workers
    with use_flag_names(args):
        source = open_source(
            args.source,
            classes=names,
            val_fraction=args.val_fraction,
            label_field=args.label_field,
            vectors=not args.no_vectors,
        )
        make(source, args.out, size=size, shard_size=args.shard_size, lenient=args.lenient, workers=workers)
    _report_duplicates(args.out)
    return 0


def make(
    source: Source,
    out: Path,
    *,
    size: ImageSize | None = None,
    shard_size: int = 10_000,
    lenient: bool = False,
    workers: int | None = 1,
) -> None:
    """Makes a data folder with a progress bar and prints its content."""
    from maskgit_pl.data.manifest import read_manifest_summary
    from maskgit_pl.data.verify import describe_data, unreadable_lines, untrained_lines
    from maskgit_pl.data.writer import make_shards

    # The lock is held until the manifest is written, so that two commands never write to the same folder.
    with hold_lock(out, hint="give another --out"), named_bars("samples") as advance:
        made = make_shards(
            source,
            out,
            size=size,
            shard_size=shard_size,
            lenient=lenient,
            workers=workers,
            on_samples=lambda split, count: advance(split, count, source.counts[split]),
        )
    print(describe_data(out, read_manifest_summary(out), "made" if made else "complete already, nothing to do"))
    for line in [*source.left_out, *unreadable_lines(out)]:
        print(f"  left out: {line}")
    for line in untrained_lines(out):
        print(f"  {line}")


def _report_duplicates(folder: Path) -> None:
    """Prints which images are equal, if any; for large data, which take long to read again, the command that does."""
    from maskgit_pl.data.manifest import load_manifests
    from maskgit_pl.data.stats import find_duplicates
    from maskgit_pl.data.verify import duplicate_lines

    if sum(file.stat().st_size for file in folder.glob("*.tar")) > _MOST_COMPARED:
        print(f"  duplicates: not searched for in so much data; `maskgit data stats {folder}` does")
        return
    found = find_duplicates(load_manifests(folder))
    if found.val_in_train or any(found.repeated.values()):
        print("\n".join(f"  {line}" for line in duplicate_lines(found)))


def _add_index(commands: _Parsers[argparse.ArgumentParser]) -> None:
    index = commands.add_parser(
        "index",
        help="write the manifests of existing WebDataset tars",
        description="Write the manifests of WebDataset tars that another program made. The tars are not changed.",
        epilog="Example: maskgit data index 'imagenet/imagenet-{train,val}-*.tar'",
    )
    index.add_argument("shards", metavar="DIR|PATTERN", help="folder of tars, or a quoted glob or brace pattern")
    index.add_argument("--train", metavar="PATTERN", help="train tars in the folder (default: all except val)")
    index.add_argument("--val", metavar="PATTERN", help="val tars (default: those with val or test in their names)")
    index.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="without val tars: fraction of the tars, the last ones, that become val (default: 0.1)",
    )
    labels = index.add_mutually_exclusive_group()
    labels.add_argument(
        "--label-field", metavar="NAME", help="read labels from this field of .json (default: from .cls)"
    )
    labels.add_argument("--no-labels", action="store_true", help="put all images into one class")
    index.add_argument("--lenient", action="store_true", help="skip and count damaged samples")
    _add_vectors(index, "members")
    _add_class_names(index, "default: numbers")
    _add_workers(index)
    index.set_defaults(run=_run_index)


def _run_index(args: argparse.Namespace) -> int:
    from maskgit_pl.data.index import index_shards
    from maskgit_pl.data.manifest import read_manifest_summary
    from maskgit_pl.data.reader import locate_shards, split_shards
    from maskgit_pl.data.samples import find_class_names
    from maskgit_pl.data.verify import describe_data, index_lines, untrained_lines

    folder, found = locate_shards(args.shards)
    shards, how = split_shards(folder, found, train=args.train, val=args.val, val_fraction=args.val_fraction)
    # Without --class-names, the names of an existing manifest are kept, unless all images get one class.
    names = _class_names(args) or (None if args.no_labels else find_class_names(folder))
    # The three kinds of labels as the index reads them.
    labels = "none" if args.no_labels else f"json:{args.label_field}" if args.label_field else "cls"
    with named_bars("shards") as advance:
        indexed = index_shards(
            folder,
            shards,
            classes=names,
            labels=labels,
            vectors=not args.no_vectors,
            lenient=args.lenient,
            workers=args.num_workers,
            on_shard=lambda split, total: advance(split, 1, total),
        )
    print(describe_data(folder, read_manifest_summary(folder), "indexed"))
    if names is not None and args.class_names is None:
        print("  class names: kept from the existing manifest")
    print("\n".join(index_lines(folder, shards, how, indexed)))
    for line in untrained_lines(folder):
        print(f"  {line}")
    return 0


def _add_verify(commands: _Parsers[argparse.ArgumentParser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="read every shard or token file and list the damaged ones",
        description="Read every shard of a data folder, or every file of a token store, compare them with the "
        "manifests, and list the damaged ones.",
        epilog="Example: maskgit data verify data/shards/fashion-mnist",
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="data folder or token store")
    verify.add_argument("--decode", action="store_true", help="also decode every image")
    _add_workers(verify)
    verify.set_defaults(run=_run_verify)


def _run_verify(args: argparse.Namespace) -> int:
    from maskgit_pl.data.token_store import is_store
    from maskgit_pl.data.verify import describe_bad_files, describe_verification, verify_shards

    # A token store has another manifest and no images.
    if is_store(args.folder):
        return _verify_store(args.folder, decode=args.decode)
    with named_bars("shards") as advance:
        found = verify_shards(
            args.folder,
            decode=args.decode,
            workers=args.num_workers,
            on_shard=lambda split, total: advance(split, 1, total),
        )
    if found.bad:
        raise ValueError(f"data {args.folder}: {describe_bad_files(found.bad, 'the manifest')}")
    print(describe_verification(args.folder, found, decoded=args.decode))
    return 0


def _verify_store(folder: Path, *, decode: bool) -> int:
    from maskgit_pl.data.token_store import DESCRIPTION_FILE, REMAKE_HINT
    from maskgit_pl.data.verify import describe_bad_files, describe_store_verification, verify_store

    if decode:
        raise ValueError(f"--decode must be left out for a token store, which has no images, got {folder}")
    found = verify_store(folder)
    if found.bad:
        raise ValueError(f"token store {folder}: {describe_bad_files(found.bad, DESCRIPTION_FILE)}\n{REMAKE_HINT}")
    print(describe_store_verification(folder, found))
    return 0


def _add_stats(commands: _Parsers[argparse.ArgumentParser]) -> None:
    stats = commands.add_parser(
        "stats",
        help="count the classes, images and bytes of a data folder",
        description="Print the number of images, classes, sizes and bytes of a data folder, and find images that are "
        "equal to others.",
        epilog="Example: maskgit data stats data/shards/fashion-mnist --out sheet.png",
    )
    stats.add_argument("folder", type=Path, metavar="DIR", help="data folder")
    duplicates = stats.add_mutually_exclusive_group()
    duplicates.add_argument("--no-duplicates", action="store_true", help="do not read all images to find equal ones")
    duplicates.add_argument("--decode", action="store_true", help="compare decoded pixels (default: the files' bytes)")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.add_argument("--out", type=Path, metavar="FILE.png", help="draw the first images of each class")
    stats.set_defaults(run=_run_stats)


def _run_stats(args: argparse.Namespace) -> int:
    from maskgit_pl.data.stats import find_duplicates, read_statistics, statistics_as_json
    from maskgit_pl.data.verify import duplicate_lines, statistics_lines

    check_outputs(args, out=".png")
    statistics = read_statistics(args.folder)
    duplicates = None
    if not args.no_duplicates:
        with named_bars("images") as advance:
            duplicates = find_duplicates(
                statistics.manifests,
                compare="pixels" if args.decode else "bytes",
                on_image=lambda split, total: advance(split, 1, total),
            )
    if args.json:
        print(json.dumps(statistics_as_json(statistics, duplicates), indent=1))
    else:
        print("\n".join(statistics_lines(args.folder, statistics)))
        if duplicates is not None:
            print("\n".join(["", *duplicate_lines(duplicates)]))
    if args.out is not None:
        from maskgit_pl.pipeline.grids import draw_contact_sheet

        draw_contact_sheet(statistics, args.out)
        if not args.json:
            print(f"{args.out}: first images of each class")
    return 0


def _add_fetch(commands: _Parsers[argparse.ArgumentParser]) -> None:
    datasets = public_datasets()
    listed = "; ".join(f"{name}: {each.contents}" for name, each in datasets.items())
    parser = commands.add_parser(
        "fetch",
        help="download a public data set and write its shards",
        description=f"Download a public data set, check it and write its shards. Complete data are kept. {listed}.",
        epilog="Example: maskgit data fetch fashion-mnist",
    )
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(datasets)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="data folder to write (default: data/shards/NAME)")
    parser.add_argument(
        "--raw", type=Path, metavar="DIR", help="folder that keeps the downloaded files (default: data/raw/NAME)"
    )
    parser.add_argument("--source", type=Path, metavar="PATH", help="existing files in place of a download: "
                        + "; ".join(f"{name}: {each.source}" for name, each in datasets.items()))  # fmt: skip
    sizes = "; ".join(f"{name}: {_sizes_text(each)}" for name, each in datasets.items())
    parser.add_argument("--image-size", type=int, metavar="S", help=f"side of the images in pixels ({sizes})")
    parser.set_defaults(run=_run_fetch)


def _run_fetch(args: argparse.Namespace) -> int:
    """Fetches the files and writes the shards."""
    datasets = public_datasets()
    check_choice("NAME", args.name, datasets)
    dataset = datasets[args.name]
    size = dataset.image_sizes[0] if args.image_size is None else args.image_size
    if size not in dataset.image_sizes:
        raise ValueError(f"--image-size must be {_sizes_text(dataset)} for {args.name}, got {size}")
    raw = Path("data/raw", args.name) if args.raw is None else args.raw
    files = dataset.fetch(raw) if args.source is None else args.source
    make(dataset.open(files, image_size=size), Path("data/shards", args.name) if args.out is None else args.out)
    return 0


def _sizes_text(dataset: Dataset) -> str:
    return " or ".join(map(str, dataset.image_sizes))


def _add_class_names(parser: argparse.ArgumentParser, when: str) -> None:
    parser.add_argument(
        "--class-names", metavar="A,B,...|FILE", help=f"class names in order, or a file with one name per line ({when})"
    )


def _class_names(args: argparse.Namespace) -> list[str] | None:
    from maskgit_pl.data.samples import parse_class_names

    return None if args.class_names is None else parse_class_names(args.class_names)


def _add_vectors(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--no-vectors", action="store_true", help=f"ignore .npy {what} (default: they are the images' vectors)"
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="worker processes (default: one per CPU core, fewer for little data)",
    )
