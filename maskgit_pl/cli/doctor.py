"""``maskgit doctor``: checks that a run can start and fits, before it asks for nodes; or what this machine has."""

from __future__ import annotations

from collections.abc import Sequence

from maskgit_pl import runs
from maskgit_pl.cli.flags import RunFlags, print_json
from maskgit_pl.errors import BAD_INPUT
from maskgit_pl.runs.recipe import Stage
from maskgit_pl.training.gpus import Machines

__all__ = ["doctor"]


def doctor(
    stage: Stage | None = None,
    *,
    json: bool = False,
    run: RunFlags = RunFlags(),
    machines: Machines = Machines(),
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
        if run != RunFlags() or machines != Machines() or overrides:
            raise ValueError("stage must be tokenizer or transformer for a run, got none; put it after `doctor`")
        found = runs.preflight()
    else:
        found = runs.Preflight()
        with found.catch("recipe"):
            recipe = run.read(stage, overrides)
            found = runs.preflight(recipe, **run.folders(recipe), machines=machines)
    print_json(found.as_dict()) if json else print(found)
    return 0 if found.ok else BAD_INPUT
