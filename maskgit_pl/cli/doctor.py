"""``maskgit doctor``: checks that a run can start and fits, before it asks for nodes; or what this machine has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from maskgit_pl import runs
from maskgit_pl.checks import check_choice
from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import RunFlags, print_json
from maskgit_pl.errors import BAD_INPUT
from maskgit_pl.files import parse_size
from maskgit_pl.runs.recipe import Stage
from maskgit_pl.training.gpus import GPUS

__all__ = ["doctor"]


def _parse_gpu(flag: str, text: str) -> str:
    return check_choice(flag, text, GPUS)


def _parse_memory(flag: str, text: str) -> float:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


@dataclass(frozen=True)
class MachineFlags:
    """The machines of a run.

    Args:
        nodes: Number of nodes (default: the recipe's).
        devices: Devices of each node (default: the recipe's).
        device: GPU whose memory is known.
        device_memory: Memory of a device, such as 80GB or 24GiB.
    """

    nodes: int | None = None
    devices: int | None = None
    device: Annotated[str, Word("|".join(GPUS), _parse_gpu)] | None = None
    device_memory: Annotated[float, Word("SIZE", _parse_memory)] | None = None


def doctor(
    stage: Stage | None = None,
    *,
    json: bool = False,
    run: RunFlags = RunFlags(),
    machines: MachineFlags = MachineFlags(),
    overrides: Sequence[str] = (),
) -> int:
    """Checks a run before it starts: recipe, data, batch, memory, disk; or this machine.

    It takes the arguments of `maskgit train`, trains nothing, and works on any machine. Without a stage, it checks this
    machine. The exit code is 0 if all checks pass, else 2.

    Example: maskgit doctor transformer --recipe paper-256 --cluster fsdp --nodes 4 --devices 8

    Args:
        stage: Stage of the run.
        json: Print JSON, an object with ok, checks and figures.
    """
    if stage is None:
        if run != RunFlags() or machines != MachineFlags() or overrides:
            raise ValueError("stage must be tokenizer or transformer for a run, got none; put it after `doctor`")
        found = runs.preflight()
    else:
        planned = runs.Machines(machines.nodes, machines.devices, machines.device, machines.device_memory)
        found = runs.Preflight()
        with found.catch("recipe"):
            recipe = run.read(stage, overrides)
            found = runs.preflight(recipe, **run.folders(recipe), machines=planned)
    if json:
        print_json(found.as_dict())
    elif sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(found)
    else:
        print(found)
    return 0 if found.ok else BAD_INPUT
