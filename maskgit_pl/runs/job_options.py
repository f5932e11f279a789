"""The options of a Slurm job. Imports no torch, so that invalid options are rejected immediately."""

from __future__ import annotations

import itertools
import operator
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from maskgit_pl.checks import check_integer, shorten

__all__ = ["JobOptions"]

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d(:\d\d)?)?|UNLIMITED|INFINITE", re.IGNORECASE)
_NODES = "it is set by --nodes of this command, which also divides the batch"
_TASKS = "it follows --devices of this command, with one task per device"
_LIMIT = "it is set by --time of this command, which must leave time to save"
_REFUSED = {
    "--nodes": _NODES, "-N": _NODES, "--ntasks": _TASKS, "-n": _TASKS, "--ntasks-per-node": _TASKS,
    "--time": _LIMIT, "-t": _LIMIT,
    "--array": "several jobs would train the same run", "-a": "several jobs would train the same run",
    "--chdir": "paths are relative to the current folder", "-D": "paths are relative to the current folder",
    "--comment": "it identifies the job of a run in the queue",
    "--export": "the script needs all variables of the submission",
    "--wrap": "the job runs a script of its own",
}  # fmt: skip
_REFUSED_OF_TASKS = {flag: reason for flag, reason in _REFUSED.items() if reason in (_NODES, _TASKS)}
_SIGNAL_LEAD = 120  # seconds between the signal to save and the time limit, of recipes/slurm/train.sbatch

_SIGNALS = ("USR1", "USR2", "TERM", "INT", "10", "12", "15", "2")  # which script and training catch


@dataclass(frozen=True)
class JobOptions:
    """The nodes, devices and limits of a job, and how its tasks are started.

    Attributes:
        nodes: Number of nodes, >= 1.
        devices: Number of devices, and of tasks, per node, >= 1.
        cpus: CPU cores per task, >= 1; None means one plus one per data worker.
        time: Time limit of each start in Slurm's format: ``90`` (minutes), ``24:00:00``, ``7-0``.
        partition: Partition; None means the cluster's default.
        account: Account to charge, if any.
        qos: Quality of service, if any.
        constraint: Required features of the nodes, if any.
        sbatch: Additional ``sbatch`` options, in shell syntax.
        srun: Additional ``srun`` options, in shell syntax.
        container: Command that starts each task, in shell syntax, such as ``apptainer exec --nv image.sif``.
        program: ``maskgit`` on the nodes; None means this one, or with a container the one on its PATH.

    Raises:
        ValueError: if a number is out of range, ``time`` is not a time, a string is not valid shell syntax, or
            ``sbatch`` or ``srun`` has an option that the job sets itself, or a word that is no option.
    """

    nodes: int = 1
    devices: int = 8
    cpus: int | None = None
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: str = ""
    srun: str = ""
    container: str = ""
    program: str | None = None

    def __post_init__(self) -> None:
        check_integer("nodes", self.nodes, "[1, inf)")
        check_integer("devices", self.devices, "[1, inf)")
        if self.cpus is not None:
            check_integer("cpus", self.cpus, "[1, inf)")
        if not _TIME.fullmatch(self.time):
            raise ValueError(
                f"time must be a Slurm time such as 90 (minutes), 24:00:00 or 7-0, got {shorten(self.time)}"
            )
        self._check_texts()
        self._check_signal()

    def _check_texts(self) -> None:
        for name in ("sbatch", "srun", "container"):
            words = _split(name, getattr(self, name))
            # The script reads the words of srun and container with xargs, which takes no line breaks in quotes.
            if name != "sbatch" and any("\n" in word for word in words):
                raise ValueError(
                    f"{name} must have no line break within a word, got {getattr(self, name)!r}; write it in one line"
                )
        for name, refused in (("sbatch", _REFUSED), ("srun", _REFUSED_OF_TASKS)):
            words = _split(name, getattr(self, name))
            _check_words(name, words)
            for flag, _ in _flags(words):
                if flag in refused:
                    raise ValueError(f"{name} must not have {flag}: {refused[flag]}; leave it out of --{name}")

    def _check_signal(self) -> None:
        limit, lead = _limit_seconds(self.time), _SIGNAL_LEAD
        for value in (value for flag, value in _flags(self.sbatch_words) if flag == "--signal"):
            name, _, seconds = value.partition("@")
            if name.rpartition(":")[2].upper().removeprefix("SIG") not in _SIGNALS:
                raise ValueError(
                    f"sbatch must have a --signal at which training saves, got {shorten(value)}; use USR1@SECONDS"
                )
            lead = int(seconds) if seconds.isdecimal() else _SIGNAL_LEAD
        # A job that is told to save as soon as it starts would be requeued again and again.
        if 0 < limit <= lead:
            raise ValueError(
                f"time must be longer than the {lead} s before its end when the job saves, got {self.time}; give a "
                'longer --time, or another --sbatch="--signal=USR1@SECONDS"'
            )

    @property
    def sbatch_words(self) -> list[str]:
        """The options in ``sbatch`` as a list of words."""
        return _split("sbatch", self.sbatch)

    @property
    def srun_text(self) -> str:
        """The options in ``srun`` with quotes that the script, which uses ``xargs``, reads as a shell does."""
        return shlex.join(_split("srun", self.srun))

    @property
    def container_text(self) -> str:
        """The command in ``container`` with such quotes."""
        return shlex.join(_split("container", self.container))

    @property
    def output(self) -> str | None:
        """The log file that ``sbatch`` names with ``--output``, as it is written there; None if it names none."""
        named = [value for flag, value in _flags(self.sbatch_words) if flag in ("--output", "-o")]
        return named[-1] if named else None

    @property
    def names_gpus(self) -> bool:
        """A bool: ``sbatch`` already requests GPUs.

        A second request must not be added: sbatch passes both to srun, and a count of 0 in one of them leaves the tasks
        without GPUs.
        """
        return any(
            flag == "-G" or flag.startswith("--gpus") or (flag == "--gres" and ("gpu" in value or value == "none"))
            for flag, value in _flags(self.sbatch_words)
        )


def _split(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name} must be valid shell syntax, got {text!r} ({error}); close the quotes") from error


def _limit_seconds(text: str) -> int:
    """Returns a time limit in seconds, which Slurm rounds up to minutes; 0 for no limit."""
    if not text[0].isdecimal():
        return 0
    days, dash, rest = text.rpartition("-")
    parts = list(map(int, rest.split(":")))
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds: int = 86400 * int(days or 0) + sum(map(operator.mul, parts, units))
    return -(-seconds // 60) * 60


def _check_words(name: str, words: Sequence[str]) -> None:
    """Checks that words are options with values: sbatch and srun take another word for the program to run."""
    for before, word in itertools.pairwise(["", *words]):
        is_value = before.startswith("-") and "=" not in before
        if word == "--" or not (word.startswith("-") or is_value):
            raise ValueError(
                f"{name} must be options, got the word {shorten(word)}, which would be run in place of the training; "
                "write an option as --NAME=VALUE"
            )


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields each option with its value; ``-N2`` gives ``-N`` and ``2``."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            yield flag, value if equals else following
        elif word.startswith("-"):
            yield word[:2], word[2:] or following
