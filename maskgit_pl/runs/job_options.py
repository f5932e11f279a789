"""What a job asks Slurm for. Imports no torch, so that a wrong option is refused at once."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from maskgit_pl.checks import check_integer, shorten

__all__ = ["JobOptions"]

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d(:\d\d)?)?|UNLIMITED|INFINITE", re.IGNORECASE)
_NODES = "the number of nodes is an option of its own, and the batch is shared out by it"
_TASKS = "the number of devices is an option of its own, and each gets a task"
_REFUSED = {
    "--nodes": _NODES, "-N": _NODES, "--ntasks": _TASKS, "-n": _TASKS, "--ntasks-per-node": _TASKS,
    "--array": "several jobs would train one run", "-a": "several jobs would train one run",
    "--chdir": "paths are relative to this folder", "-D": "paths are relative to this folder",
    "--comment": "the job of a run is found in the queue by it",
    "--export": "the script needs all variables that it is submitted with",
    "--wrap": "the job is the script",
}  # fmt: skip


@dataclass(frozen=True)
class JobOptions:
    """The nodes, devices and limits of a job, and how its tasks are started.

    Attributes:
        nodes: Number of nodes, at least 1.
        devices: Devices, and tasks, of each node, at least 1.
        cpus: CPU cores of a task, at least 1; None takes one, and one for each worker of the data.
        time: Time limit of each start, as Slurm writes it: ``90`` (minutes), ``24:00:00``, ``7-0``.
        partition: Partition; None takes the cluster's default.
        account: Account that is charged, if any.
        qos: Quality of service, if any.
        constraint: Features that the nodes must have, if any.
        sbatch: Further options of ``sbatch``, as in a shell.
        srun: Further options of ``srun``, as in a shell.
        container: Command that starts each task, as in a shell, such as ``apptainer exec --nv image.sif``.
        program: ``maskgit`` on the nodes; None takes this one, or with a container the one on its PATH.

    Raises:
        ValueError: if a number is out of range, ``time`` is not a time, a text is not words of a shell, or ``sbatch``
            has an option that the job needs itself.
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
                f"time must be a time of Slurm, such as 90 (minutes), 24:00:00 or 7-0, got {shorten(self.time)}"
            )
        for name in ("sbatch", "srun", "container"):
            _split(name, getattr(self, name))
        for flag, _ in _flags(self.sbatch_words):
            if flag in _REFUSED:
                raise ValueError(f"sbatch must not have {flag}: {_REFUSED[flag]}; leave it out of --sbatch")

    @property
    def sbatch_words(self) -> list[str]:
        """Words of ``sbatch``."""
        return _split("sbatch", self.sbatch)

    @property
    def names_gpus(self) -> bool:
        """Whether ``sbatch`` says which GPUs the job gets.

        If there are two ways of asking, sbatch takes both and hands both to srun: a count of 0 in one leaves the tasks
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
        raise ValueError(f"{name} must be words as in a shell, got {text!r} ({error}); close the quotes") from error


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields each option with its value, ``-N2`` as ``-N`` and ``2``."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            yield flag, value if equals else following
        elif word.startswith("-"):
            yield word[:2], word[2:] or following
