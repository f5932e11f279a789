"""The ablation of mask schedules in the paper's Table 3 and Figure 8, and the published rows of Tables 1 to 3.

The ablation decodes a model per schedule at several T. The panels of Figure 8 are the mask ratios, and the FID of the
model of each schedule over T; ``maskgit schedules`` draws only the first one. ``paper_tables`` uses all of this.

Published Tables 1 and 3 are measured on ImageNet with 50,000 images, Table 2 on Places2, all with the features of
Inception. Other values are comparable with them only for the same data, network and number of images.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Tables 1 to 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from maskgit_pl.decoding import DecodingConfig, ParallelDecoder
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.errors import plain_label
from maskgit_pl.evaluation.options import PLOT_STEPS, choose_plot_steps, with_steps
from maskgit_pl.evaluation.pages import LineEnd, figure_to_png, name_lines, plot_by_steps, plot_floor
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.registry import describe
from maskgit_pl.schedules import MaskSchedule

if TYPE_CHECKING:  # ``maskgit schedules`` and the page draw schedules without Lightning
    from matplotlib.axes import Axes

    from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
    from maskgit_pl.evaluation.generation import Task
    from maskgit_pl.evaluation.ledger import Row

__all__ = [
    "CLASSIFIER_ON_REAL_IMAGES",
    "EDITING",
    "GENERATION",
    "SCHEDULES",
    "PublishedEditing",
    "PublishedGeneration",
    "PublishedSchedule",
    "ScheduleResult",
    "ablate",
    "check_budgets",
    "count_known_tokens",
    "draw_figure_8",
    "draw_schedules",
]

_DRAWS = 4  # masks per image for likelihoods
_BUDGET = (  # settings that all runs must share
    "trainer.max_steps",
    "data.global_batch",
    "model.network",
    "model.optimizer.learning_rate",
    "model.label_smoothing",
)

_COLOURS = {  # from schedules that decide late (concave) to those that decide early (convex)
    "exp": "#5b2a86",
    "cubic": "#3f51b5",
    "square": "#2a7fb8",
    "cosine": "#0d7d6c",
    "linear": "#7a7a7a",
    "sqrt": "#d98b1f",
    "log": "#c0392b",
}
_OTHERS = ("#a0709f", "#6d9a5c", "#b3605b", "#8a7f4f")
_POINTS = 513  # points of a curve of mask ratios
_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300)


@dataclass(frozen=True)
class PublishedGeneration:
    """A row of Table 1.

    Args:
        model: Name of the model.
        size: Edge of the images, in pixels.
        fid: Frechet distance.
        inception_score: Inception score as printed; None if the table has none.
        precision: Precision of Kynkaanniemi et al.; None if the table has none.
        recall: Recall of Kynkaanniemi et al.; None if the table has none.
        parameters: Number of parameters as printed.
        steps: Forward passes per image as printed.
        cas_top1: Classification accuracy score, top 1 in percent; None if the table has none.
        cas_top5: Classification accuracy score, top 5 in percent; None if the table has none.
    """

    model: str
    size: int
    fid: float
    inception_score: str | None
    precision: float | None
    recall: float | None
    parameters: str
    steps: str
    cas_top1: float | None = None
    cas_top5: float | None = None


@dataclass(frozen=True)
class PublishedEditing:
    """A row of Table 2.

    Args:
        task: Outpainting of the right 50 %, or inpainting of the centre of 50 % x 50 %.
        model: Name of the model.
        size: Edge of the images, in pixels.
        fid: Frechet distance.
        inception_score: Inception score.
    """

    task: Task
    model: str
    size: int
    fid: float
    inception_score: float


@dataclass(frozen=True)
class PublishedSchedule:
    """A row of Table 3.

    Args:
        schedule: Registered name of the schedule.
        best_steps: The T with the lowest FID.
        fid: Frechet distance at that T.
        inception_score: Inception score at that T.
        nll: Masked negative log-likelihood, in nats per masked token.
    """

    schedule: str
    best_steps: int
    fid: float
    inception_score: float
    nll: float


GENERATION = (
    PublishedGeneration("DCTransformer", 256, 36.51, None, 0.36, 0.67, "738M", ">1024"),
    PublishedGeneration("BigGAN-deep", 256, 6.95, "198.2", 0.87, 0.28, "160M", "1", 43.99, 67.89),
    PublishedGeneration("Improved DDPM", 256, 12.26, None, 0.70, 0.62, "280M", "250"),
    PublishedGeneration("ADM", 256, 10.94, "101.0", 0.69, 0.63, "554M", "250"),
    PublishedGeneration("VQVAE-2", 256, 31.11, "~45", 0.36, 0.57, "13.5B", "5120", 54.83, 77.59),
    PublishedGeneration("VQGAN", 256, 15.78, "78.3", None, None, "1.4B", "256"),
    PublishedGeneration("VQGAN* (autoregressive)", 256, 18.65, "80.4", 0.78, 0.26, "227M", "256", 53.10, 76.18),
    PublishedGeneration("MaskGIT", 256, 6.18, "182.1", 0.80, 0.51, "227M", "8", 63.14, 84.45),
    PublishedGeneration("BigGAN-deep", 512, 8.43, "232.5", 0.88, 0.29, "160M", "1", 44.02, 68.22),
    PublishedGeneration("ADM", 512, 23.24, "58.06", 0.73, 0.60, "559M", "250"),
    PublishedGeneration("VQGAN* (autoregressive)", 512, 26.52, "66.8", 0.73, 0.31, "227M", "1024", 51.29, 74.24),
    PublishedGeneration("MaskGIT", 512, 7.32, "156.0", 0.78, 0.50, "227M", "12", 63.43, 84.79),
)
CLASSIFIER_ON_REAL_IMAGES = (76.6, 93.1)  # top-1 and top-5 of the classifier that was trained on real images
EDITING = (
    PublishedEditing("outpaint-right", "Boundless (from prior work)", 256, 35.02, 6.15),
    PublishedEditing("outpaint-right", "In&Out (from prior work)", 256, 23.57, 7.18),
    PublishedEditing("outpaint-right", "InfinityGAN", 256, 10.60, 5.57),
    PublishedEditing("outpaint-right", "Boundless, TFHub model", 256, 7.80, 5.99),
    PublishedEditing("outpaint-right", "MaskGIT", 512, 6.78, 11.69),
    PublishedEditing("inpaint-centre", "DeepFill", 256, 11.51, 22.55),
    PublishedEditing("inpaint-centre", "ICT (trained on a subset of Places2)", 256, 13.63, 17.70),
    PublishedEditing("inpaint-centre", "HiFill", 512, 16.60, 19.93),
    PublishedEditing("inpaint-centre", "CoModGAN", 512, 7.13, 21.82),
    PublishedEditing("inpaint-centre", "MaskGIT", 512, 7.92, 22.95),
)
SCHEDULES = (
    PublishedSchedule("exp", 8, 7.89, 156.3, 4.83),
    PublishedSchedule("cubic", 9, 7.26, 165.2, 4.63),
    PublishedSchedule("square", 10, 6.35, 179.9, 4.38),
    PublishedSchedule("cosine", 10, 6.06, 181.5, 4.22),
    PublishedSchedule("linear", 16, 7.51, 113.2, 3.75),
    PublishedSchedule("sqrt", 32, 12.33, 99.0, 3.34),
    PublishedSchedule("log", 60, 29.17, 47.9, 3.08),
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
    names = [_read_schedule_name(model) for model in models]
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
        decoding = _make_decoding(model, number)
        rows = evaluator.measure_samples(model, decoding, num_images=num_images, seed=seed, networks=[first])
        curve[number] = float(rows[first]["fid"])
    best = min(curve, key=lambda number: curve[number])
    # 2. The seeds of step 1 are [seed, seed + num_images).
    fresh = evaluator.measure_samples(model, _make_decoding(model, best), num_images=num_images, seed=seed + num_images)
    # 3.
    likelihood = evaluator.measure_likelihood(model, num_images=2 * num_images, draws=_DRAWS)
    schedule = model.pipe.transformer.mask_schedule
    assert schedule is not None  # _read_schedule_name raises for an autoregressive model
    return ScheduleResult(name, model.run, best, curve, fresh, likelihood, schedule)


def _read_schedule_name(model: EvaluatedModel) -> str:
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


def _make_decoding(model: EvaluatedModel, num_steps: int) -> DecodingConfig:
    """Returns the exported decoding of a model with another T, without guidance, which the paper does not use."""
    return with_steps(model.pipe.decoding_with(decoding=model.pipe.transformer.decoding, guidance_scale=0), num_steps)


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


def draw_figure_8(
    results: Sequence[ScheduleResult],
    *,
    num_tokens: int,
    metric: str,
    num_images: int,
    floor: float | None,
    dataset: str,
) -> bytes:
    """Draws the mask schedules on the left, and the FID of the model of each over T on the right.

    Args:
        results: Results of the schedules.
        num_tokens: Number N of tokens, which ``log`` and ``exp`` depend on.
        metric: Name of the metric, such as ``fid/classifier``.
        num_images: Number of images per point.
        floor: Value of the same number of real images; None draws no line.
        dataset: Name of the data, for the title.

    Returns:
        A PNG.

    Source: paper, Figure 8.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(12.6, 5.2), layout="constrained")
    left, right = page.subplots(1, 2, gridspec_kw={"wspace": 0.14})
    _plot_ratios(left, {result.schedule: result.mask_schedule for result in results}, num_tokens)
    left.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=2)
    colours = _colours(result.schedule for result in results)
    _plot_quality(right, results, colours)
    if floor is not None:
        plot_floor(right, floor, f"real images: {floor:.2f}")
    right.set_ylabel(f"{metric} of {num_images} images (lower is better)")
    right.set_title(f"{plain_label(dataset)}: one model per schedule, star at the best T", fontsize=11, loc="left")
    ends = {
        result.schedule: LineEnd(
            f"{result.schedule}, best T = {result.best_steps}",
            (max(result.curve), result.curve[max(result.curve)]),
            colours[result.schedule],
        )
        for result in results
    }
    name_lines(page, right, ends)
    return figure_to_png(page)


def draw_schedules(schedules: Mapping[str, MaskSchedule], *, num_tokens: int) -> bytes:
    """Draws the mask ratio of each schedule over the progress.

    Args:
        schedules: Schedules by their name in the legend.
        num_tokens: Number N of tokens, which some schedules depend on.

    Returns:
        A PNG.

    Source: paper, Figure 8, left.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(6.4, 4.4), layout="constrained")
    _plot_ratios(page.subplots(), schedules, num_tokens)
    page.legend(loc="outside right center", frameon=False)
    return figure_to_png(page)


def _plot_ratios(axes: Axes, schedules: Mapping[str, MaskSchedule], num_tokens: int) -> None:
    progress = torch.linspace(0, 1, _POINTS)
    ratios = {name: schedule(progress, num_tokens).clamp(0, 1) for name, schedule in schedules.items()}
    colours = _colours(ratios)
    # The order of the legend is that of the curves from top to bottom.
    for number, name in enumerate(sorted(ratios, key=lambda name: -float(ratios[name].mean()))):
        style = ("solid", "dashed", "dashdot")[number // 10 % 3]  # colours repeat, styles tell the lines apart
        axes.plot(progress.numpy(), ratios[name].numpy(), color=colours[name], label=plain_label(name), linestyle=style,
                  linewidth=1.8)  # fmt: skip
    axes.set(xlabel="progress r = t / T", ylabel="mask ratio gamma(r)", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"mask schedules, N = {num_tokens} tokens", fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_quality(axes: Axes, results: Sequence[ScheduleResult], colours: Mapping[str, str]) -> None:
    plot_by_steps(axes, {result.schedule: result.curve for result in results}, colours)
    values = [value for result in results for value in result.curve.values()]
    # The default ticks of a logarithmic axis are powers of ten, which are too few here.
    if axes.get_yscale() == "log":
        ticks = [tick for tick in _TICKS if min(values) / 1.3 <= tick <= max(values) * 1.3]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    for result in results:
        axes.plot([result.best_steps], [result.curve[result.best_steps]], color=colours[result.schedule], marker="*",
                  markersize=14, markeredgecolor="white", zorder=5)  # fmt: skip


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour per schedule; schedules that the paper does not have share a few colours."""
    names = list(names)
    others = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: _COLOURS.get(name) or next(others) for name in names}


def count_known_tokens(schedule: MaskSchedule, *, num_tokens: int, num_steps: int) -> list[int]:
    """Counts the tokens of an image that are known after each decoding step.

    Args:
        schedule: The mask schedule.
        num_tokens: Number N of tokens.
        num_steps: Number T of steps, in [1, N].

    Returns:
        T counts, of which the last one is N.

    Raises:
        ValueError: if ``num_steps`` is out of range.
    """
    # The counts come from the decoder itself, so that the table shows what decoding does.
    decoder = ParallelDecoder(schedule, token_selectors.build("confidence"), num_steps=num_steps)
    return [num_tokens - masked for (masked,) in decoder.count_masked([num_tokens], num_tokens)[1:]]
