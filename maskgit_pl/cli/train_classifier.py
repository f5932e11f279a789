"""``maskgit train-classifier``: a classifier of the data set at hand, which measures what a model generates."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.cli.flags import add_device_argument, format_flag, use_flag_names
from maskgit_pl.progress import progress_bars

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "train-classifier",
        help="train a classifier of a data set, to measure with",
        description="Train a classifier on the train split of a data folder, print how often it is right on the val "
        "split, and keep it in a folder that `--features classifier=DIR` of other commands takes. One that is there, "
        "of the same data and flags, is not trained again.",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data folder")
    parser.add_argument(
        "--model", default="small", metavar="NAME", help="small, or timm's name of a network, e.g. resnet18 "
        "(default: small)",
    )  # fmt: skip
    parser.add_argument("--max-steps", type=int, metavar="N", help="training steps (default: 900; 1000 for timm's)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images of a step (default: 128; 64 for timm's)")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="its peak (default: 4e-3; 1e-3 for timm's)")
    parser.add_argument(
        "--flip-probability",
        type=float,
        default=0.0,
        metavar="P",
        help="share of the images that is mirrored (default: 0)",
    )
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="(default: 32-true)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="edge (default: that of the images)")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that read (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and flips (default: 0)")
    add_device_argument(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/DATA-classifier/NAME)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains what is not there yet, and prints its accuracy."""
    for name, interval in (("max_steps", "[1, inf)"), ("batch_size", "[2, inf)")):
        if getattr(args, name) is not None:
            check_integer(format_flag(name), getattr(args, name), interval)
    if args.learning_rate is not None:
        check_number("--learning-rate", args.learning_rate, "(0, inf)")
    check_number("--flip-probability", args.flip_probability, "[0, 1]")
    from maskgit_pl.evaluation import train_classifier
    from maskgit_pl.evaluation.classifier_config import default_training

    given = {"max_steps": args.max_steps, "batch": args.batch_size, "peak_rate": args.learning_rate}
    config = replace(
        default_training(args.model),
        seed=args.seed,
        flip_probability=args.flip_probability,
        precision=args.precision,
        **{name: value for name, value in given.items() if value is not None},
    )
    where = {name: getattr(args, name) for name in ("image_size", "num_workers", "device", "out")}
    with use_flag_names(args), progress_bars() as bars:
        made = train_classifier(args.data, config=config, bars=bars, **where)
    accuracy = made.accuracy
    print(f"{made.folder}: {'there already' if made.is_reused else 'trained'}; on {accuracy.images} real val images:")
    print(f"  top-1 {accuracy.top1:.2%}" + (f", top-5 {accuracy.top5:.2%}" if made.num_classes > 5 else ""))
    return 0
