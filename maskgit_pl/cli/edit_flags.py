"""Flags of the commands that change an image, or make one larger than the model's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from maskgit_pl.cli.flags import use_flag_names

__all__ = ["add_overlap_argument", "add_variant_arguments", "check_overlap_flag", "make_captions", "read_edit_flags"]


def add_variant_arguments(parser: argparse.ArgumentParser, *, dilation: int, class_required: bool = False) -> None:
    """Adds the flags of all commands that change an image."""
    suffix = "" if class_required else " (default: no class)"
    parser.add_argument(
        "--class", dest="class_", required=class_required, metavar="NAME", help=f"name or number of its class{suffix}"
    )
    parser.add_argument("--variants", type=int, default=4, metavar="N", help="results (default: 4)")
    parser.add_argument(
        "--blend",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="soften the seam; --no-blend keeps every pixel outside of the region as it is (default: --blend)",
    )
    text = f"tokens by which the region grows (default: {dilation})"
    parser.add_argument("--dilation", type=int, default=dilation, metavar="N", help=text)


def read_edit_flags(args: argparse.Namespace, label: int | None) -> dict[str, Any]:
    """Returns the options of ``MaskGIT``'s editing methods that the flags say."""
    return {
        "classes": [label] * args.variants,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dilation": args.dilation,
        "blend": None if args.blend else 0.0,
    }


def make_captions(args: argparse.Namespace) -> Sequence[str]:
    """Returns the text of each variant in pictures."""
    return [f"seed {args.seed + number}" for number in range(args.variants)]


def add_overlap_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says how much of a window is known before it is decoded."""
    parser.add_argument(
        "--overlap", type=float, default=0.5, metavar="S", help="share of a window that is known first (default: 0.5)"
    )


def check_overlap_flag(args: argparse.Namespace) -> None:
    """Checks ``--overlap``."""
    from maskgit_pl.editing import check_overlap

    with use_flag_names(args):
        check_overlap(args.overlap)
