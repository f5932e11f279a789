"""A function that calls a command, and the image that tests edit."""

import argparse
from types import ModuleType

import torch

from maskgit_pl.cli import _flags_of


def call_command(module: ModuleType, *words: object, command: str | None = None) -> int:
    """Runs a command without what ``main`` makes of an error; by default the one that its module is named after."""
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    words = (command or module.__name__.rpartition(".")[2], *map(str, words))
    args = parser.parse_args(words)
    args.flags = _flags_of(parser, words)
    code: int = args.run(args)
    return code


def pixels(height: int = 8, width: int = 8) -> torch.Tensor:
    """Returns (H, W) uint8, always the same."""
    return torch.randint(0, 256, (height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
