"""The page of an ablation, made from ledger rows: results, differences from the base, and trainings.

The results are the mean and the range over the seeds. A difference counts only if it exceeds the spread of the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import comb
from statistics import fmean
from typing import Any, Literal

from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.metrics import find_metric, format_value, is_better, known_metrics, title
from maskgit_pl.evaluation.pages import Page, format_seeds, heading, markdown_table, paragraph
from maskgit_pl.text import markdown

# Metrics of tables, in their order, before others; those of a network come once per network.
_ORDER = ("rfid", "psnr_db", "ssim", "codebook_usage", "perplexity", "fid", "class_agreement", "diversity",
          "two_sample", "pixel_fid", "precision", "recall", "bits_per_token")  # fmt: skip
# The CSV has them. Times of a machine with other work do not compare variants.
_NOT_SHOWN = ("sfid", "kid", "is", "seconds_per_image", "two_sample_auc", "brightness_spread", "contrast_spread",
              "weave")  # fmt: skip
_OF_FIRST = ("precision", "recall")  # shown only for the first network
_COLUMNS = ("variant", "seed", "run", "parameters", "max_steps", "global_batch", "training_seconds", "failure",
            "exit_code")  # fmt: skip

Values = Mapping[str, list[float]]  # values of all seeds by metric


def make_ablation_page(name: str, rows: Sequence[Row]) -> Page:
    """Returns the page of an ablation from the rows of its variants and seeds.

    The variants are in groups of the same size, by the values of ``AblationConfig.at``; the first of each is the base.
    """
    protocol = rows[-1]["protocol"]
    rows = sorted(rows, key=lambda row: (protocol["variants"].index(row["variant"]), row["seed"]))
    values = _collect_values(rows, protocol)
    lines = heading(f"Ablation: {markdown(name.removeprefix('ablation-'))}")
    lines += [*_explain(protocol), ""]
    if any(values.values()):
        headings = [f"## Results at {markdown(label)}" for label in protocol.get("at", ())] or ["## Results"]
        for number, heading_line in enumerate(headings):
            size = len(values) // len(headings)
            group = dict([*values.items()][number * size : (number + 1) * size])
            lines += [heading_line, "", *_result_lines(group, rows[-1]["real"]), ""]
            lines += [f"## Difference from {markdown(next(iter(group)))}", ""]
            lines += [*_difference_lines(group, len(protocol["seeds"])), ""]
    lines += _step_lines(rows, protocol)
    lines += [] if protocol.get("of") else ["## Training", "", *_training_lines(rows), ""]
    failed = [
        f"- {markdown(row['variant'])}, seed {row['seed']}: {_long(row['failure'])}"
        for row in rows
        if row.get("failure")
    ]
    lines += ["## Failed", "", *failed, ""] if failed else []
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


def _collect_values(rows: Sequence[Row], protocol: Mapping[str, Any]) -> dict[str, Values]:
    """Returns the values that the page shows, by variant and by metric, in the order of the tables."""
    known = known_metrics()
    # A collapsed codebook needs the fewest bits per token, so that they do not compare tokenizers.
    left_out = [*_NOT_SHOWN, *(["bits_per_token"] if protocol["stage"] == "tokenizer" else [])]

    def order(name: str) -> tuple[int, bool, str]:
        metric, _, network = name.partition("/")
        return _ORDER.index(metric) if metric in _ORDER else len(_ORDER), network != protocol["first"], name

    def is_shown(name: str) -> bool:
        metric, _, network = name.partition("/")
        is_of_other = metric in _OF_FIRST and network != protocol["first"]
        return metric in known and metric not in left_out and not is_of_other

    names = sorted({name for row in rows for name in row["numbers"] if is_shown(name)}, key=order)
    return {
        label: {
            name: [row["numbers"][name] for row in rows if row["variant"] == label and name in row["numbers"]]
            for name in names
        }
        for label in protocol["variants"]
    }


def _explain(protocol: Mapping[str, Any]) -> list[str]:
    base = ", ".join(
        f"{markdown(key)} {markdown('not set' if value is None else value)}" for key, value in protocol["base"].items()
    )
    run = protocol.get("of")
    subject = f"Decoding of the run {markdown(run)}" if run else f"Stage {markdown(protocol['stage'])}"
    lines = paragraph(
        f"{subject} on {markdown(protocol['dataset'])}, each variant {'measured' if run else 'trained'} with the seeds",
        f"{', '.join(map(str, protocol['seeds']))}.",
        f"Base: {base}." if base else "",
    )
    if protocol["stage"] == "transformer":
        lines += ["", *paragraph(
            f"{protocol['num_images']} images of each run, evenly distributed over the classes, are compared with",
            f"{markdown(protocol['compared'])}.",
            f"Seeds differ in {'' if run else 'initial weights, order of the data, masks, and '}the noise of decoding;",
            f"the variants of a seed share {'it' if run else 'them'}.",
            f"Decoding, unless it is varied: {_long(protocol['decoding'])}.",
            "Bits per token are the order-agnostic bound of the likelihood of real images (the exact value of an",
            "autoregressive model), which depends neither on the mask schedule nor on the decoding.",
        )]  # fmt: skip
    else:
        lines += ["", *paragraph(
            "The tokenizers reconstruct all images of the val split. FID of transformers is not comparable between",
            "tokenizers with other codes.",
        )]  # fmt: skip
    return lines


def _result_lines(values: Mapping[str, Values], real: Mapping[str, float]) -> list[str]:
    names = list(next(iter(values.values())))
    best = {
        name: (max if find_metric(name).higher_is_better else min)(
            fmean(each[name]) for each in values.values() if each[name]
        )
        for name in names
    }
    rows = []
    for label, of_variant in values.items():
        cells = []
        for name, seeds in of_variant.items():
            cell = format_seeds(seeds, partial(format_value, name)) or "failed"
            cells.append(f"**{cell}**" if seeds and fmean(seeds) == best[name] else cell)
        rows.append([markdown(label), *cells])
    if real:
        rows.append(["real images", *(format_value(name, real[name]) if name in real else "" for name in names)])
    higher = [title(name) for name in names if find_metric(name).higher_is_better]
    text = "Mean over the seeds, and the lowest and highest value. The best mean of each column is bold."
    text += f" Higher is better for {markdown(', '.join(higher))}; lower for the others." if higher else ""
    return [*paragraph(text), "", *markdown_table(["variant", *(markdown(title(name)) for name in names)], rows)]


def _difference_lines(values: Mapping[str, Values], num_seeds: int) -> list[str]:
    base, *others = values.values()
    labels = list(values)[1:]
    rows = [
        [markdown(label), *(_difference(name, each[name], base[name]) for name in base)]
        for label, each in zip(labels, others, strict=True)
    ]
    lines = paragraph(
        "Difference of the means. `better` and `worse`: the ranges of the seeds do not overlap; `unclear`: they do.",
        f"Two equal variants with {num_seeds} seeds each would differ randomly in {chance_of_separation(num_seeds):.0%}"
        " of the comparisons of one metric."
        if num_seeds > 1
        else "With one seed, every difference is unclear.",
    )
    return [*lines, "", *markdown_table(["variant", *(markdown(title(name)) for name in base)], rows)]


def _difference(name: str, values: Sequence[float], base: Sequence[float]) -> str:
    if not values or not base:
        return ""
    value = fmean(values) - fmean(base)
    sign = "+" if value >= 0 else ""
    return f"{sign}{format_value(name, value)} {compare_seeds(name, values, base)}"


def _step_lines(rows: Sequence[Row], protocol: Mapping[str, Any]) -> list[str]:
    """Returns the section with the FIDs that T was chosen by, if it was."""
    chosen = [row for row in rows if "best_steps" in row]
    if not chosen:
        return []
    steps = [*chosen[0]["fid_by_steps"]]
    cells = []
    for label in protocol["variants"]:
        of_variant = [row for row in chosen if row["variant"] == label]
        best = ", ".join(map(str, sorted({row["best_steps"] for row in of_variant})))
        fids = ([row["fid_by_steps"][number] for row in of_variant] for number in steps)
        cells.append([markdown(label), best, *(format_seeds(each, partial(format_value, "fid")) for each in fids)])
    lines = paragraph(
        f"The best T of each seed has the lowest FID in the features of {markdown(protocol['first'])}. The images of",
        "this choice have other noise than those of the results, which are measured at the best T.",
    )
    table = markdown_table(["variant", "best T", *(f"T = {number}" for number in steps)], cells)
    return ["## FID by number of steps T", "", *lines, "", *table, ""]


def _training_lines(rows: Sequence[Row]) -> list[str]:
    runs: dict[str, Row] = {}
    for row in rows:
        if row.get("run"):
            runs.setdefault(row["run"], row)  # variants that differ only in their decoding share a run
    cells = [
        [markdown(row["variant"]), markdown(row["seed"]), f"{row['parameters'] / 1e6:.2f}M", f"{row['max_steps']}",
         markdown(row["global_batch"]), "" if (seconds := row["training_seconds"]) is None else f"{seconds:.1f}"]
        for row in runs.values()
    ]  # fmt: skip
    return [
        "CPU seconds on a CPU, else wall-clock seconds, of the training steps, without start-up and validation.",
        "",
        *markdown_table(["variant", "seed", "parameters", "steps", "batch", "measured, s"], cells),
    ]


def _long(text: str) -> str:
    """Returns a text as Markdown without a limit on its length; single words are limited."""
    return " ".join(markdown(word) for word in text.split())
