"""Table 3 and Figure 8 of the paper: mask schedules, with a model or several seeds for each.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Table 3 and Figure 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from maskgit_pl.checks import check_integer
from maskgit_pl.evaluation.evaluator import collect_numbers
from maskgit_pl.evaluation.figures import draw_figure_8
from maskgit_pl.evaluation.folders import open_models, read_run_recipe
from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.options import ReportOptions, default_steps, with_steps
from maskgit_pl.evaluation.pages import Page, describe_provenance, heading, markdown_table, paragraph, seeds_cell
from maskgit_pl.pretrained.networks import read_config
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.registry import describe
from maskgit_pl.runs.layers import value_at
from maskgit_pl.schedules import MaskSchedule
from maskgit_pl.text import code_span, markdown

# gamma(r) as printed (exp and log as in the released code), best T, FID, IS, and NLL in nats per masked token.
SCHEDULES = {  # paper, Table 3
    "exp": ("1 - 2^(-log2(N) (1 - r))", "8", "7.89", "156.3", "4.83"),
    "cubic": ("1 - r^3", "9", "7.26", "165.2", "4.63"),
    "square": ("1 - r^2", "10", "6.35", "179.9", "4.38"),
    "cosine": ("cos(pi r / 2)", "10", "6.06", "181.5", "4.22"),
    "linear": ("1 - r", "16", "7.51", "113.2", "3.75"),
    "sqrt": ("1 - r^0.5", "32", "12.33", "99.0", "3.34"),
    "log": ("-log2(r) / log2(N)", "60", "29.17", "47.9", "3.08"),
}
_STEPS = (2, 3, 4, 6, 8, 12, 16, 24)
_BUDGET = (  # settings that all runs of Table 3 must share
    "trainer.max_steps",
    "data.global_batch",
    "model.network",
    "model.optimizer.learning_rate",
    "model.label_smoothing",
)


def table_3(
    runs: Sequence[Path | str],
    options: ReportOptions | None = None,
    *,
    num_steps: Sequence[int] | None = None,
    bars: Bars = no_bars,
) -> Page:
    """Makes Table 3 and Figure 8: mask schedules, with one run or several seeds for each.

    ``run_ablation`` can train the runs. Each is measured in three steps:

    1. Find the best T: the lowest FID in the first network, from the ``num_images`` images that begin at ``seed``.
    2. Measure the best T again in all networks, on the next ``num_images`` images. The FIDs of step 1 are too
       low on average, since their minimum is taken.
    3. Measure the likelihood of ``2 * num_images`` real images.

    Args:
        runs: Run folders of models that differ only in their mask schedule and their seed.
        options: Number of images, networks, folders and other options; None for the defaults.
        num_steps: Numbers of steps; None for 2, 3, 4, 6, 8, 12, 16 and 24, up to half the number of tokens.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if a run or the data do not exist.
        ValueError: if the training budgets differ, a model is autoregressive, or for a reason of ``open_models``.
    """
    options = options or ReportOptions()
    evaluator, models = open_models(runs, options, bars)
    count, seed = options.num_images, options.seed
    configs = [read_run_recipe(model.pretrained.parent / "transformer" / "config.yaml") for model in models]
    _check_budgets(dict(zip(map(str, runs), configs, strict=True)))
    num_tokens = models[0].pipe.transformer.network.config.num_tokens
    steps = _choose_steps(num_steps, num_tokens)
    first, *_ = evaluator.networks
    results: list[ScheduleResult] = []
    schedules: dict[str, MaskSchedule] = {}
    for model in models:
        model.pipe.transformer.schedule_for("table 3")
        name = describe(read_config(model.pretrained / "transformer", "transformer")["mask_schedule"])
        assert model.pipe.transformer.mask_schedule is not None
        schedules[name] = model.pipe.transformer.mask_schedule
        # The exported decoding without guidance, which the paper does not use.
        decoding = model.pipe.decoding_with(decoding=model.pipe.transformer.decoding, guidance_scale=0)
        measure = partial(evaluator.measure_samples, model, num_images=count, seed=seed, networks=[first])
        curve = {number: measure(with_steps(decoding, number))[first]["fid"] for number in steps}  # 1.
        best = with_steps(decoding, min(curve, key=lambda number: curve[number]))
        fresh = evaluator.measure_samples(model, best, num_images=count, seed=seed + count)  # 2.
        likelihood = evaluator.measure_likelihood(model, num_images=2 * count)  # 3.
        # The rows of a run that was renamed have its old name.
        named = {label: {**row, "run": model.run} for label, row in fresh.items()}
        results.append(ScheduleResult(name, curve, named, likelihood))
    floor = evaluator.measure_real(num_images=count, networks=[first])[first]
    grouped = _group_by_schedule(results)
    picture = draw_figure_8(
        {name: schedules[name] for name in grouped},
        {name: {number: fmean(each.curve[number] for each in group) for number in steps}
         for name, group in grouped.items()},
        num_tokens=num_tokens,
        network=first,
        num_images=count,
        floor=float(floor["fid"]),
        dataset=evaluator.dataset,
    )  # fmt: skip
    page = make_schedule_page(results)
    return replace(page, folder=options.results / evaluator.dataset, pictures={"figure-8.png": picture})


def _choose_steps(num_steps: Sequence[int] | None, num_tokens: int) -> Sequence[int]:
    """Returns sorted numbers of steps; usually, a step decides two tokens or more on average."""
    if num_steps is None:
        return default_steps(num_tokens // 2, _STEPS)
    for number in num_steps:
        check_integer("num_steps", number, f"[1, {num_tokens}]")
    return sorted({*num_steps})


def _check_budgets(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that all runs had the same training budget, since schedules are comparable only then.

    The recipe of a downloaded model is empty and ignored.
    """
    for key in _BUDGET:
        values = {run: value_at(config, key) for run, config in configs.items() if config}
        if len({repr(value) for value in values.values()}) > 1:
            text = ", ".join(f"{run} {value}" for run, value in values.items())
            raise ValueError(f"{key} must be the same in all runs, so that their schedules are comparable, got {text}")


@dataclass(frozen=True)
class ScheduleResult:
    """The measurements of one run of Table 3."""

    schedule: str
    curve: Mapping[int, float]  # FID by T, in the first network
    fresh: Mapping[str, Row]  # row of samples at the best T of each network
    likelihood: Row

    @property
    def best_steps(self) -> int:
        """The T of the lowest FID."""
        return min(self.curve, key=lambda steps: self.curve[steps])


def _group_by_schedule(results: Sequence[ScheduleResult]) -> dict[str, list[ScheduleResult]]:
    """Returns the results of each schedule in the order of the paper's table, then those that it does not have."""
    names = sorted(dict.fromkeys(each.schedule for each in results), key=lambda name: [*SCHEDULES, name].index(name))
    return {name: [each for each in results if each.schedule == name] for name in names}


def make_schedule_page(results: Sequence[ScheduleResult]) -> Page:
    """Returns the page of Table 3: mask schedules, each used in the training and the decoding of its model."""
    grouped = _group_by_schedule(results)
    networks = list(results[0].fresh)
    any_row = results[0].fresh[networks[0]]
    steps = ", ".join(map(str, sorted(results[0].curve)))
    seeds = max(map(len, grouped.values()))
    trained = "its own model" if seeds == 1 else f"models of its own from {seeds} seeds (mean, lowest to highest value)"
    lines = heading("Table 3: mask schedules")
    lines += paragraph(
        f"Each schedule has {trained}, trained and decoded with this schedule. All models have the same training",
        f"budget, and are decoded without guidance at T in {{{steps}}}. The best T has the lowest",
        f"fid/{markdown(networks[0])}; the values next to it are measured again at this T, with other noise",
        f"({any_row['num_images']} images). NLL is the mean negative log-likelihood per masked token in nats, under",
        "the masks of the schedule, as in the paper. It falls if fewer tokens are masked, so that it does not compare",
        "models. The bound is the order-agnostic ELBO in bits per token, which is comparable for all schedules (lower",
        "is better).",
    )
    lines += ["", *_schedule_lines(grouped, networks), ""]
    ordered = [result for group in grouped.values() for result in group]
    lines += describe_provenance([row for result in ordered for row in result.fresh.values()])
    flat = [_flatten(result) for result in ordered]
    return Page("table-3", [*lines, "", "![figure-8](figure-8.png)"], flat)


def _schedule_lines(grouped: Mapping[str, Sequence[ScheduleResult]], networks: Sequence[str]) -> list[str]:
    # IS has a column only for networks that know the classes.
    any_result = next(iter(grouped.values()))[0]
    scored = [name for name, row in any_result.fresh.items() if row.get("is") is not None]
    headings = ["schedule", "gamma(r)", "best T", *(f"FID ({markdown(name)})" for name in networks)]
    headings += [*(f"IS ({markdown(name)})" for name in scored), "NLL", "bound, bits", "paper: T", "FID", "IS", "NLL"]
    cells = []
    for name, group in grouped.items():
        formula, *published = SCHEDULES.get(name, ("",) * 5)
        likelihoods = [result.likelihood for result in group]
        cells.append([
            code_span(name),
            formula,
            ", ".join(map(str, sorted({result.best_steps for result in group}))),
            *(seeds_cell([result.fresh[network] for result in group], "fid") for network in networks),
            *(seeds_cell([result.fresh[network] for result in group], "is") for network in scored),
            *(_with_error(likelihoods, column) for column in ("masked_nll", "elbo_bits_per_token")),
            *published,
        ])  # fmt: skip
    return markdown_table(headings, cells, left=2)


def _with_error(rows: Sequence[Row], name: str) -> str:
    """Returns the value of one row with its standard error, or the mean and the range of several."""
    text = seeds_cell(rows, name, "{:.3f}".format)
    return text if len(rows) > 1 else f"{text} ± {rows[0][f'{name}_error']:.3f}"


def _flatten(result: ScheduleResult) -> dict[str, object]:
    """Returns the row of the CSV: values of all networks, likelihoods, and the FID at every T."""
    network, first = next(iter(result.fresh.items()))
    kept = ("num_images", "parameters", "commit", "date", "dataset", "data", "transformer", "tokenizer", "config",
            "judge", "reference")  # fmt: skip
    return {
        "schedule": result.schedule,
        "run": first["run"],
        "best_steps": result.best_steps,
        **collect_numbers(result.fresh),
        **{name: cell for name, cell in result.likelihood.items() if "nll" in name or "elbo" in name},
        **{f"fid/{network} at T = {steps}": value for steps, value in sorted(result.curve.items())},
        **{name: first.get(name, "") for name in kept},
    }
