"""``maskgit data fetch``: downloads a public data set and writes its shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from maskgit_pl.checks import check_choice
from maskgit_pl.data.sources.public import Dataset, public_datasets

if TYPE_CHECKING:
    from maskgit_pl.data.samples import Source

__all__ = ["add_parser"]


class WriteShards(Protocol):
    """Writes a source as a data folder, and does nothing if the folder is complete."""

    def __call__(self, source: Source, out: Path) -> None:
        """Writes the samples of ``source`` to ``out``."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], *, write_shards: WriteShards) -> None:
    """Adds ``fetch`` to the commands of ``maskgit data``."""
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
    parser.set_defaults(run=lambda args: _run(args, write_shards))


def _run(args: argparse.Namespace, write_shards: WriteShards) -> int:
    """Fetches the files and writes the shards."""
    datasets = public_datasets()
    check_choice("NAME", args.name, datasets)
    dataset = datasets[args.name]
    size = dataset.image_sizes[0] if args.image_size is None else args.image_size
    if size not in dataset.image_sizes:
        raise ValueError(f"--image-size must be {_sizes_text(dataset)} for {args.name}, got {size}")
    raw = Path("data/raw", args.name) if args.raw is None else args.raw
    files = dataset.fetch(raw) if args.source is None else args.source
    write_shards(dataset.open(files, image_size=size), Path("data/shards", args.name) if args.out is None else args.out)
    return 0


def _sizes_text(dataset: Dataset) -> str:
    return " or ".join(map(str, dataset.image_sizes))
