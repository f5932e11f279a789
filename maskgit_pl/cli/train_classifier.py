"""``maskgit train-classifier``: a classifier of the data set at hand, which measures what a model generates."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.cli.measuring import progress_bars
from maskgit_pl.cli.model import add_device_argument, device_of

if TYPE_CHECKING:
    from maskgit_pl.data import ShardData
    from maskgit_pl.evaluation.classifier import ClassifierConfig

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "train-classifier",
        help="train a classifier of a data set, to measure with",
        description="Train a classifier on the train split of a data folder, print how often it is right on the val "
        "split, and keep it in a folder that `--features classifier=DIR` of other commands takes. One that is there, "
        "of the same data and flags, is not trained again.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data folder")
    parser.add_argument(
        "--model", default="small", metavar="NAME", help="small, or timm's name of a network, e.g. resnet18 "
        "(default: small)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: 900; 1000 for timm's)")
    parser.add_argument("--batch", type=int, metavar="N", help="images of a step (default: 128; 64 for timm's)")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="its peak (default: 4e-3; 1e-3 for timm's)")
    parser.add_argument(
        "--flip", type=float, default=0.0, metavar="P", help="share of the images that is mirrored (default: 0)"
    )
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="(default: 32-true)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="edge (default: that of the images)")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that read (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and flips (default: 0)")
    add_device_argument(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/DATA-classifier/NAME)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains what is not there yet, and says how good it is.

    Raises:
        FileNotFoundError: No such data folder.
        ValueError: Images of several sizes without ``--image-size``, an unknown network, or a number out of range.
    """
    _check_numbers(args)
    size = _image_size(args)  # before anything heavy is loaded
    device = device_of(args)
    from maskgit_pl.networks.classifier import check_model

    check_model(args.model)
    config, data = _training(args), _open_data(args, size)
    folder = args.out or Path("runs") / f"{args.data.resolve().name}-classifier" / args.model
    from maskgit_pl.evaluation.classifier import is_trained, measure_accuracy, obtain_classifier

    found = is_trained(folder, data, config)
    with progress_bars() as bars:
        advance = bars(f"training {args.model}", config.max_steps)
        classifier = obtain_classifier(folder, data, config=config, on_step=lambda: advance(1), device=device)
        on_images = bars("real images", data.summary.samples["val"])
        accuracy = measure_accuracy(classifier.to(device), data, on_images=on_images)
    print(f"{folder}: {'there already' if found else 'trained'}; on {accuracy.images} real val images:")
    top5 = f", top-5 {accuracy.top5:.2%}" if data.num_classes > 5 else ""
    print(f"  top-1 {accuracy.top1:.2%}{top5}")
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    bounds = {"steps": "[1, inf)", "batch": "[2, inf)", "image_size": "[1, inf)", "num_workers": "[0, inf)"}
    for name, interval in bounds.items():
        if getattr(args, name) is not None:
            check_integer(f"--{name.replace('_', '-')}", getattr(args, name), interval)
    if args.learning_rate is not None:
        check_number("--learning-rate", args.learning_rate, "(0, inf)")
    check_number("--flip", args.flip, "[0, 1]")


def _training(args: argparse.Namespace) -> ClassifierConfig:
    from maskgit_pl.evaluation.classifier import default_training

    given: dict[str, Any] = {"max_steps": args.steps, "batch": args.batch, "peak_rate": args.learning_rate}
    return replace(
        default_training(args.model),
        seed=args.seed,
        flip_probability=args.flip,
        precision=args.precision,
        **{name: value for name, value in given.items() if value is not None},
    )


def _image_size(args: argparse.Namespace) -> int:
    """The edge that was asked for, or that all images have."""
    from maskgit_pl.shards.manifest import read_manifest_summary

    images = read_manifest_summary(args.data).images
    sizes = sorted({*images.height, *images.width})
    size: int = sizes[0] if args.image_size is None else args.image_size
    if args.image_size is None and len(sizes) > 1:
        raise ValueError(
            f"data {args.data}: edges of {sizes[0]} to {sizes[-1]} pixels; say the one to train at with --image-size"
        )
    return size


def _open_data(args: argparse.Namespace, size: int) -> ShardData:
    from maskgit_pl.data import ShardData, ShardDataConfig
    from maskgit_pl.shards.manifest import read_manifest_summary

    data = ShardData(
        ShardDataConfig(
            str(args.data),
            image_size=size,
            in_channels=read_manifest_summary(args.data).channels,
            validation_batch=200,
            num_workers=args.num_workers,
        )
    )
    data.setup()
    return data
