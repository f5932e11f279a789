"""``runs.fit``: finds the folders of a run and builds its values, before Lightning is imported to train it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from maskgit_pl.processes import catch_stop_signals
from maskgit_pl.runs.plan import Folders, merge_values, plan_run, read_inputs
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import resolve

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from maskgit_pl.runs.fitting import FitResult


def fit(recipe: Recipe, *, callbacks: Sequence[Callback] = (), **folders: Unpack[Folders]) -> FitResult:
    """Trains a stage of a run and exports it. Resumes an interrupted run, and does nothing for a finished one.

    During training, SIGTERM and a first Ctrl-C save the run and raise PreemptedError; the same call resumes it. With
    several ranks, an error that only one rank has ends its process with the exit code of the command, and the other
    ranks, which would wait for it, with 70. A step that hangs ends the process with 70, too.

    Args:
        recipe: Values of the run, and the stage.
        callbacks: Callbacks of the Trainer, beside those of the recipe.
        folders: See ``Folders``.

    Raises:
        FileNotFoundError: if data, tokenizer or pretrained folder do not exist.
        ValueError: if the recipe is invalid, data or tokenizer do not fit, an output cannot be written, the
            settings of the run have changed, or another process trains it.
        FileExistsError: if there are other files in the folder of the export.
        RunError: if training ends early: a stop signal, unreadable data, a full disk, non-finite losses. See
            ``maskgit_pl.errors``.
        KeyboardInterrupt: at a second Ctrl-C. The same call resumes the run from its last checkpoint.
    """
    plan = plan_run(recipe, **folders)
    inputs = read_inputs(plan)
    values = resolve(recipe.kind, merge_values(plan, inputs))
    from maskgit_pl.runs.fitting import fit_stage  # Lightning takes seconds to import

    try:
        with catch_stop_signals():
            return fit_stage(plan, callbacks, inputs=inputs, values=values)
    except SystemExit as stop:
        # Lightning turns KeyboardInterrupt into SystemExit, which would end a notebook's kernel.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
