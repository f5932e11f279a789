"""``maskgit evaluate-tokenizer``: measures a tokenizer without a transformer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from maskgit_pl.cli.evaluation_flags import add_worker_argument
from maskgit_pl.cli.flags import add_device_argument, add_dtype_argument, check_at_least, check_outputs, use_flag_names
from maskgit_pl.progress import progress_bars
from maskgit_pl.runs.flag_values import parse_features

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, writes the results, and prints a table."""
    check_at_least(args, num_images=4, tile=1, tile_overlap=0, batch_size=1, num_workers=0)
    check_outputs(args, out=".json")
    features = parse_features(args.features)
    from maskgit_pl.evaluation import TokenizerOptions, evaluate_tokenizer

    names = (
        "num_images",
        "lpips",
        "tile",
        "tile_overlap",
        "classifier",
        "batch_size",
        "num_workers",
        "device",
        "dtype",
    )
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
