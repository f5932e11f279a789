"""The console script ``maskgit``: builds the parser of the commands, runs one, and turns errors into exit codes.

Each command is a function of this folder or of ``contrib``; ``arguments`` makes its flags from its signature. The files
of the commands import no torch at their top, so that ``--help`` and wrong flags are answered at once.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn, TextIO

from maskgit_pl import __version__
from maskgit_pl.cli.arguments import add_command, fill_parser, flag_of, read_call, takes_overrides
from maskgit_pl.errors import BAD_INPUT, describe_error, exit_code_of, is_user_error
from maskgit_pl.text import PrintableFormatter, did_you_mean, shorten

__all__ = ["build_parser", "main", "run_script"]

_COMMANDS = {  # the function of each command, in the order of the help
    "demo": "cli.train:demo",
    "models": "cli.listing:models",
    "data make": "cli.data:make",
    "data index": "cli.data:index",
    "data tokens": "cli.data:tokens",
    "data verify": "cli.data:verify",
    "data fetch": "cli.data:fetch",
    "doctor": "cli.train:doctor",
    "train": "cli.train:train",
    "slurm submit": "cli.train:submit",
    "tokenize": "cli.train:tokenize",
    "distill": "cli.train:distill",
    "export": "cli.export:export",
    "push": "cli.export:push",
    "sample": "cli.sample:sample",
    "inpaint": "cli.editing:inpaint",
    "edit": "cli.editing:edit",
    "outpaint": "cli.editing:outpaint",
    "panorama": "cli.editing:panorama",
    "web": "cli.sample:web",
    "evaluate": "cli.evaluate:evaluate",
    "evaluate-tokenizer": "cli.evaluate:evaluate_tokenizer",
    "inspect": "contrib.inspect:inspect",
    "tune": "cli.evaluate:tune",
    "ablation": "cli.reports:ablation",
    "train-classifier": "cli.evaluate:train_classifier",
    "schedules": "cli.listing:schedules",
    "recipes list": "cli.listing:recipes_list",
    "recipes show": "cli.listing:recipes_show",
    "recipes copy": "cli.listing:recipes_copy",
    "recipes schema": "cli.listing:recipes_schema",
    "plugins": "cli.listing:plugins",
    "env": "cli.listing:env",
    "import-jax": "cli.export:import_jax",
    "import-tokenizer": "cli.export:import_tokenizer",
    "import-transformer": "cli.export:import_transformer",
}
_HABITS = {"import-taming": "import-tokenizer", "generate": "sample", "budget": "recipe"}  # other words -> ours
_GROUPS = {  # commands that have commands
    "data": "Fetches, makes, indexes and verifies shards of images.",
    "slurm": "Trains on a Slurm cluster with jobs that save before their time limit and requeue themselves.",
    "recipes": "Lists, shows and copies the recipes that --recipe can name.",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_HANDLER = logging.StreamHandler()  # prints the log of the package


class _HelpFormatter(argparse.HelpFormatter):
    """A formatter that breaks no line inside ``--num-steps`` or a command of an example, which people copy."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("Example: "):
            return text.replace("Example: ", "Example:\n  ", 1)
        lines = self._split_lines(text, width - len(indent))
        return "\n".join(indent + line for line in lines)


class _Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated flags, and tells an error in one line. Its subparsers have this class too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        # argparse takes "--sbatch --mem=0" for two flags.
        hint = "; give a value that begins with - as FLAG=VALUE" if message.endswith("expected one argument") else ""
        self.exit(BAD_INPUT, f"{self.prog}: {message.removeprefix('argument ')}{hint}; see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # The function of a command reads the choices of a flag.
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            hint = f"{did_you_mean(_HABITS.get(value, value), action.choices)} ".lstrip()
            listed = ", ".join(action.choices)
            self.exit(BAD_INPUT, f"{self.prog}: unknown command {shorten(value)}: {hint}commands: {listed}\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of the console script.

    Args:
        command: First word of the only commands that it has; all commands if there is no such command.
    """
    parser: argparse.ArgumentParser = _Parser(
        prog="maskgit",
        description="MaskGIT in PyTorch Lightning: train a VQGAN tokenizer and a masked token transformer, and "
        "generate images in a few parallel decoding steps.",
        epilog="Each command has its own --help. Start with `maskgit demo`.",
    )
    parser.add_argument("--version", action="version", version=f"maskgit_pl {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="print the traceback when a command ends with an error"
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    groups: dict[str, Any] = {}
    only = [name for name in _COMMANDS if name.split()[0] == command]
    for name in only or _COMMANDS:
        group, _, inner = name.rpartition(" ")
        if group and group not in groups:
            text = _GROUPS[group]
            child = commands.add_parser(group, help=f"{text[0].lower()}{text[1:-1]}", description=text)
            groups[group] = child.add_subparsers(title="commands", dest="inner", required=True, metavar="COMMAND")
        module, function = _COMMANDS[name].split(":")
        add_command(groups.get(group, commands), inner, getattr(import_module(f"maskgit_pl.{module}"), function))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Command line without ``maskgit``; ``sys.argv[1:]`` by default. An empty one prints the help.

    Returns:
        The exit code of the process. ``maskgit_pl.errors`` lists all codes.

    Raises:
        SystemExit: raised by argparse, with 0 after ``--help`` and ``--version``, and with 2 for unknown arguments.
    """
    _prepare()
    args = _parse(sys.argv[1:] if argv is None else argv)
    _print_log(sys.stderr if getattr(args, "json", False) else sys.stdout)  # stdout has only the JSON
    return _run(args)


def run_script(function: Callable[..., Any], *, prog: str, argv: Sequence[str] | None = None) -> int:
    """Runs a function as the command line of a script, with the flags, errors and exit codes of a ``maskgit`` command.

    Args:
        function: Function whose signature and docstring give the arguments and the help; see ``arguments``.
        prog: Words that start the script, for its help and its errors, such as ``python -m paper.table_1``.
        argv: Arguments of the script; ``sys.argv[1:]`` by default.

    Returns:
        The exit code of the process.

    Raises:
        SystemExit: raised by argparse. See ``main``.
    """
    _prepare()
    parser = _Parser(prog=prog)
    parser.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    fill_parser(parser, function)
    args = parser.parse_args(argv)
    args.rest = []
    _print_log(sys.stdout)
    return _run(args)


def _prepare() -> None:
    """Sets what torch reads when it is imported, and opens the streams of a command."""
    # OpenMP threads that sleep between two operations take as long to wake as a small one takes; threads that spin all
    # the time slow each other down on a busy machine. So they spin for a short while first. Steps per second of the
    # demo's transformer, which runs 11 on one thread: two threads that sleep 10, spin 17, and do both 15; beside two
    # other programs 6, 2, and 5. torch reads the variables when it is imported, which happens inside a command.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # On a busy machine MKL takes fewer threads by default. Sums then round differently from run to run.
    for name in ("MKL_DYNAMIC", "OMP_DYNAMIC"):
        os.environ.setdefault(name, "FALSE")
    _keep_freed_memory()
    _open_streams()


class _Stream(io.FileIO):
    """An output without a buffer: a line that cannot be written is an error there and then, not again at the end."""

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:  # a disk that is nearly full takes a part
            rest = rest[os.write(self.fileno(), rest) :]
        return len(data)


def _open_streams() -> None:
    """Gives stdout and stderr no buffer, and the null device in place of one that is closed (``>&-``)."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # a file would get the number of a closed stream
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not that of a test or a notebook
            raw: Any = _Stream(descriptor, "w", closefd=False)
            encoding = getattr(stream, "encoding", "utf-8")
            # Letters that the encoding lacks are no reason to end.
            new = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, new)


def _keep_freed_memory() -> None:
    """Lets glibc keep up to 1 GiB of freed memory.

    By default it returns each large tensor to the system, and the next one costs a page fault for every 4 KiB: on
    CPUs, a training step of a tokenizer takes 1.05 to 1.15 times as long, and sampling 1.03 to 1.33 times. Other C
    libraries have no ``mallopt``.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_TRIM_THRESHOLD, 2**30)
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes


def _print_log(stream: TextIO) -> None:
    """Prints the log of this package as plain lines, and leaves the handlers of other libraries as they are."""
    logging.raiseExceptions = False  # no traceback for each line that cannot be written, such as on a full disk
    ours = logging.getLogger("maskgit_pl")
    if not ours.handlers:
        _HANDLER.setFormatter(PrintableFormatter("%(message)s"))
        ours.addHandler(_HANDLER)
    _HANDLER.stream = stream
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the words of the arguments that are given, the function of the command and its parser."""
    parser = build_parser(words[0] if words else None)
    if not words:
        parser.print_help()
        parser.exit()
    if words[0].startswith("-") and words[0] not in parser._option_string_actions:  # argparse asks for a command first
        hint = _nearest_flag(words[0].lstrip("-"), _flags_of(parser))
        parser.exit(BAD_INPUT, f"maskgit: unknown argument {words[0]}{hint and f'; {hint}'}; see maskgit --help\n")
    # --traceback may stand anywhere, also after the command. What argparse does not know is a key of a recipe
    # (--trainer.max_steps) for the commands that take overrides, and a mistake for all others.
    args, rest = parser.parse_known_args([word for word in words if word != "--traceback"])
    if rest and not takes_overrides(args.function):
        hint = _nearest_flag(rest[0].partition("=")[0].lstrip("-"), _flags_of(args.parser))
        args.parser.exit(BAD_INPUT, f"{args.parser.prog}: unknown argument {' '.join(rest)}{hint and f'; {hint}'}\n")
    args.rest = rest
    args.traceback = "--traceback" in words
    return args


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Returns the flags of a command, without dashes."""
    return [flag.removeprefix("--") for flag in parser._option_string_actions if flag.startswith("--")]


def _nearest_flag(name: str, flags: Sequence[str]) -> str:
    """Returns a hint with the flag closest to a name. Dashes are not compared: they would make all flags alike."""
    return did_you_mean(_HABITS.get(name, name), flags).replace(" '", " '--")


def _run(args: argparse.Namespace) -> int:
    """Runs the parsed command and returns its exit code; prints the error that ends it."""
    try:
        return _call(args)
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):  # the exit code also tells the reason, where stderr is on a full disk
            sys.stderr.write(describe_error(error, args.parser.prog, with_traceback=args.traceback))
        return exit_code_of(error)


def _call(args: argparse.Namespace) -> int:
    """Calls the function of the command; returns its exit code, 0 for None.

    Functions name their own arguments in errors, but the user of a command knows the flags: a ValueError that begins
    with a setting (``num_steps must ...``) begins with its flag instead.
    """
    from maskgit_pl.processes import check_launcher  # after --help and --version

    try:
        check_launcher()
        return args.function(**read_call(args.function, vars(args), args.rest)) or 0
    except ValueError as error:
        flags, text = _flags_of(args.parser), str(error)
        # No key of a recipe, but a flag of the command with a typing mistake.
        key = re.match(r"flag --([\w-]+)(?:: unknown key| must have a value)", text)
        if key is not None and "did you mean" not in text and (hint := _nearest_flag(key[1], flags)):
            raise ValueError(f"unknown argument --{key[1]}; {hint}") from error
        # "num_steps must be ..." -> num_steps; "height of the image must ..." -> height, no flag of the command.
        setting = re.match(r"([a-z_]+) must ", text)
        if setting is None or not is_user_error(error) or flag_of(setting[1]).removeprefix("--") not in flags:
            raise
        raise ValueError(text.replace(setting[1], flag_of(setting[1]), 1)) from error
