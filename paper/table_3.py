"""Table 3 and Figure 8 of the paper: mask schedules, with a model or several seeds for each.

``maskgit ablation --num-steps`` trains and measures them; this script makes the page from its ledger.
``make schedule-table`` does both.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Table 3 and Figure 8.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from maskgit_pl.cli import run_script
from maskgit_pl.cli.arguments import Output
from maskgit_pl.cli.flags import Runs, write_page
from maskgit_pl.decoding.guidance import guidance_scales, guidance_schedules
from maskgit_pl.evaluation.evaluator import collect_numbers
from maskgit_pl.evaluation.figures import draw_figure_8
from maskgit_pl.evaluation.ledger import FILE_NAME, REAL, Ledger, Row
from maskgit_pl.evaluation.pages import Page, describe_provenance, heading, markdown_table, paragraph, seeds_cell
from maskgit_pl.schedules import mask_schedules
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


def read_results(ledger: Ledger, runs: Sequence[str], *, num_images: int) -> list[ScheduleResult]:
    """Returns the measurements of runs by ``maskgit ablation --num-steps``, without guidance.

    The images that T is chosen by have the seed of most T; those of the measurement at the best T begin after them.

    Args:
        ledger: Ledger of the ablation.
        runs: Names of the runs.
        num_images: Number of images of each measurement.

    Raises:
        ValueError: if a run was not measured in this way.
    """
    names = {repr(schedule): name for name, schedule in mask_schedules.build_all().items()}
    results = []
    for run in runs:
        samples = [
            row
            for row in ledger.rows("samples")
            if row["run"] == run
            and row["num_images"] == num_images
            and not any(guidance_scales(guidance_schedules.build(row["decoding"]["guidance"]), row["num_steps"]))
        ]
        likelihoods = [row for row in ledger.rows("likelihood") if row["run"] == run]
        steps = defaultdict(set)
        for row in samples:
            steps[row["seed"]].add(row["num_steps"])
        first = max(steps, key=lambda seed: len(steps[seed]), default=0)
        fresh = {row["network"]: row for row in samples if row["seed"] == first + num_images}
        if not fresh or not likelihoods:
            raise ValueError(
                f"run {run} must have rows of {num_images} images at several T and at the best T, and a likelihood, "
                f"in {ledger.file}; measure it with `maskgit ablation --num-steps` and without guidance"
            )
        network, schedule = next(iter(fresh)), samples[0]["mask_schedule"]
        curve = {row["num_steps"]: row["fid"] for row in samples if (row["seed"], row["network"]) == (first, network)}
        results.append(ScheduleResult(names.get(schedule) or schedule, curve, fresh, likelihoods[-1]))
    return results


def draw_figure(results: Sequence[ScheduleResult], real: Row, *, num_tokens: int) -> bytes:
    """Draws Figure 8 as a PNG: the schedules without arguments, and the FID of each at every T, mean and range.

    Args:
        results: The measurements.
        real: Row of as many real images, in the network of the curves.
        num_tokens: N, tokens per image.
    """
    schedules = {repr(schedule): schedule for schedule in mask_schedules.build_all().values()}
    grouped = _group_by_schedule(results)
    return draw_figure_8(
        {name: schedules[schedule] for name, group in grouped.items()
         if (schedule := group[0].likelihood["mask_schedule"]) in schedules},
        {name: {steps: [each.curve[steps] for each in group] for steps in sorted(group[0].curve)}
         for name, group in grouped.items()},
        num_tokens=num_tokens,
        network=real["network"],
        num_images=real["num_images"],
        floor=float(real["fid"]),
        dataset=real["dataset"],
    )  # fmt: skip


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


def table_3(
    runs: Runs = (),
    *,
    ablation: str = "ablation-mask_schedule",
    results: Annotated[Path, Output("")] = Path("results"),
    num_images: int | None = None,
    num_tokens: int = 49,
) -> None:
    """Writes Table 3 and Figure 8 from the measurements of ablations, and measures nothing.

    The page is RESULTS/DATASET/table-3.md with .csv and figure-8.png.

    Example: python -m paper.table_3

    Args:
        runs: Run folders (runs/NAME) that were measured with --num-steps (default: those of the last --ablation).
        ablation: Name of the ablation that measured them.
        results: Folder of the ledger and the pages.
        num_images: Number of images of each measurement (default: that of --ablation).
        num_tokens: Tokens per image, for exp and log in Figure 8.

    Raises:
        ValueError: if the ledger has no measurements of the runs.
    """
    ledger = Ledger(results / FILE_NAME)
    of_ablation = [row for row in ledger.rows("ablation") if row["ablation"] == ablation]
    protocol = of_ablation[-1]["protocol"] if of_ablation else {}
    names = [run.name for run in runs]
    names = names or [row["run"] for row in of_ablation if row["protocol"] == protocol and "run" in row]
    if not names:
        raise ValueError(f"{ledger.file} must have runs of {ablation}, got none; use `make schedule-table`")
    measured = read_results(ledger, [*dict.fromkeys(names)], num_images=num_images or protocol.get("num_images", 1000))
    any_row = next(iter(measured[0].fresh.values()))
    columns = ("num_images", "network", "judge", "reference", "dataset")
    real = ledger.find("samples", {"model": REAL, **{name: any_row[name] for name in columns}})
    assert real is not None  # the ablation measures it first
    figure = draw_figure(measured, real, num_tokens=num_tokens)
    page = make_schedule_page(measured)
    write_page(replace(page, folder=results / any_row["dataset"], pictures={"figure-8.png": figure}))


if __name__ == "__main__":
    sys.exit(run_script(table_3, prog="python -m paper.table_3"))
