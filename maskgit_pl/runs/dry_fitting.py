"""``runs.dry_run``: everything that a training checks before its first step, and what it would do. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from maskgit_pl.data import split_batch
from maskgit_pl.runs.build import StageRun, build
from maskgit_pl.runs.plan import Plan, plan_run
from maskgit_pl.runs.preflight_checks import describe_start
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.stage import check_run_outputs
from maskgit_pl.runs.units import count_text

__all__ = ["dry_run"]


def dry_run(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> dict[str, str]:
    """Builds a stage and opens its data as ``runs.fit`` does, with the same arguments, and describes the training.

    Returns:
        One line of text by name: ``run``, ``recipe``, ``data``, ``tokenizer``, ``weights``, ``model``, ``steps``,
        ``devices``. Names without content are left out.

    Raises:
        FileNotFoundError: see ``runs.fit``.
        ValueError: see ``runs.fit``.
    """
    plan = plan_run(recipe, run=run, data=data, tokenizer=tokenizer, pretrained=pretrained)
    stage_run = build(plan)
    check_run_outputs(plan)
    stage_run.datamodule.setup()
    trainer = stage_run.trainer
    lines: Mapping[str, str | None] = {
        "run": describe_start(plan, trainer.max_steps),
        "recipe": recipe.title,
        "data": _describe_data(stage_run, plan),
        "tokenizer": None if plan.tokenizer is None else str(plan.tokenizer),
        "weights": None if plan.pretrained is None else f"a new run starts from those of {plan.pretrained}",
        "model": f"{sum(each.numel() for each in stage_run.model.parameters() if each.requires_grad):,} parameters",
        "steps": f"{trainer.max_steps:,}, with a global batch of {_describe_batch(stage_run)}",
        "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}, {trainer.precision}",
    }
    return {name: text for name, text in lines.items() if text is not None}


def _describe_data(run: StageRun, plan: Plan) -> str:
    if run.datamodule.config.source == "stream":
        return "a stream of shards"
    summary = run.datamodule.summary
    counts = ", ".join(f"{count:,} {split}" for split, count in summary.samples.items())
    parts = (f"{plan.shards}: {counts}", count_text(summary.num_classes, "class"), run.datamodule.resizing)
    return "; ".join(part for part in parts if part is not None)


def _describe_batch(run: StageRun) -> str:
    config, ranks = run.datamodule.config, run.trainer.world_size
    per_device, accumulation = split_batch(config.global_batch, config.max_batch_per_device, ranks)
    parts = (count_text(ranks, "rank"), count_text(accumulation, "accumulation step"), count_text(per_device, "sample"))
    return f"{config.global_batch} = {' x '.join(parts)}"
