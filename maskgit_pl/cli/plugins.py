"""``maskgit plugins``: lists the names of all registries, and the package that each name comes from."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import check_choice
from maskgit_pl.cli.tables import add_json_argument, print_rows

if TYPE_CHECKING:
    from maskgit_pl.registry import Registry

__all__ = ["REGISTRIES", "add_parser", "run"]

REGISTRIES = {  # module of each registry, by the name of the registry
    "mask_schedules": "schedules",
    "mask_ratios": "mask_ratios",
    "mask_positions": "mask_positions",
    "objectives": "objectives",
    "corruptions": "corruption",
    "backbones": "networks.backbone",
    "quantizers": "networks.quantizers",
    "discriminators": "networks.discriminators",
    "perceptual_networks": "networks.perceptual",
    "feature_networks": "networks.features",
    "token_selectors": "decoding.token_selector",
    "guidance_schedules": "decoding.guidance",
    "augmentations": "data.augmentations",
    "optimizers": "training.optimizers",
    "learning_rate_schedules": "training.learning_rates",
    "loggers": "training.loggers",
    "callbacks": "training.callbacks",
    "profilers": "training.callbacks",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "plugins",
        help="list schedules, selectors, quantizers and all other parts that a recipe can name",
        description="List the names of every registry, each with the package that it comes from. Other packages add "
        "names with entry points in the group maskgit_pl.KIND. The command lists these names without loading them.",
        epilog="Example: maskgit plugins quantizers",
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"one of {', '.join(REGISTRIES)} (default: all)")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    if args.kind is not None:
        check_choice("KIND", args.kind, REGISTRIES)
    kinds = REGISTRIES if args.kind is None else [args.kind]
    print_rows([row for kind in kinds for row in _rows(kind)], as_json=args.json)
    return 0


def _rows(kind: str) -> list[dict[str, Any]]:
    registry: Registry[Any] = getattr(import_module(f"maskgit_pl.{REGISTRIES[kind]}"), kind)
    return [
        {"kind": kind, "name": name, "package": package, "description": registry.summary(name)}
        for name, package in registry.origins().items()
    ]
