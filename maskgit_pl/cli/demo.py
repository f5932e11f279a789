"""``maskgit demo``: fetches data, trains both stages, and measures the result; see ``maskgit_pl.demo``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.flags import add_new_run_arguments

if TYPE_CHECKING:
    from maskgit_pl.evaluation.demo_steps import DemoOptions

__all__ = ["add_demo_parser", "read_demo_flags"]


def add_demo_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "demo",
        help="do everything once: fetch data, train both stages, make pictures, measure",
        description="Fetch a data set, or convert the images of --images, train both stages, and measure the model: "
        "about 10 minutes on 2 CPU cores for Fashion-MNIST. The same command resumes after a stop. Without --recipe, "
        "it trains the recipe adaln, and on other data than Fashion-MNIST 'adaln 15m'. Further flags "
        "override recipe values of both stages.",
        epilog="Example: maskgit demo --dataset mine --images path/to/folder",
    )
    add_new_run_arguments(parser)
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder or archive of your own images, one "
                        "sub-folder per class, for a --dataset of your own")  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help="train 60 steps per stage, as a quick check (run: demo-short)"
    )
    parser.set_defaults(run=_run_demo, takes_overrides=True)


def _run_demo(args: argparse.Namespace) -> int:
    """Runs the steps, and says what to do next."""
    from maskgit_pl.evaluation.demo_steps import demo

    folder = demo(**read_demo_flags(args))
    print(f"\nThe model is in {folder}. Next: maskgit sample {shlex.quote(str(folder))} --out sampled.png")
    return 0


def read_demo_flags(args: argparse.Namespace) -> DemoOptions:
    """Returns the options of the demo."""
    return {
        "recipe": args.recipe,
        "dataset": args.dataset,
        "data": args.data,
        "images": args.images,
        "cluster": args.cluster,
        "run": args.run_name,
        "runs_folder": args.runs_folder,
        "tokenizer": args.tokenizer,
        "pretrained": args.pretrained,
        "overrides": args.overrides,
        "short": args.short,
    }
