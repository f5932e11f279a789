"""Flags of the editing commands ``inpaint``, ``edit``, ``outpaint`` and ``panorama``."""

from __future__ import annotations

import argparse
from typing import Any

from maskgit_pl.checks import check_integer
from maskgit_pl.cli.flags import use_flag_names

__all__ = [
    "add_overlap_argument",
    "add_variant_arguments",
    "check_overlap_flag",
    "check_variant_flags",
    "list_seeds",
    "read_edit_flags",
]


def add_variant_arguments(parser: argparse.ArgumentParser, *, dilation: int, class_required: bool = False) -> None:
    """Adds the flags of ``inpaint``, ``edit`` and ``outpaint``."""
    suffix = "" if class_required else " (default: no class)"
    parser.add_argument(
        "--class", dest="class_", required=class_required, metavar="NAME", help=f"class name or index{suffix}"
    )
    parser.add_argument("--variants", type=int, default=4, metavar="N", help="number of results (default: 4)")
    parser.add_argument(
        "--blend",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="blur the seam; --no-blend keeps every pixel outside the region unchanged (default: --blend)",
    )
    text = f"tokens by which the region grows on each side (default: {dilation})"
    parser.add_argument("--dilation", type=int, default=dilation, metavar="N", help=text)


def check_variant_flags(args: argparse.Namespace) -> None:
    """Checks ``--variants`` and ``--dilation``."""
    from maskgit_pl.pipeline.options import MAX_RESULTS
    from maskgit_pl.pipeline.regions import check_dilation

    check_integer("--variants", args.variants, f"[1, {MAX_RESULTS}]")
    with use_flag_names(args):
        check_dilation(args.dilation)


def read_edit_flags(args: argparse.Namespace, label: int | None) -> dict[str, Any]:
    """Returns the options of ``MaskGIT``'s editing methods from the flags."""
    return {
        "classes": [label] * args.variants,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dilation": args.dilation,
        "blend": None if args.blend else 0.0,
    }


def list_seeds(args: argparse.Namespace) -> list[int]:
    """Returns the seed of each variant."""
    return [args.seed + number for number in range(args.variants)]


def add_overlap_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--overlap`` for commands that fill a canvas window by window."""
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        metavar="F",
        help="fraction of a window that is known before it is decoded (default: 0.5)",
    )


def check_overlap_flag(args: argparse.Namespace) -> None:
    """Checks ``--overlap``."""
    from maskgit_pl.pipeline.editing_canvas import check_overlap

    with use_flag_names(args):
        check_overlap(args.overlap)
