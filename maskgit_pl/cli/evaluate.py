"""``maskgit evaluate``, ``evaluate-tokenizer`` and ``compare``: measure models on the real images of the val split.

``maskgit train-classifier`` trains a classifier of a data set, whose features measure generated images.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.cli.evaluation_flags import (
    add_cas_arguments,
    add_feature_arguments,
    add_measured_run_arguments,
    add_worker_argument,
    read_cas_flags,
    read_measuring_flags,
    read_num_steps_flag,
)
from maskgit_pl.cli.flags import (
    FOLDER,
    add_device_argument,
    add_dtype_argument,
    check_at_least,
    check_outputs,
    format_flag,
    use_flag_names,
)
from maskgit_pl.processes import local_rank, progress_bars
from maskgit_pl.runs.flag_values import parse_features, parse_image_size, parse_spec, parse_specs

__all__ = ["add_compare_parser", "add_evaluate_parser", "add_evaluate_tokenizer_parser", "add_train_classifier_parser"]


def add_evaluate_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=_run_evaluate)


def _run_evaluate(args: argparse.Namespace) -> int:
    """Measures, writes the results, and prints a table."""
    check_at_least(args, num_images=1, likelihood_images=2, batch_size=1, num_workers=0)
    check_outputs(args, out=".json")
    cas = read_cas_flags(args)
    features = parse_features(args.features)
    from maskgit_pl.evaluation import CASConfig, EvaluationOptions, evaluate

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.device is None:  # one GPU for each process
        from maskgit_pl.distributed import default_device

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


def add_evaluate_tokenizer_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "evaluate-tokenizer",
        help="measure a tokenizer on the val split",
        description="Measure the reconstructions, codes, bits per pixel, speed and memory of a trained, exported or "
        "imported tokenizer, and write tokenizer.json, tokenizer.md and a picture of the worst reconstructions. "
        "`maskgit table tokenizers` compares several.",
        epilog="Example: maskgit evaluate-tokenizer runs/fashion-mnist-adaln --num-images 2000",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder, pretrained folder or tokenizer folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (default: that of the training)")
    parser.add_argument("--num-images", type=int, metavar="N", help="number of random val images (default: all)")
    parser.add_argument(
        "--features",
        default="classifier",
        metavar="A,B,...",
        help="feature networks: classifier, lite0, inception[=FILE], timm:MODEL=FILE, or mappings (default: "
        "classifier)",
    )
    parser.add_argument("--lpips", metavar="vgg=FILE", help="also measure LPIPS; the backbone is vgg, alex or squeeze")
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="keep the size of each image, and reconstruct it from overlapping square tiles with this side (default: "
        "crop and resize the images as in training)",
    )
    parser.add_argument("--tile-overlap", type=int, metavar="PIXELS", help="smallest overlap of two tiles (default: a "
                        "quarter of --tile)")  # fmt: skip
    parser.add_argument("--classifier", type=Path, metavar="DIR", help="folder of the classifier that judges images "
                        "(default: runs/DATA-classifier/small)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=100, metavar="N", help="images per batch (default: 100)")
    add_worker_argument(parser)
    add_device_argument(parser)
    add_dtype_argument(parser, of="the tokenizer")
    parser.add_argument("--json", action="store_true", help="print the JSON in place of a table")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="results; the others are written beside it "
                        "(default: RUN/tokenizer.json)")  # fmt: skip
    parser.set_defaults(run=_run_evaluate_tokenizer)


def _run_evaluate_tokenizer(args: argparse.Namespace) -> int:
    """Measures, writes the results, and prints a table."""
    check_at_least(args, num_images=4, tile=1, tile_overlap=0, batch_size=1, num_workers=0)
    check_outputs(args, out=".json")
    features = parse_features(args.features)
    from maskgit_pl.evaluation import TokenizerOptions, evaluate_tokenizer

    names = (
        "num_images", "lpips", "tile", "tile_overlap", "classifier", "batch_size", "num_workers", "device", "dtype",
    )  # fmt: skip
    with use_flag_names(args), progress_bars() as bars:
        options = TokenizerOptions(**{name: getattr(args, name) for name in names})
        report = evaluate_tokenizer(
            args.folder, data=args.data, features=features, out=args.out, options=options, bars=bars
        )
    if args.json:
        print(json.dumps(report.content, indent=2))
        return 0
    from rich.console import Console

    Console().print(report.table())
    print(report.content["held_out"]["text"])
    print(f"{report.file}: results; beside it {report.file.stem}.md and {report.picture.name}")
    return 0


def add_compare_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "compare",
        help="measure every token selector on one model",
        description="Measure token selectors at several numbers of steps, with the same noise for all, and write "
        "comparison.md, comparison.csv and a sheet of images. Measurements that the ledger holds are reused.",
        epilog="Example: maskgit compare runs/fashion-mnist-adaln --selectors confidence,halton --num-steps 4,8",
    )
    add_measured_run_arguments(parser)
    parser.add_argument(
        "--selectors",
        default="all",
        metavar="A,B,...",
        help="names, or mappings such as '{name: remdm, eta: 0.4}' (default: all, remdm with each strategy); a name "
        "uses the model's own choice temperature",
    )
    parser.add_argument(
        "--num-steps",
        metavar="T,...",
        help="numbers of decoding steps, or a range such as 4-16 (default: 4,8,16,32, at most the tokens per image)",
    )
    parser.add_argument(
        "--num-images", type=int, default=1000, metavar="N", help="images generated for each row (default: 1000)"
    )
    guidance = parser.add_mutually_exclusive_group()
    guidance.add_argument(
        "--guidance", metavar="NAME", help="name or mapping of a guidance schedule (default: the model's own)"
    )
    guidance.add_argument("--guidance-scale", type=float, metavar="X", help="scale of the model's guidance schedule")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the pages and the ledger (default: RUN/comparison, and the ledger of RUN/evaluation)",
    )
    parser.set_defaults(run=_run_compare)


def _run_compare(args: argparse.Namespace) -> int:
    """Measures what the ledger does not hold, writes the pages, and prints a table."""
    check_at_least(args, num_images=1, batch_size=1)
    check_outputs(args, out=FOLDER)
    # Flags are parsed before torch is imported; the library checks the names of selectors and schedules.
    numbers = read_num_steps_flag(args)
    selectors = None if args.selectors == "all" else parse_specs("--selectors", args.selectors)
    guidance = args.guidance_scale if args.guidance is None else parse_spec("--guidance", args.guidance)
    from maskgit_pl.evaluation import ComparisonOptions, compare

    with use_flag_names(args), progress_bars() as bars:
        made = compare(
            args.folder,
            data=args.data,
            selectors=selectors,
            num_steps=numbers,
            num_images=args.num_images,
            out=args.out,
            options=ComparisonOptions(**read_measuring_flags(args), guidance=guidance),
            bars=bars,
        )
    from rich.console import Console

    Console().print(made.table())
    known = len(made.results) - made.num_measured
    print(f"{made.folder}: measured {made.num_measured} rows, reused {known}; comparison.md, .csv and selectors.png")
    return 0


def add_train_classifier_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=_run_train_classifier)


def _run_train_classifier(args: argparse.Namespace) -> int:
    """Trains the classifier if it does not exist, and prints its accuracy."""
    for name, interval in (("max_steps", "[1, inf)"), ("batch_size", "[2, inf)")):
        if getattr(args, name) is not None:
            check_integer(format_flag(name), getattr(args, name), interval)
    if args.learning_rate is not None:
        check_number("--learning-rate", args.learning_rate, "(0, inf)")
    check_number("--flip-probability", args.flip_probability, "[0, 1]")
    from maskgit_pl.evaluation import train_classifier
    from maskgit_pl.evaluation.options import default_training

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
