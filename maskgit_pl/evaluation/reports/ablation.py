"""The ablation of mask schedules: a model for each, decoded at several T, as in the paper's Table 3 and Figure 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.bench.bench import Bench, Subject
from maskgit_pl.evaluation.decodings import with_steps
from maskgit_pl.evaluation.reports.published import SCHEDULES
from maskgit_pl.evaluation.reports.tables import ScheduleResult
from maskgit_pl.pretrained import read_config
from maskgit_pl.registry import describe

__all__ = ["STEPS", "ablate", "check_budgets", "decoding_at", "most_steps", "schedule_of"]

STEPS = (2, 3, 4, 6, 8, 12, 16, 24)


def most_steps(num_tokens: int) -> int:
    """The largest T of an ablation: half as many as there are tokens, since then steps decide two tokens and fewer."""
    return max(2, num_tokens // 2)


def schedule_of(subject: Subject) -> str:
    """The registered name of a model's mask schedule, or its spec in words where it has arguments.

    Raises:
        ValueError: A sequential model.
    """
    spec: Any = read_config(subject.pretrained / "transformer", "transformer")["mask_schedule"]
    if spec is None:
        raise ValueError(
            f"run {subject.run}: a model with a mask schedule is needed, got a sequential one; leave it out"
        )
    return describe(spec)


def check_budgets(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses runs that were not trained alike: schedules compare under equal budgets alone.

    Args:
        configs: By run: its transformer's resolved recipe; an empty one says nothing.

    Raises:
        ValueError: With what differs.
    """
    keys = ("trainer.max_steps", "data.global_batch", "model.network", "model.learning_rate", "model.label_smoothing")
    for key in keys:
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


def decoding_at(subject: Subject, num_steps: int) -> DecodingConfig:
    """How a model of the ablation decodes: as it was exported, without guidance, which the paper does not have."""
    return with_steps(
        subject.pipe.decoding_with(decoding=subject.pipe.transformer.decoding, guidance_scale=0), num_steps
    )


def ablate(
    bench: Bench,
    subjects: Sequence[Subject],
    *,
    steps: Sequence[int] = STEPS,
    num_images: int = 1000,
    seed: int = 0,
    networks: Sequence[str],
    draws: int = 4,
) -> list[ScheduleResult]:
    """Measures a model for each schedule.

    The best T is found on the first images; what is reported of it is measured on those that follow them.

    Args:
        bench: Measures, and remembers.
        subjects: Models that differ in their mask schedule alone.
        steps: The T; those above half of the number of tokens are left out.
        num_images: Images of a point; likelihoods are of twice as many real ones.
        seed: Of the first one.
        networks: Labels of the judges; the first one's FID chooses T.
        draws: Masks of an image for likelihoods.

    Raises:
        ValueError: No T is left, two models of one schedule, or a sequential one.
    """
    names = [schedule_of(subject) for subject in subjects]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"runs: one for each mask schedule is needed, got several of {', '.join(twice)}")
    most = most_steps(subjects[0].pipe.transformer.network.config.num_tokens)
    wanted = sorted({number for number in steps if number <= most})
    if not wanted:
        raise ValueError(f"--num-steps: a number of at most {most}, half of the tokens, is needed, got {list(steps)}")
    order = [row.schedule for row in SCHEDULES]
    pairs = sorted(zip(names, subjects, strict=True), key=lambda pair: order.index(pair[0]) if pair[0] in order else 99)
    return [
        _measure(bench, name, subject, wanted, num_images=num_images, seed=seed, networks=networks, draws=draws)
        for name, subject in pairs
    ]


def _measure(
    bench: Bench,
    name: str,
    subject: Subject,
    steps: Sequence[int],
    *,
    num_images: int,
    seed: int,
    networks: Sequence[str],
    draws: int,
) -> ScheduleResult:
    curve = {}
    for number in steps:
        of_step = bench.samples(
            subject, decoding_at(subject, number), num_images=num_images, seed=seed, networks=networks[:1]
        )
        curve[number] = float(of_step[networks[0]]["fid"])
    best = min(curve, key=lambda number: curve[number])
    fresh = bench.samples(
        subject, decoding_at(subject, best), num_images=num_images, seed=seed + num_images, networks=networks
    )
    likelihood = bench.likelihood(subject, num_images=2 * num_images, draws=draws)
    schedule = subject.pipe.transformer.mask_schedule
    assert schedule is not None  # schedule_of has refused a sequential model
    return ScheduleResult(name, subject.run, best, curve, fresh, likelihood, schedule)
