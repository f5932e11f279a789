"""Builds a stage to examine it: module and data as training builds them, on this machine's CPU and without a job."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from maskgit_pl.launcher import hide_launcher
from maskgit_pl.runs.build import StageRun, build
from maskgit_pl.runs.layers import merge
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.preflight_report import CheckList

__all__ = ["build_for_preflight"]

_ON_ONE_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")


def build_for_preflight(plan: Plan, checks: CheckList, *, is_complete: bool) -> StageRun | None:
    """Builds a stage as far as it can be built, and adds what training would refuse to the checks.

    The ways to build it are, in this order, until one succeeds:

    1. as training does, with data and tokenizer;
    2. from the recipe alone, without a Trainer; nothing is read;
    3. stage 1 without its perceptual network, whose file is missing most often.

    Args:
        plan: Of the run.
        checks: Where errors are added.
        is_complete: Whether data and tokenizer are there; 1 is tried only then.

    Returns:
        The stage, with zeros for weights; None if none of the ways succeeds.
    """
    plan = replace(plan, recipe=plan.recipe.with_overrides(_ON_ONE_CPU))
    with hide_launcher(), _keep_torch_settings(), _ZeroWeights():
        if is_complete:
            with checks.catch_errors("recipe"):
                run = build(plan)
                if run.datamodule.config.source != "stream":
                    run.datamodule.setup()
                checks.add("recipe", f"{plan.recipe.title}: module, data and tokenizer fit each other")
                return run
        with checks.catch_errors("recipe"):
            return _build_from_recipe(plan)
        if plan.stage == "tokenizer":
            without = replace(plan, recipe=plan.recipe.with_overrides(["--model.perceptual=null"]))
            with checks.catch_errors("recipe"):
                run = _build_from_recipe(without)
                checks.add("memory", "calculated without the perceptual network", "warning")
                return run
    return None


def _build_from_recipe(plan: Plan) -> StageRun:
    """Builds module and data of a recipe whose data or tokenizer may be missing."""
    missing: dict[str, Any] = {"data": {"path": str(plan.shards), "token_store": str(plan.folder / "tokens")}}
    if plan.stage == "transformer":
        # Sizes that the tokenizer would say, where the recipe does not: those of the paper.
        sizes: dict[str, Any] = {"codebook_size": 1024, "num_classes": 1000, "grid": [16, 16]}
        missing["model"] = {"tokenizer": str(plan.tokenizer or "missing"), "network": sizes}
    return StageRun(plan.recipe, merge([missing, plan.recipe.tree]), plan.stage_folder)


class _ZeroWeights(TorchFunctionMode):
    """Fills tensors with zeros where layers would draw their weights, which takes half a minute in a large model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls ``func``, or fills its tensor."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):  # of a tensor, or of torch.nn.init
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)


@contextmanager
def _keep_torch_settings() -> Iterator[None]:
    """Restores what building a run sets for its whole process, and ignores warnings, which are for training."""
    lightning = logging.getLogger("lightning.pytorch")
    level, threads, precision = lightning.level, torch.get_num_threads(), torch.get_float32_matmul_precision()
    allows_tf32 = torch.backends.cudnn.allow_tf32
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        lightning.setLevel(level)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = allows_tf32
