"""Runs from Python: ``Recipe`` reads what a run is, ``fit`` trains it; each command of the command line is one call.

::

    from maskgit_pl import runs

    recipe = runs.Recipe.read("tokenizer", overrides={"trainer.max_steps": 500})
    result = runs.fit(recipe, run="demo", data="data/shards/fashion-mnist")

What the commands print goes to the logger ``maskgit_pl``; ``logging.basicConfig(level="INFO")`` shows it.

The names are imported when they are first used; torch and Lightning when something is trained.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskgit_pl.runs.exporting import export
    from maskgit_pl.runs.fitting import fit
    from maskgit_pl.runs.plan import Plan, plan_run
    from maskgit_pl.runs.recipe import Recipe
    from maskgit_pl.runs.schedule_runs import train_schedules
    from maskgit_pl.runs.stage import FitResult
    from maskgit_pl.runs.tokenizing import TokenizeOptions, tokenize

__all__ = [
    "FitResult",
    "Plan",
    "Recipe",
    "TokenizeOptions",
    "export",
    "fit",
    "plan_run",
    "tokenize",
    "train_schedules",
]

# No module has the name of something here: importing it would put it in that thing's place.
_HOMES = {
    "FitResult": "stage",
    "Plan": "plan",
    "Recipe": "recipe",
    "TokenizeOptions": "tokenizing",
    "export": "exporting",
    "fit": "fitting",
    "plan_run": "plan",
    "preflight": "preflight_checks",
    "tokenize": "tokenizing",
    "train_schedules": "schedule_runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
