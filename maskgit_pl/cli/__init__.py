"""The console script ``maskgit``: one file a command, imported when it is called."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from maskgit_pl import __version__
from maskgit_pl.checks import did_you_mean, shorten
from maskgit_pl.cli import (
    ablation,
    compare,
    data,
    doctor,
    evaluate,
    export,
    import_jax,
    import_taming,
    inpaint,
    outpaint,
    panorama,
    paper,
    sample,
    schedules,
    slurm,
    tokenize,
    train,
    train_classifier,
    tune,
)
from maskgit_pl.errors import BAD_INPUT, CannotWriteError, describe_error, error_of_exit, exit_code_of
from maskgit_pl.terminal import Terminal
from maskgit_pl.text import PrintableFormatter

__all__ = ["build_parser", "main"]

_COMMANDS = (
    data, doctor, train, slurm, tokenize, export, sample, inpaint, outpaint, panorama, evaluate, compare, tune,
    ablation, paper, train_classifier, schedules, import_jax, import_taming,
)  # fmt: skip

_RENAMED_FLAGS = {  # flags of version 0.1.0 that have other names now
    "--batch": "--batch-size",
    "--cas-batch": "--cas-batch-size",
    "--cas-samples": "--cas-images",
    "--cas-steps": "--cas-max-steps",
    "--flip": "--flip-probability",
    "--guidance-schedule": "--guidance",
    "--likelihood-samples": "--likelihood-images",
    "--num-ranks": "--world-size",
    "--num-samples": "--num-images",
    "--part-samples": "--part-size",
    "--plot": "--out",
    "--runs": "--runs-folder",
    "--schedule": "--schedules",
    "--selector": "--token-selector",
    "--size": "--image-size",
    "--steps": "--num-steps",
    "--temperature": "--choice-temperature",
    "--workers": "--num-workers",
}


class _Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated flags; so are those of its commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the console script, every command in it."""
    return _parser_and_commands()[0]


def _parser_and_commands() -> tuple[argparse.ArgumentParser, list[str]]:
    parser: argparse.ArgumentParser = _Parser(
        prog="maskgit",
        description="MaskGIT: train a tokenizer and a masked token transformer, generate images in a few steps.",
    )
    parser.add_argument("--version", action="version", version=f"maskgit_pl {__version__}")
    parser.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser, list(commands.choices)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Words after ``maskgit``; those of the process by default. Without words, the help is printed.

    Returns:
        Exit code of the process; ``maskgit_pl.errors`` lists them.

    Raises:
        SystemExit: by argparse: 0 after ``--help`` and ``--version``, 2 after words that it does not know.
    """
    # Threads that spin for work starve each other where other programs run too: a training step on two busy cores took
    # 1.8 s with spinning threads and 0.1 s with waiting ones. Read when torch is imported, which happens in a command.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", message=".*`srun` command is available")  # Lightning's, on a login node
    terminal = Terminal()
    _log_to(terminal.log)
    try:
        code = _run(_parse(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # argparse's own
        if not stop.code and terminal.has_lost_results():
            raise SystemExit(CannotWriteError.exit_code) from stop
        raise
    return code or (CannotWriteError.exit_code if terminal.has_lost_results() else 0)


def _log_to(stream: TextIO) -> None:
    """Prints our own messages, plain; other libraries' handlers are left alone."""
    ours = logging.getLogger("maskgit_pl")
    if not ours.handlers:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(PrintableFormatter("%(message)s"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser, known = _parser_and_commands()
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in known:
        hint = f"{did_you_mean(name, known)} ".lstrip()
        parser.exit(BAD_INPUT, f"maskgit: unknown command {shorten(name)}: {hint}commands: {', '.join(known)}\n")
    if not words:
        parser.print_help()
        parser.exit()
    for word in words:
        if word.startswith("-") and word.endswith("=--"):  # argparse makes an empty list of it
            parser.exit(BAD_INPUT, f"maskgit: {word.removesuffix('=--')} must have a value, got '--'\n")
    args, rest = parser.parse_known_args([word for word in words if word != "--traceback"])
    for flag in (word.partition("=")[0] for word in rest):
        if flag in _RENAMED_FLAGS:
            parser.exit(BAD_INPUT, f"maskgit {args.command}: {flag} is now {_new_flag(flag, args.command)}\n")
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    args.traceback = "--traceback" in words
    return args


def _new_flag(flag: str, command: str) -> str:
    """Returns the present name of a flag of version 0.1.0."""
    if command == "train-classifier" and flag == "--steps":  # training steps; elsewhere they are decoding steps
        return "--max-steps"
    return _RENAMED_FLAGS[flag]


def _run(args: argparse.Namespace) -> int:
    """Runs the command that was parsed, and prints what it ends with if that is an error."""
    try:
        code: int = args.run(args)
        return code
    except SystemExit as stop:
        error = error_of_exit(stop)
        if error is None:
            return int(stop.code or 0)
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    sys.stderr.write(describe_error(error, f"maskgit {args.command}", with_traceback=args.traceback))
    return exit_code_of(error)
