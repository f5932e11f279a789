"""``maskgit train-classifier``: trains a classifier of a data set, whose features measure generated images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.cli.flags import add_device_argument, format_flag, use_flag_names
from maskgit_pl.progress import progress_bars
from maskgit_pl.runs.flag_values import parse_image_size

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "train-classifier",
        help="train a classifier of a data set for evaluation",
        description="Train a classifier on the train split of a data folder, print its accuracy on the val split, and "
        "write it to a folder for `--features classifier=DIR` of other commands. An existing classifier of the same "
        "data and settings is reused.",
        epilog="Example: maskgit train-classifier --data data/shards/fashion-mnist --model resnet18",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data folder")
    parser.add_argument(
        "--model", default="small", metavar="NAME", help="small, or the name of a timm network such as resnet18 "
        "(default: small)",
    )  # fmt: skip
    parser.add_argument("--max-steps", type=int, metavar="N", help="training steps (default: 900, for timm 1000)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per step (default: 128, for timm 64)")
    parser.add_argument(
        "--learning-rate", type=float, metavar="X", help="peak learning rate (default: 4e-3, for timm 1e-3)"
    )
    parser.add_argument(
        "--flip-probability",
        type=float,
        default=0.0,
        metavar="P",
        help="probability of mirroring an image (default: 0)",
    )
    parser.add_argument(
        "--precision",
        choices=("32-true", "bf16-mixed"),
        default="32-true",
        help="training precision (default: 32-true)",
    )
    parser.add_argument(
        "--image-size", metavar="S|H,W", help="S x S pixels, or height H and width W (default: the size of the data)"
    )
    parser.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of weights, order and flips (default: 0)"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="classifier folder (default: runs/DATA-classifier/NAME)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains the classifier if it does not exist, and prints its accuracy."""
    for name, interval in (("max_steps", "[1, inf)"), ("batch_size", "[2, inf)")):
        if getattr(args, name) is not None:
            check_integer(format_flag(name), getattr(args, name), interval)
    if args.learning_rate is not None:
        check_number("--learning-rate", args.learning_rate, "(0, inf)")
    check_number("--flip-probability", args.flip_probability, "[0, 1]")
    from maskgit_pl.evaluation import train_classifier
    from maskgit_pl.evaluation.classifier_config import default_training

    # Flags that are not given keep the defaults of the network.
    given = {"max_steps": args.max_steps, "batch": args.batch_size, "peak_rate": args.learning_rate}
    config = replace(
        default_training(args.model),
        seed=args.seed,
        flip_probability=args.flip_probability,
        precision=args.precision,
        **{name: value for name, value in given.items() if value is not None},
    )
    where = {name: getattr(args, name) for name in ("num_workers", "device", "out")}
    size = None if args.image_size is None else parse_image_size("--image-size", args.image_size)
    with use_flag_names(args), progress_bars() as bars:
        made = train_classifier(args.data, config=config, image_size=size, bars=bars, **where)
    accuracy = made.accuracy
    print(f"{made.folder}: {'reused' if made.is_reused else 'trained'}; on {accuracy.images} real val images:")
    print(f"  top-1 {accuracy.top1:.2%}" + (f", top-5 {accuracy.top5:.2%}" if made.num_classes > 5 else ""))
    return 0
