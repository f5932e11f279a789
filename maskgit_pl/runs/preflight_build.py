"""Builds a stage for ``preflight``: module and data as in training, but on the CPU and with weights of zero."""

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
from maskgit_pl.runs.resolve import merge_values

__all__ = ["build_for_preflight", "build_without_weights"]

_ON_ONE_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")


def build_for_preflight(plan: Plan, checks: CheckList, *, is_complete: bool) -> StageRun | None:
    """Builds as much of a stage as possible, and adds the errors of training to the checks.

    It tries the following until one succeeds:

    1. as in training, with data and tokenizer;
    2. only from the recipe, without a Trainer and without reading data;
    3. stage 1 without its perceptual network, whose weight file is often missing.

    Args:
        plan: Plan of the run.
        checks: List to which errors are added.
        is_complete: True if data and tokenizer exist; 1 is tried only then.

    Returns:
        The stage with weights of zero, or None if all attempts fail.
    """
    plan = replace(plan, recipe=plan.recipe.with_overrides(_ON_ONE_CPU))
    with hide_launcher(), _keep_torch_settings(), _ZeroWeights():
        if is_complete:  # 1.
            with checks.catch_errors("recipe"):
                run = build(plan)
                if run.datamodule.config.source != "stream":
                    run.datamodule.setup()
                checks.add("recipe", f"{plan.recipe.title}: module, data and tokenizer fit together")
                return run
        with checks.catch_errors("recipe"):  # 2.
            return _build_from_recipe(plan)
        if plan.stage == "tokenizer":  # 3.
            without = replace(plan, recipe=plan.recipe.with_overrides(["--model.perceptual=null"]))
            with checks.catch_errors("recipe"):
                run = _build_from_recipe(without)
                checks.add("memory", "calculated without the perceptual network", "warning")
                return run
    return None


def build_without_weights(plan: Plan) -> StageRun:
    """Builds module and data of a run without a Trainer and with weights of zero. Checks all values of its recipe.

    Data and tokenizer may be missing. No file is written, and the process-wide settings of torch stay as they are.

    Raises:
        ValueError: if a value is missing, out of range or unknown. The message names the key.
    """
    with hide_launcher(), _keep_torch_settings(), _ZeroWeights():
        return StageRun(plan.recipe, merge_values(plan), plan.stage_folder)


def _build_from_recipe(plan: Plan) -> StageRun:
    """Builds module and data of a recipe; data and tokenizer may be missing."""
    missing: dict[str, Any] = {"data": {"path": str(plan.shards), "token_store": str(plan.folder / "tokens")}}
    if plan.stage == "transformer":
        # The tokenizer would give these sizes. Without it, the sizes of the paper stand in.
        sizes: dict[str, Any] = {"codebook_size": 1024, "num_classes": 1000, "grid": [16, 16]}
        missing["model"] = {"tokenizer": str(plan.tokenizer or "missing"), "network": sizes}
    return StageRun(plan.recipe, merge([missing, plan.recipe.tree]), plan.stage_folder)


class _ZeroWeights(TorchFunctionMode):
    """A mode that fills weights with zeros; random initialization takes half a minute for a large model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls ``func``, but replaces random initialization by zeros."""
        kwargs = kwargs or {}
        # Methods of tensors, and functions of torch.nn.init.
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)


@contextmanager
def _keep_torch_settings() -> Iterator[None]:
    """Restores the process-wide settings that building a run changes, and hides the warnings for training."""
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
