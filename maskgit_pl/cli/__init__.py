"""The console script ``maskgit``: one file a command, imported when it is called."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from maskgit_pl.cli import (
    ablation,
    compare,
    data,
    doctor,
    edit,
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
from maskgit_pl.errors import INTERNAL_ERROR, exit_code_of
from maskgit_pl.text import PrintableFormatter

__all__ = ["build_parser", "main"]

_COMMANDS = (
    data,
    doctor,
    train,
    slurm,
    tokenize,
    export,
    sample,
    inpaint,
    outpaint,
    edit,
    panorama,
    evaluate,
    compare,
    tune,
    ablation,
    paper,
    train_classifier,
    schedules,
    import_jax,
    import_taming,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the console script, every command in it."""
    parser = argparse.ArgumentParser(
        prog="maskgit",
        description="MaskGIT: train a tokenizer and a masked token transformer, generate images in a few steps.",
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _log_to_terminal() -> None:
    """Our own messages, plain; other libraries' handlers are left alone."""
    ours = logging.getLogger("maskgit_pl")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(PrintableFormatter("%(message)s"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Words after ``maskgit``; those of the process by default.

    Returns:
        Exit code: 0 done, 2 bad input, 70 internal error, or that of a ``RunError``; argparse exits with 2 itself.
    """
    # Threads that spin for work starve each other where other programs run too: a training step on two busy cores took
    # 1.8 s with spinning threads and 0.1 s with waiting ones. Read when torch is imported, which happens in a command.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", message=".*`srun` command is available")  # Lightning's, on a login node
    _log_to_terminal()
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    try:
        code: int = args.run(args)
    except Exception as error:
        if args.traceback:
            raise
        code = exit_code_of(error)
        text = traceback.format_exc() if code == INTERNAL_ERROR else f"maskgit {args.command}: {error}\n"
        try:
            sys.stderr.write(text)
        except OSError:  # a full disk, or nobody who reads: Python would end with a code of its own
            sys.stderr = io.StringIO()
    return code
