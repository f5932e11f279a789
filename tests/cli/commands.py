"""A function that calls a command, and the image that tests edit."""

import torch

from maskgit_pl.cli import _call, _parse


def call_command(command: str, *words: object) -> int:
    """Runs a command without what ``main`` makes of an error."""
    return _call(_parse((command, *map(str, words))))


def pixels(height: int = 8, width: int = 8) -> torch.Tensor:
    """Returns (H, W) uint8, always the same."""
    return torch.randint(0, 256, (height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
