"""Runs from Python: ``Recipe`` reads the values of a run, ``fit`` trains it, and each command is one function.

::

    from maskgit_pl import runs

    recipe = runs.Recipe.read("tokenizer", overrides={"trainer.max_steps": 500})
    result = runs.fit(recipe, run="demo", data="data/shards/fashion-mnist")

Messages go to the logger ``maskgit_pl``; ``logging.basicConfig(level="INFO")`` shows them.

The names are imported on first use, with torch and Lightning if they need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.data.token_store import TokenizeOptions
    from maskgit_pl.runs.doctor import Preflight, preflight
    from maskgit_pl.runs.exporting import export
    from maskgit_pl.runs.fitting import FitResult
    from maskgit_pl.runs.plan import Machines, Plan, plan_run
    from maskgit_pl.runs.recipe import Recipe
    from maskgit_pl.runs.slurm import JobOptions, Submission, plan_submission, submit
    from maskgit_pl.runs.tokenizing import tokenize
    from maskgit_pl.runs.training import fit
    from maskgit_pl.runs.variants import AblationConfig, Factor

__all__ = [
    "AblationConfig",
    "Factor",
    "FitResult",
    "JobOptions",
    "Machines",
    "Plan",
    "Preflight",
    "Recipe",
    "Submission",
    "TokenizeOptions",
    "export",
    "fit",
    "plan_run",
    "plan_submission",
    "preflight",
    "submit",
    "tokenize",
]

_NAMES = {  # by module
    "doctor": ("Preflight", "preflight"),
    "exporting": ("export",),
    "fitting": ("FitResult",),
    "plan": ("Machines", "Plan", "plan_run"),
    "recipe": ("Recipe",),
    "slurm": ("JobOptions", "Submission", "plan_submission", "submit"),
    "tokenizing": ("TokenizeOptions", "tokenize"),
    "training": ("fit",),
    "variants": ("AblationConfig", "Factor"),
}
__getattr__ = lazy_names(__name__, {name: module for module, names in _NAMES.items() for name in names})
