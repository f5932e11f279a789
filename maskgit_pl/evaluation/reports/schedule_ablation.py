"""The ablation of mask schedules in the paper's Table 3 and Figure 8: a model per schedule, decoded at several T.

``paper_measurements`` uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decodings import PLOT_STEPS, choose_plot_steps, with_steps
from maskgit_pl.evaluation.evaluated_model import EvaluatedModel
from maskgit_pl.evaluation.evaluator import Evaluator
from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.reports.published import SCHEDULES
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.registry import describe
from maskgit_pl.schedules import MaskSchedule

__all__ = ["ScheduleResult", "ablate", "check_budgets", "make_ablation_decoding", "read_schedule_name"]

_DRAWS = 4  # masks per image for likelihoods
_BUDGET = (  # settings that all runs must share
    "trainer.max_steps",
    "data.global_batch",
    "model.network",
    "model.optimizer.learning_rate",
    "model.label_smoothing",
)


@dataclass(frozen=True)
class ScheduleResult:
    """The measurements of the model of one mask schedule.

    Args:
        schedule: Registered name of the schedule.
        run: Name of the run.
        best_steps: The T with the lowest FID.
        curve: FID by T.
        fresh: Rows of samples at ``best_steps`` by network, with other noise than ``curve``.
        likelihood: Row of likelihoods.
        mask_schedule: The schedule.
    """

    schedule: str
    run: str
    best_steps: int
    curve: Mapping[int, float]
    fresh: Mapping[str, Row]
    likelihood: Row
    mask_schedule: MaskSchedule


def read_schedule_name(model: EvaluatedModel) -> str:
    """Reads the registered name of a model's mask schedule; arguments are added in words.

    Raises:
        ValueError: if the model is autoregressive.
    """
    spec: Any = read_config(model.pretrained / "transformer", "transformer")["mask_schedule"]
    if spec is None:
        raise ValueError(
            f"run {model.run}: the model must have a mask schedule, got an autoregressive one; leave the run out"
        )
    return describe(spec)


def check_budgets(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that all runs had the same training budget, since schedules are comparable only then.

    Args:
        configs: Complete recipes of the transformers by run; an empty one is ignored.

    Raises:
        ValueError: if a setting differs. The message names its values.
    """
    # A run without a recipe, e.g. a downloaded model, cannot be checked.
    for key in _BUDGET:
        values = {run: _find_value(config, key) for run, config in configs.items() if config}
        if len({repr(value) for value in values.values()}) > 1:
            given = ", ".join(f"{run} {value}" for run, value in values.items())
            raise ValueError(f"{key} must be the same in all runs, so that their schedules are comparable, got {given}")


def _find_value(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def make_ablation_decoding(model: EvaluatedModel, num_steps: int) -> DecodingConfig:
    """Returns the exported decoding of a model with another T, without guidance, which the paper does not use."""
    return with_steps(model.pipe.decoding_with(decoding=model.pipe.transformer.decoding, guidance_scale=0), num_steps)


def ablate(
    evaluator: Evaluator,
    models: Sequence[EvaluatedModel],
    *,
    steps: Sequence[int] = PLOT_STEPS,
    num_images: int = 1000,
    seed: int = 0,
) -> list[ScheduleResult]:
    """Measures the model of each schedule.

    1. Find the best T: the lowest FID in the first network, from the ``num_images`` images that begin at ``seed``.
    2. Measure the best T again in all networks, on the next ``num_images`` images. The FIDs of step 1 are too low on
       average, since their minimum is taken.
    3. Measure the likelihood of ``2 * num_images`` real images.

    Args:
        evaluator: The evaluator.
        models: Models that differ only in their mask schedule.
        steps: Numbers of steps; those above half the number of tokens are left out.
        num_images: Number of images per point.
        seed: Seed of the first image.

    Returns:
        A result per model, in the order of the paper's table.

    Raises:
        ValueError: if no number of steps is left, two models have the same schedule, or a model is autoregressive.
    """
    names = [read_schedule_name(model) for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the mask schedules of the runs must differ, got several with {', '.join(twice)}")
    wanted = choose_plot_steps(models[0].pipe.transformer.network.config.num_tokens, steps)
    order = [row.schedule for row in SCHEDULES]
    # Schedules that the paper does not have come last.
    pairs = sorted(zip(names, models, strict=True), key=lambda pair: order.index(pair[0]) if pair[0] in order else 99)
    return [_ablate_one(evaluator, name, model, wanted, num_images=num_images, seed=seed) for name, model in pairs]


def _ablate_one(
    evaluator: Evaluator, name: str, model: EvaluatedModel, steps: Sequence[int], *, num_images: int, seed: int
) -> ScheduleResult:
    first, *_ = evaluator.networks
    curve = {}  # 1.
    for number in steps:
        decoding = make_ablation_decoding(model, number)
        rows = evaluator.measure_samples(model, decoding, num_images=num_images, seed=seed, networks=[first])
        curve[number] = float(rows[first]["fid"])
    best = min(curve, key=lambda number: curve[number])
    # 2. The seeds of step 1 are [seed, seed + num_images).
    fresh = evaluator.measure_samples(
        model, make_ablation_decoding(model, best), num_images=num_images, seed=seed + num_images
    )
    # 3.
    likelihood = evaluator.measure_likelihood(model, num_images=2 * num_images, draws=_DRAWS)
    schedule = model.pipe.transformer.mask_schedule
    assert schedule is not None  # read_schedule_name raises for an autoregressive model
    return ScheduleResult(name, model.run, best, curve, fresh, likelihood, schedule)
