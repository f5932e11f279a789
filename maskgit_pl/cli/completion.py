"""``maskgit completion``: prints a script with which a shell completes commands, flags and files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

__all__ = ["add_completion_parser"]

SHELLS = ("bash", "zsh")


def add_completion_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    *,
    build_parser: Callable[[], argparse.ArgumentParser],
) -> None:
    """Adds the command to ``maskgit``.

    Args:
        subparsers: The commands.
        build_parser: Returns the parser of all commands.
    """
    parser = subparsers.add_parser(
        "completion",
        help="print a script for the completion of commands and flags in a shell",
        description="Print a script that completes commands, flags and files. For bash, add the line of the example to "
        "~/.bashrc. For zsh, write the output to a file named _maskgit in a folder of $fpath.",
        epilog='Example: eval "$(maskgit completion bash)"',
    )
    parser.add_argument("shell", choices=SHELLS, help="shell that reads the script")
    parser.set_defaults(run=lambda args: _run_completion(args, build_parser()))


def _run_completion(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Prints the script."""
    import shtab

    _complete_files(parser)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Marks the arguments that are paths, in the parser and in those of its commands."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner)
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # read by shtab
