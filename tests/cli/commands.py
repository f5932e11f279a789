"""How tests call a command, and the image that they edit."""

import argparse
from types import ModuleType

import torch


def call_command(module: ModuleType, *words: object) -> int:
    """Runs the command that a module is named after, without what ``main`` makes of an error: it stays an exception."""
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    args = parser.parse_args([module.__name__.rpartition(".")[2], *map(str, words)])
    code: int = args.run(args)
    return code


def pixels(height: int = 8, width: int = 8) -> torch.Tensor:
    """(H, W) uint8, always the same."""
    return torch.randint(0, 256, (height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
