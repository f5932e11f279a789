"""The page of an ablation, made from ledger rows: results, differences from the base, and trainings.

The results are the mean and the range over the seeds. A difference counts only if it exceeds the spread of the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb
from statistics import fmean
from typing import Any, Literal

from maskgit_pl.errors import markdown
from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.metrics import direction, find_metric, format_value, is_better, known_metrics, title
from maskgit_pl.evaluation.pages import Page, format_seeds, heading, markdown_table, paragraph

# Metrics of tables, in their order, before others; those of a network come once per network.
_ORDER = ("rfid", "psnr_db", "ssim", "codebook_usage", "perplexity", "fid", "class_agreement", "diversity", "precision",
          "recall", "bits_per_token", "seconds_per_image")  # fmt: skip
_NOT_SHOWN = ("sfid", "kid", "is")  # the CSV has them
_OF_FIRST = ("precision", "recall")  # shown only for the network that ranks the variants
_COLUMNS = ("variant", "seed", "run", "parameters", "max_steps", "global_batch", "training_seconds", "kind", "device",
            "failure")  # fmt: skip

Values = Mapping[str, list[float]]  # values of all seeds by metric


def select_rows(rows: Sequence[Row], name: str) -> list[Row]:
    """Returns the last row of each variant and seed of the newest ablation of a name, sorted by variant and seed."""
    of_name = [row for row in rows if row["ablation"] == name]
    # A command with other variants, seeds or images has another plan; its rows are not mixed with these.
    last = {(row["place"], row["seed"]): row for row in of_name if row["plan"] == of_name[-1]["plan"]}
    return [last[key] for key in sorted(last)]


def make_ablation_page(name: str, rows: Sequence[Row]) -> Page:
    """Returns the page of an ablation, from at least one row of ``select_rows``."""
    summary = _summarize(rows)
    protocol = summary.protocol
    lines = heading(f"Ablation: {markdown(name.removeprefix('ablation-'))}", protocol["command"])
    lines += [*_explain(summary), ""]
    if summary.values:
        lines += ["## Results", "", *_result_lines(summary), ""]
        lines += [f"## Difference from {markdown(protocol['reference'])}", "", *_difference_lines(summary), ""]
    lines += ["## Training", "", *_training_lines(summary), ""]
    failed = _failure_lines(summary)
    lines += ["## Failed or missing", "", *failed, ""] if failed else []
    lines += paragraph(f"Measured on: {_long(protocol['machine'])}.")
    # One column of the CSV per metric, unrounded.
    flat = [{**{name: row.get(name) for name in _COLUMNS if name in row}, **row["numbers"]} for row in rows]
    return Page(name, lines, flat)


def compare_seeds(
    name: str, values: Sequence[float], reference: Sequence[float]
) -> Literal["better", "worse", "unclear"]:
    """Compares with a reference: better or worse only if the ranges of the seeds do not overlap.

    A single seed has no range, so that the verdict is always ``unclear``.
    """
    if min(len(values), len(reference)) < 2 or (min(values) <= max(reference) and min(reference) <= max(values)):
        return "unclear"
    return "better" if is_better(name, fmean(values), fmean(reference)) else "worse"


def chance_of_separation(seeds: int) -> float:
    """Returns the probability that the ranges of two equal variants of n seeds each do not overlap.

    Formula: 2 n! n! / (2 n)!, since all orders of the 2 n values are equally likely.
    """
    return 2 / comb(2 * seeds, seeds)


@dataclass(frozen=True)
class _Summary:
    """The results of an ablation."""

    protocol: Mapping[str, Any]  # everything that the variants share; see ``ablation``
    rows: Sequence[Row]  # of the ledger, sorted by variant and seed
    metrics: Sequence[str]  # in the order of tables; the first one ranks the variants
    compared: Sequence[str]  # metrics in which variants are compared
    values: Mapping[str, Values]  # by variant; a variant without any result is missing


def _summarize(rows: Sequence[Row]) -> _Summary:
    protocol, all_metrics = rows[-1]["protocol"], known_metrics()

    def order(name: str) -> tuple[int, bool, str]:
        metric, _, network = name.partition("/")
        return _ORDER.index(metric) if metric in _ORDER else len(_ORDER), network != protocol["first"], name

    def is_shown(name: str) -> bool:
        metric, _, network = name.partition("/")
        is_of_other = metric in _OF_FIRST and network != protocol["first"]
        return metric in all_metrics and metric not in _NOT_SHOWN and not is_of_other

    metrics = sorted({name for row in rows for name in row["numbers"] if is_shown(name)}, key=order)
    values: dict[str, Values] = {}
    for label in protocol["variants"]:
        runs = [row["numbers"] for row in rows if row["variant"] == label]
        seeds = {name: [float(numbers[name]) for numbers in runs if name in numbers] for name in metrics}
        if any(seeds.values()):
            values[label] = {name: each for name, each in seeds.items() if each}
    # Times of a machine with other work are not compared, and bits per token not for tokenizers: a collapsed
    # codebook needs the fewest bits.
    left_out = ("seconds_per_image", *(["bits_per_token"] if protocol["stage"] == "tokenizer" else []))
    return _Summary(protocol, rows, metrics, [name for name in metrics if name not in left_out], values)


def _explain(summary: _Summary) -> list[str]:
    protocol = summary.protocol
    base = ", ".join(
        f"{markdown(key)} {markdown('not set' if value is None else value)}" for key, value in protocol["base"].items()
    )
    seeds = ", ".join(map(str, protocol["seeds"]))
    what = f"Each variant was trained with the seeds {seeds}" if len(protocol["seeds"]) > 1 else (
        f"Each variant was trained with the seed {seeds} only, so that nothing is known about the spread"
    )  # fmt: skip
    is_same = len({row["max_steps"] for row in summary.rows if row.get("run")}) < 2
    lines = paragraph(
        f"{what} ({markdown(protocol['stage'])} on {markdown(protocol['dataset'])}), with the budget",
        f"{markdown(protocol['budget'])} for each run.",
        "All variants make the same number of steps, and may need different times." if is_same else "",
        f"Base: {base}." if base else "",
    )
    if protocol["stage"] == "transformer":
        lines += ["", *paragraph(
            f"{protocol['num_images']} images of each run, evenly distributed over the classes, are compared with",
            f"{markdown(protocol['compared'])}. Seeds differ in initial weights, order of the data, masks, and the",
            f"noise of decoding; the variants of a seed share them. Decoding, unless it is varied: "
            f"{_long(protocol['decoding'])}. Bits per token are the order-agnostic bound of the likelihood of real",
            "images (the exact value of an autoregressive model), which depends neither on the mask schedule nor on",
            "the decoding.",
        )]  # fmt: skip
    else:
        lines += ["", *paragraph(
            "The tokenizers reconstruct all images of the val split. Bits per token and FID of transformers are not",
            "comparable between tokenizers with other codes.",
        )]  # fmt: skip
    return lines


def _result_lines(summary: _Summary) -> list[str]:
    means = {
        label: {name: fmean(numbers) for name, numbers in values.items()} for label, values in summary.values.items()
    }
    rows = []
    for label in summary.protocol["variants"]:
        cells = []
        for name in summary.metrics:
            cell = format_seeds(summary.values.get(label, {}).get(name, []), partial(format_value, name)) or "failed"
            others = [values[name] for values in means.values() if name in values]
            best = (max if find_metric(name).higher_is_better else min)(others)
            is_best = name in summary.compared and len(others) > 1 and means.get(label, {}).get(name) == best
            cells.append(f"**{cell}**" if is_best else cell)
        rows.append([_mark(summary, label), *cells])
    real = summary.rows[-1].get("real")
    if real:
        rows.append(
            ["real images", *(format_value(name, real[name]) if name in real else "" for name in summary.metrics)]
        )
    several = len(summary.protocol["seeds"]) > 1
    higher = [title(name) for name in summary.compared if find_metric(name).higher_is_better]
    left_out = [title(name) for name in summary.metrics if name not in summary.compared]
    text = "Mean over the seeds, and the lowest and highest value." if several else "One seed, no spread."
    text += " The best mean of each column is bold. "
    text += f"Higher is better for {markdown(', '.join(higher))}; lower for the others." if higher else ""
    text += f" Not compared: {markdown(', '.join(left_out))}." if left_out else ""
    headings = ["variant", *(markdown(title(name)) for name in summary.metrics)]
    return [*paragraph(text), "", *markdown_table(headings, rows)]


def _mark(summary: _Summary, label: str) -> str:
    """Returns a label that tells the reference, and a training whose weights are those of the reference."""
    reference = summary.protocol["reference"]
    if label == reference:
        return markdown(label) + ("" if label == "base" else " (reference)")
    runs, reference_runs = (
        {row["seed"]: (row.get("weights"), row.get("run")) for row in summary.rows if row["variant"] == each}
        for each in (label, reference)
    )
    # A variant that differs only in its decoding shares the run.
    same = [
        seed
        for seed, (weights, run) in runs.items()
        if weights and seed in reference_runs and weights == reference_runs[seed][0] and run != reference_runs[seed][1]
    ]
    return markdown(label) + (f" (the weights are those of {markdown(reference)})" if same else "")


def _difference_lines(summary: _Summary) -> list[str]:
    protocol = summary.protocol
    reference = summary.values.get(protocol["reference"])
    if reference is None:
        return ["The reference has no result."]
    rows = [
        [markdown(label), *(_difference(name, values, reference) for name in summary.compared)]
        for label, values in summary.values.items()
        if label != protocol["reference"]
    ]
    seeds = len(protocol["seeds"])
    lines = paragraph(
        "Difference of the means. `better` and `worse`: the ranges of the seeds do not overlap; `unclear`: they do.",
        f"Two equal variants with {seeds} seeds each would differ randomly in {chance_of_separation(seeds):.0%} of the"
        " comparisons of one metric."
        if seeds > 1
        else "With one seed, every difference is unclear.",
    )
    headings = ["variant", *(markdown(title(name)) for name in summary.compared)]
    return [*lines, "", *markdown_table(headings, rows), "", *_conclude(summary, reference)]


def _difference(name: str, values: Values, reference: Values) -> str:
    if name not in values or name not in reference:
        return ""
    value = fmean(values[name]) - fmean(reference[name])
    sign = "+" if value >= 0 else ""
    return f"{sign}{format_value(name, value)} {compare_seeds(name, values[name], reference[name])}"


def _conclude(summary: _Summary, reference: Values) -> list[str]:
    """Returns sentences that sort the variants by the metric that ranks them, including what did not help."""
    name = summary.metrics[0]
    labels: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for label, values in summary.values.items():
        if label != summary.protocol["reference"] and name in values and name in reference:
            labels[compare_seeds(name, values[name], reference[name])].append(markdown(label))
    words = {"better": "Helped", "worse": "Made it worse", "unclear": "No difference beyond the spread of the seeds"}
    lines = [f"- {words[verdict]}: {', '.join(names) or 'none'}." for verdict, names in labels.items()]
    return [f"By {markdown(title(name))} ({direction(name)}):", "", *lines]


def _training_lines(summary: _Summary) -> list[str]:
    # Variants that differ only in their decoding share a run, which has one line.
    runs = {row["run"]: row for row in reversed(summary.rows) if row.get("run")}
    trained = [row for row in summary.rows if row.get("run") and runs[row["run"]] is row]
    rows = [
        [markdown(row["variant"]), markdown(row["seed"]), f"{row['parameters'] / 1e6:.2f}M", f"{row['max_steps']}",
         markdown(row["global_batch"]), "" if seconds is None else f"{seconds:.1f}"]
        for row in trained for seconds in [row.get("training_seconds")]
    ]  # fmt: skip
    kinds = ", ".join(dict.fromkeys(str(row["kind"]) for row in trained if row.get("kind"))) or "not recorded"
    devices = ", ".join(dict.fromkeys(str(row["device"]) for row in trained if row.get("device")))
    text = f"Seconds are {markdown(kinds)} seconds of the training steps, without start-up and validation."
    text += f" Trained on: {markdown(devices)}." if devices else ""
    headings = ["variant", "seed", "parameters", "steps", "batch", "measured, s"]
    return [*paragraph(text), "", *markdown_table(headings, rows)]


def _failure_lines(summary: _Summary) -> list[str]:
    protocol, measured = summary.protocol, {(row["variant"], row["seed"]) for row in summary.rows}
    failed = [(row["variant"], row["seed"], row["failure"]) for row in summary.rows if row.get("failure")]
    failed += [
        (label, seed, "not trained or not measured")
        for label in protocol["variants"]
        for seed in protocol["seeds"]
        if (label, seed) not in measured
    ]
    return [f"- {markdown(label)}, seed {seed}: {_long(text)}" for label, seed, text in failed]


def _long(text: str) -> str:
    """Returns a text as Markdown without a limit on its length; single words are limited."""
    return " ".join(markdown(word) for word in text.split())
