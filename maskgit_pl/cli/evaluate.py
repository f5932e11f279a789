"""``maskgit evaluate``: measures a trained model against the real images of the val split."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from maskgit_pl.cli.evaluation_flags import (
    add_cas_arguments,
    add_feature_arguments,
    add_measured_run_arguments,
    add_worker_argument,
    read_cas_flags,
    read_measuring_flags,
)
from maskgit_pl.cli.flags import check_at_least, check_outputs, use_flag_names
from maskgit_pl.launcher import local_rank
from maskgit_pl.progress import progress_bars
from maskgit_pl.runs.flag_values import parse_features

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained model on the val split",
        description="Measure reconstruction, generated images in the features of several networks, likelihood and "
        "speed, and write evaluation.json and pictures. Processes that torchrun starts share the work.",
        epilog="Example: maskgit evaluate runs/fashion-mnist-adaln --num-images 2000 --features classifier",
    )
    add_measured_run_arguments(parser)
    parser.add_argument(
        "--num-images", type=int, default=1000, metavar="N", help="number of generated images (default: 1000)"
    )
    parser.add_argument(
        "--num-steps", type=int, metavar="T", help="number of decoding steps (default: the model's own)"
    )
    add_feature_arguments(parser)
    parser.add_argument("--lpips", metavar="vgg=FILE", help="also measure LPIPS of the reconstructions; the backbone "
                        "is vgg, alex or squeeze")  # fmt: skip
    parser.add_argument("--likelihood-images", type=int, default=2000, metavar="N",
                        help="number of real images for the likelihood (default: 2000)")  # fmt: skip
    parser.add_argument("--cas", action="store_true", help="also measure the classification accuracy score")
    add_cas_arguments(parser)
    parser.add_argument("--accept-rate", type=float, metavar="X", help="generate 1 / X times as many images, and also "
                        "measure the fraction X of each class to which a classifier gives the highest probability of "
                        "that class")  # fmt: skip
    parser.add_argument("--accept-classifier", type=Path, metavar="DIR", help="classifier of --accept-rate, better "
                        "another one than --classifier (default: --classifier)")  # fmt: skip
    add_worker_argument(parser)
    parser.add_argument("--resume", action="store_true", help="keep the measurements of an interrupted evaluation")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="results; pictures are written beside it (default: RUN/evaluation.json)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, writes the results, and prints a table."""
    check_at_least(args, num_images=1, likelihood_images=2, batch_size=1, num_workers=0)
    check_outputs(args, out=".json")
    cas = read_cas_flags(args)
    features = parse_features(args.features)
    from maskgit_pl.evaluation import CASConfig, EvaluationOptions, evaluate

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.device is None:  # one GPU for each process
        from maskgit_pl.devices import default_device

        args.device = default_device(local_rank=local_rank())
    with use_flag_names(args):
        options = EvaluationOptions(
            **read_measuring_flags(args),
            num_workers=args.num_workers,
            num_steps=args.num_steps,
            reference=args.reference,
            lpips=args.lpips,
            likelihood_images=args.likelihood_images,
            cas=CASConfig(**cas) if args.cas and args.cas_model != "none" else None,
            resume=args.resume,
            accept_rate=args.accept_rate,
            accept_classifier=args.accept_classifier,
        )
    # All ranks measure; rank 0 shows the progress and prints the table.
    first = os.environ.get("RANK", "0") == "0"
    with use_flag_names(args), progress_bars(shown=first) as bars:
        report = evaluate(
            args.folder,
            data=args.data,
            num_images=args.num_images,
            features=features,
            out=args.out,
            options=options,
            bars=bars,
        )
    if first:
        from rich.console import Console

        Console().print(report.table())
        print(*report.findings(), sep="\n")
        print(f"{report.file}: results; beside it samples.png, reconstructions.png and decoding.gif")
    return 0
