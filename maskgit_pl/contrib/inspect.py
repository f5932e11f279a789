"""``maskgit inspect``: writes one HTML page that shows how a run trains, and what looks wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.flags import (
    add_device_argument,
    add_dtype_argument,
    check_at_least,
    check_outputs,
    read_device_flag,
)

__all__ = ["add_inspect_parser"]


def add_inspect_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "inspect",
        help="write an HTML page about the training of a run",
        description="Write one self-contained HTML page about a run, which may still be training: what looks wrong and "
        "what to try, the logged metrics, the use of codes, a picture of each code, and the worst reconstructions.",
        epilog="Example: maskgit inspect runs/fashion-mnist-adaln",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder (runs/NAME), or a pretrained folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (default: that of the run)")
    parser.add_argument("--out", type=Path, metavar="HTML", help="page to write (default: RUN/inspect.html)")
    parser.add_argument(
        "--num-images", type=int, default=2000, metavar="N", help="measure at most N val images (default: 2000)"
    )
    add_device_argument(parser, default="cpu")
    add_dtype_argument(parser, of="the tokenizer")
    parser.set_defaults(run=_run_inspect)


def _run_inspect(args: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    check_at_least(args, num_images=1)
    check_outputs(args, out=".html")
    device = read_device_flag(args, default="cpu")
    from maskgit_pl.contrib.inspect_page import inspect_run  # torch takes seconds to import

    out = inspect_run(
        args.folder, data=args.data, out=args.out, max_images=args.num_images, device=device, dtype=args.dtype
    )
    print(out)
    return 0
