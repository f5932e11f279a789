"""Functions that call commands and check their answers, and the image that tests edit."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch

from maskgit_pl.cli import _call, _parse


class Answer(NamedTuple):
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    error: str


def call_command(command: str, *words: object) -> int:
    """Runs a command without what ``main`` makes of an error."""
    return _call(_parse((command, *map(str, words))))


def refused(answer: Answer, *parts: str) -> None:
    """Checks for exit code 2 and one line that has all parts."""
    assert answer.code == 2, answer
    assert len(answer.error.splitlines()) == 1, answer.error
    for part in parts:
        assert part in answer.error


def pixels(height: int = 8, width: int = 8) -> torch.Tensor:
    """Returns (H, W) uint8, always the same."""
    return torch.randint(0, 256, (height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yields every command with its words, including subcommands."""
    yield " ".join(words), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from parsers(inner, (*words, word))
