"""Flags of the commands that measure: ``evaluate``, ``compare``, ``tune``, ``ablation``, ``table`` and ``figure``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import check_number
from maskgit_pl.cli.flags import (
    FOLDER,
    add_device_argument,
    add_dtype_argument,
    add_negative_model_argument,
    check_at_least,
    check_negative_model_flag,
    check_outputs,
    print_rows,
)
from maskgit_pl.runs.flag_values import parse_features, parse_numbers

if TYPE_CHECKING:
    from maskgit_pl.evaluation.pages import Page
    from maskgit_pl.evaluation.reports import ReportOptions

__all__ = [
    "add_cas_arguments",
    "add_feature_arguments",
    "add_measured_run_arguments",
    "add_report_arguments",
    "add_worker_argument",
    "read_cas_flags",
    "read_measuring_flags",
    "read_num_steps_flag",
    "read_report_flags",
    "write_page",
]

_FEATURES = "classifier,lite0"


def add_measured_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run to measure, and the data, seed, batch size and device."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder (runs/NAME) or pretrained folder")
    _add_measuring_arguments(parser)
    add_dtype_argument(parser, of="the transformer")
    add_negative_model_argument(parser)


def _add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (default: that of the training)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the first image; image i has seed + i (default: 0)"
    )
    parser.add_argument("--batch-size", type=int, default=100, metavar="N", help="images per batch (default: 100)")
    add_device_argument(parser)
    parser.add_argument(
        "--classifier",
        type=Path,
        metavar="DIR",
        help="folder of the classifier that judges images (default: runs/DATA-classifier/small)",
    )


def read_measuring_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of ``evaluation.options.MeasurementOptions`` from the flags."""
    if "negative_model" in args:
        check_negative_model_flag(args)
    fields = ("seed", "batch_size", "device", "dtype", "classifier", "negative_model")
    return {name: getattr(args, name) for name in fields if name in args}  # tables of several runs lack some


def read_num_steps_flag(args: argparse.Namespace) -> tuple[int, ...] | None:
    """Returns the numbers of ``--num-steps``, or None if it is not given."""
    return None if args.num_steps is None else parse_numbers("--num-steps", args.num_steps)


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--features`` and ``--reference``."""
    parser.add_argument(
        "--features",
        default=_FEATURES,
        metavar="A,B,...",
        help="feature networks: classifier, lite0, inception[=FILE], timm:MODEL=FILE, or mappings; the first one ranks "
        f"results (default: {_FEATURES})",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.npz",
        help="reference statistics or images of ADM, in place of the val split",
    )


def add_cas_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the classification accuracy score (CAS), up to the scale of the paper."""
    parser.add_argument("--cas-model", metavar="NAME", help="timm network of the classification accuracy score (CAS), "
                        "or none to skip it (default: resnet50, or resnet18 below 64 pixels)")  # fmt: skip
    parser.add_argument("--cas-max-steps", type=int, metavar="N", help="training steps of that network (default: 500)")
    parser.add_argument("--cas-batch-size", type=int, metavar="N", help="images per training step (default: 64)")
    parser.add_argument("--cas-learning-rate", type=float, metavar="X", help="peak learning rate (default: 1e-3)")
    parser.add_argument(
        "--cas-precision", choices=("32-true", "bf16-mixed"), help="training precision (default: 32-true)"
    )


def read_cas_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of ``evaluation.CASConfig`` from the flags of ``add_cas_arguments``, after checks."""
    check_at_least(args, cas_max_steps=1, cas_batch_size=2)
    if args.cas_learning_rate is not None:
        check_number("--cas-learning-rate", args.cas_learning_rate, "(0, inf)")
    # Flags that are not given are left out, so that the defaults of CASConfig apply.
    given = {
        "model": args.cas_model,
        "max_steps": args.cas_max_steps,
        "batch": args.cas_batch_size,
        "peak_rate": args.cas_learning_rate,
        "precision": args.cas_precision,
    }
    return {name: value for name, value in given.items() if value is not None}


def add_worker_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--num-workers``."""
    parser.add_argument("--num-workers", type=int, default=0, metavar="N",
                        help="processes that read images (default: 0)")  # fmt: skip


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the commands that write tables and figures; ``read_report_flags`` reads them."""
    _add_measuring_arguments(parser)
    parser.add_argument(
        "--num-images", type=int, default=1000, metavar="N", help="images generated for each row (default: 1000)"
    )
    add_feature_arguments(parser)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder of the pages and the ledger, whose measurements are reused (default: results)",
    )
    add_worker_argument(parser)


def read_report_flags(args: argparse.Namespace, **beside: Any) -> ReportOptions:
    """Returns the options from the flags of ``add_report_arguments``, after checks, and further ones."""
    from maskgit_pl.evaluation.reports import ReportOptions

    check_at_least(args, num_images=2, batch_size=1, num_workers=0)
    check_outputs(args, results=FOLDER)
    return ReportOptions(
        **read_measuring_flags(args),
        num_workers=args.num_workers,
        data=args.data,
        num_images=args.num_images,
        features=tuple(parse_features(args.features)),
        reference=args.reference,
        results=args.results,
        **beside,
    )


def write_page(page: Page, *, as_json: bool = False) -> None:
    """Writes a page to its folder, and prints the page and its files, or its rows as JSON."""
    files = page.write()
    if as_json:
        print_rows(page.rows, as_json=True)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    # Rich draws tables on a terminal; a file gets the Markdown itself.
    console.print(Markdown(page.markdown)) if console.is_terminal else print(page.markdown)
    print(f"{page.folder}: {', '.join(file.name for file in files)}")
