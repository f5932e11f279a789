"""The ablation of mask schedules: a model for each, decoded at several T, as in the paper's Table 3 and Figure 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decodings import PLOT_STEPS, choose_plot_steps, with_steps
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.reports.published import SCHEDULES
from maskgit_pl.pretrained import read_config
from maskgit_pl.registry import describe
from maskgit_pl.schedules import MaskSchedule

__all__ = ["ScheduleResult", "ablate", "check_budgets", "make_ablation_decoding", "read_schedule_name"]

_DRAWS = 4  # masks of an image for likelihoods
_BUDGET = (
    "trainer.max_steps",
    "data.global_batch",
    "model.network",
    "model.optimizer.learning_rate",
    "model.label_smoothing",
)


@dataclass(frozen=True)
class ScheduleResult:
    """The quality of the model that was trained with one mask schedule.

    Args:
        schedule: The registered name.
        run: Name of the run.
        best_steps: The T whose images came nearest to real ones.
        curve: Distance at each T.
        fresh: By network: the row of samples at ``best_steps``, with noise that took no part in the choice.
        likelihood: The row of likelihoods.
        mask_schedule: The schedule itself.
    """

    schedule: str
    run: str
    best_steps: int
    curve: Mapping[int, float]
    fresh: Mapping[str, Row]
    likelihood: Row
    mask_schedule: MaskSchedule


def read_schedule_name(model: EvaluatedModel) -> str:
    """Returns the registered name of a model's mask schedule, or its spec in words where it has arguments.

    Raises:
        ValueError: if the model is autoregressive.
    """
    spec: Any = read_config(model.pretrained / "transformer", "transformer")["mask_schedule"]
    if spec is None:
        raise ValueError(
            f"run {model.run}: a model with a mask schedule is needed, got an autoregressive one; leave it out"
        )
    return describe(spec)


def check_budgets(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses runs that were not trained alike: schedules compare under equal budgets only.

    Args:
        configs: By run: its transformer's complete recipe; an empty one says nothing.

    Raises:
        ValueError: with what differs.
    """
    for key in _BUDGET:
        values = {run: _value(config, key) for run, config in configs.items() if config}
        if len({repr(value) for value in values.values()}) > 1:
            said = ", ".join(f"{run} {value}" for run, value in values.items())
            raise ValueError(
                f"{key}: runs with the same value are needed, or their schedules do not compare, got {said}"
            )


def _value(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def make_ablation_decoding(model: EvaluatedModel, num_steps: int) -> DecodingConfig:
    """Returns how a model of the ablation decodes: as exported, but without guidance, which the paper does not have."""
    return with_steps(model.pipe.decoding_with(decoding=model.pipe.transformer.decoding, guidance_scale=0), num_steps)


def ablate(
    evaluator: Evaluator,
    models: Sequence[EvaluatedModel],
    *,
    steps: Sequence[int] = PLOT_STEPS,
    num_images: int = 1000,
    seed: int = 0,
) -> list[ScheduleResult]:
    """Measures a model for each schedule.

    1. The best T is the one of the least FID of the first network, on the first ``num_images`` images.
    2. All networks measure the best T again on the images that follow them.
    3. Likelihoods are of twice as many real images.

    Args:
        evaluator: Measures, and remembers.
        models: Models that differ only in their mask schedule.
        steps: The T; those above half of the number of tokens are left out.
        num_images: Images of a point.
        seed: Of the first image.

    Returns:
        A result for each model, in the order of the paper's table.

    Raises:
        ValueError: if no T is left, two models are of one schedule, or one is autoregressive.
    """
    names = [read_schedule_name(model) for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"run folders: one for each mask schedule is needed, got several of {', '.join(twice)}")
    wanted = choose_plot_steps(models[0].pipe.transformer.network.config.num_tokens, steps)
    order = [row.schedule for row in SCHEDULES]
    pairs = sorted(zip(names, models, strict=True), key=lambda pair: order.index(pair[0]) if pair[0] in order else 99)
    return [_ablate_one(evaluator, name, model, wanted, num_images=num_images, seed=seed) for name, model in pairs]


def _ablate_one(
    evaluator: Evaluator, name: str, model: EvaluatedModel, steps: Sequence[int], *, num_images: int, seed: int
) -> ScheduleResult:
    first, *_ = evaluator.networks
    curve = {}
    for number in steps:
        decoding = make_ablation_decoding(model, number)
        rows = evaluator.measure_samples(model, decoding, num_images=num_images, seed=seed, networks=[first])
        curve[number] = float(rows[first]["fid"])
    best = min(curve, key=lambda number: curve[number])
    fresh = evaluator.measure_samples(
        model, make_ablation_decoding(model, best), num_images=num_images, seed=seed + num_images
    )
    likelihood = evaluator.measure_likelihood(model, num_images=2 * num_images, draws=_DRAWS)
    schedule = model.pipe.transformer.mask_schedule
    assert schedule is not None  # read_schedule_name has refused an autoregressive model
    return ScheduleResult(name, model.run, best, curve, fresh, likelihood, schedule)
