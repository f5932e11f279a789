"""The page of an ablation, made from ledger rows: results, differences from the base, and training budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskgit_pl.evaluation.ledger import Row, read_number
from maskgit_pl.evaluation.metric_names import direction, find_metric, format_value, title
from maskgit_pl.evaluation.pages import Page, heading, markdown_table, paragraph
from maskgit_pl.evaluation.reports.ablation_figure import choose_metrics, draw_ablation
from maskgit_pl.evaluation.reports.ablation_summary import Spread, Summary, chance_of_separation, summarize
from maskgit_pl.text import markdown

__all__ = ["ablation_markdown", "make_ablation_page"]

_COLUMNS = ("variant", "seed", "run", "parameters", "max_steps", "global_batch", "seconds_per_step", "planned_seconds",
            "training_seconds",
            "kind", "device", "failure")  # fmt: skip

_TRAINING = {  # columns of the table of trainings
    "parameters": "parameters",
    "max_steps": "steps",
    "global_batch": "batch",
    "seconds_per_step": "pilot, s per step",
    "planned_seconds": "planned, s",
    "training_seconds": "measured, s",
}


def make_ablation_page(name: str, rows: Sequence[Row]) -> Page:
    """Returns the page of an ablation.

    Args:
        name: Name of the ablation, and of the files of its page.
        rows: Rows of ``select_rows``, at least one.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError(f"ablation {name}: there must be at least one row, got none; run it without --page-only first")
    summary = summarize(rows)
    pictures = {f"{name}.png": draw_ablation(summary)} if choose_metrics(summary) else {}
    return Page(name, ablation_markdown(name, summary), [_flatten(row) for row in rows], pictures)


def ablation_markdown(name: str, summary: Summary) -> str:
    """Returns the text of the page; see ``make_ablation_page``."""
    lines = heading(f"Ablation: {markdown(name.removeprefix('ablation-'))}", summary.protocol.command)
    lines += [*_explain(summary), ""]
    if summary.spreads:
        lines += ["## Results", "", *_result_lines(summary), ""]
        lines += [f"![results]({name}.png)", ""] if choose_metrics(summary) else []
        lines += [f"## Difference from {markdown(summary.protocol.reference)}", "", *_difference_lines(summary), ""]
    lines += ["## Training", "", *_training_lines(summary), ""]
    if summary.failures or summary.missing:
        lines += ["## Failed or missing", "", *_failure_lines(summary), ""]
    lines += paragraph(f"Measured on: {_long(summary.protocol.machine)}.")
    return "\n".join(lines) + "\n"


def _explain(summary: Summary) -> list[str]:
    protocol = summary.protocol
    base = ", ".join(f"{markdown(key)} {markdown(_text(value))}" for key, value in protocol.base.items())
    seeds = ", ".join(map(str, protocol.seeds))
    what = f"Each variant was trained with the seeds {seeds}" if len(protocol.seeds) > 1 else (
        f"Each variant was trained with the seed {seeds} only, so that nothing is known about the spread"
    )  # fmt: skip
    lines = paragraph(
        f"{what} ({markdown(protocol.stage)} on {markdown(protocol.dataset)}), with the budget",
        f"{markdown(protocol.budget)} for each run. {_explain_budget(summary)}",
        f"Base: {base}." if base else "",
    )
    if protocol.stage == "transformer":
        lines += ["", *paragraph(
            f"{protocol.num_images} images of each run, evenly distributed over the classes, are compared with",
            f"{markdown(protocol.compared)}. Seeds differ in initial weights, order of the data, masks, and the noise",
            "of decoding; the variants of a seed share them. Decoding, unless it is varied:",
            f"{_long(protocol.decoding)}. Bits per token are the order-agnostic bound of the likelihood of real",
            "images (the exact value of an autoregressive model), which depends neither on the mask schedule nor on",
            "the decoding.",
        )]  # fmt: skip
    else:
        lines += ["", *paragraph(
            "The tokenizers reconstruct all images of the val split. Bits per token and FID of transformers are not",
            "comparable between tokenizers with other codes.",
        )]  # fmt: skip
    return lines


def _explain_budget(summary: Summary) -> str:
    protocol = summary.protocol
    if not protocol.budget.startswith("seconds"):
        return "All variants make the same number of steps, and may need different times."
    return (
        "A pilot measured the seconds of a step of each variant, which gives its number of steps and so its "
        "learning-rate schedule: CPU seconds of the process on a CPU, seconds of the device otherwise, one run at a "
        f"time{'' if protocol.threads is None else f', {protocol.threads} CPU threads'}."
    )


def _result_lines(summary: Summary) -> list[str]:
    rows = []
    for label in summary.protocol.variants:
        found = summary.spreads.get(label, {})
        rows.append([_mark(summary, label), *(_cell(name, found.get(name)) for name in summary.metrics)])
    if summary.real:
        real = [format_value(name, summary.real[name]) if name in summary.real else "" for name in summary.metrics]
        rows.append(["real images", *real])
    headings = ["variant", *(markdown(title(name)) for name in summary.metrics)]
    several = len(summary.protocol.seeds) > 1
    text = "Mean over the seeds, and the lowest and highest value." if several else "One seed, no spread."
    text += f" The best mean of each column is bold. {_directions(summary)}"
    return [*paragraph(text), "", *markdown_table(headings, _embolden(summary, rows))]


def _directions(summary: Summary) -> str:
    higher = [title(name) for name in summary.compared if find_metric(name).higher_is_better]
    others = [title(name) for name in summary.metrics if name not in summary.compared]
    text = f"Higher is better for {markdown(', '.join(higher))}; lower for the others." if higher else ""
    return f"{text} Not compared: {markdown(', '.join(others))}." if others else text


def _mark(summary: Summary, label: str) -> str:
    return markdown(label) + (" (reference)" if label == summary.protocol.reference and label != "base" else "")


def _cell(name: str, spread: Spread | None) -> str:
    if spread is None:
        return "failed"
    mean = format_value(name, spread.mean)
    if len(spread.values) < 2:
        return mean
    return f"{mean} ({format_value(name, spread.low)} to {format_value(name, spread.high)})"


def _embolden(summary: Summary, rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns the rows with the best mean of each metric in bold."""
    made = [list(row) for row in rows]
    for column, name in enumerate(summary.compared, start=1):  # the first columns
        means = {label: found[name].mean for label, found in summary.spreads.items() if name in found}
        best = (max if find_metric(name).higher_is_better else min)(means.values(), default=None)
        for place, label in enumerate(summary.protocol.variants):
            if len(means) > 1 and means.get(label) == best:
                made[place][column] = f"**{made[place][column]}**"
    return made


def _difference_lines(summary: Summary) -> list[str]:
    protocol = summary.protocol
    reference = summary.spreads.get(protocol.reference)
    if reference is None:
        return ["The reference has no result."]
    rows = []
    for label in protocol.variants:
        found = summary.spreads.get(label)
        if found is not None and label != protocol.reference:
            rows.append([markdown(label), *(_difference(name, found, reference) for name in summary.compared)])
    chance = chance_of_separation(len(protocol.seeds))
    lines = paragraph(
        "Difference of the means. `better` and `worse`: the ranges of the seeds do not overlap; `unclear`: they do.",
        f"Two equal variants with {len(protocol.seeds)} seeds each would differ randomly in {chance:.0%} of the"
        " comparisons of one metric."
        if len(protocol.seeds) > 1
        else "With one seed, every difference is unclear.",
    )
    headings = ["variant", *(markdown(title(name)) for name in summary.compared)]
    return [*lines, "", *markdown_table(headings, rows), "", *_conclude(summary, reference)]


def _difference(name: str, found: Mapping[str, Spread], reference: Mapping[str, Spread]) -> str:
    if name not in found or name not in reference:
        return ""
    value = found[name].mean - reference[name].mean
    sign = "+" if value >= 0 else ""
    return f"{sign}{format_value(name, value)} {found[name].compare(name, reference[name])}"


def _conclude(summary: Summary, reference: Mapping[str, Spread]) -> list[str]:
    """Returns sentences that sort the variants by the metric that ranks them, including what did not help."""
    name = summary.ranking_metric
    sorted_by: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for label in summary.protocol.variants:
        found = summary.spreads.get(label, {})
        if label != summary.protocol.reference and name in found and name in reference:
            sorted_by[found[name].compare(name, reference[name])].append(label)
    words = {"better": "Helped", "worse": "Made it worse", "unclear": "No difference beyond the spread of the seeds"}
    lines = [f"By {markdown(title(name))} ({direction(name)}):", ""]
    for verdict, labels in sorted_by.items():
        lines.append(f"- {words[verdict]}: {', '.join(map(markdown, labels)) or 'none'}.")
    return lines


def _training_lines(summary: Summary) -> list[str]:
    # Variants that differ only in their decoding share a run, which has one line.
    runs = {row["run"]: row for row in reversed(summary.rows) if row.get("run")}
    trained = [row for row in summary.rows if row.get("run") and runs[row["run"]] is row]
    shown = [name for name in _TRAINING if any(row.get(name) is not None for row in trained)]
    rows = [
        [markdown(row["variant"]), markdown(row["seed"]), *(_training_cell(row, name) for name in shown)]
        for row in trained
    ]
    kinds = ", ".join(dict.fromkeys(str(row["kind"]) for row in trained if row.get("kind"))) or "not recorded"
    devices = ", ".join(dict.fromkeys(str(row["device"]) for row in trained if row.get("device")))
    text = f"Seconds are {markdown(kinds)} seconds of the training steps, without start-up and validation."
    text += f" Trained on: {markdown(devices)}." if devices else ""
    headings = ["variant", "seed", *(_TRAINING[name] for name in shown)]
    return [*paragraph(text), "", *markdown_table(headings, rows)]


def _training_cell(row: Row, name: str) -> str:
    value = read_number(row, name) if name != "global_batch" else None
    if value is None:
        return markdown(row.get(name) or "")
    if name == "parameters":
        return f"{value / 1e6:.2f}M"
    return f"{value:.0f}" if name == "max_steps" else f"{value:.4f}" if name == "seconds_per_step" else f"{value:.1f}"


def _failure_lines(summary: Summary) -> list[str]:
    lines = [f"- {markdown(label)}, seed {seed}: {_long(text)}" for label, seed, text in summary.failures]
    return lines + [f"- {markdown(label)}, seed {seed}: not trained or not measured" for label, seed in summary.missing]


def _flatten(row: Row) -> dict[str, Any]:
    """Returns the columns of the CSV file: one per metric, unrounded."""
    return {**{name: row.get(name) for name in _COLUMNS if name in row}, **row["numbers"]}


def _long(text: str) -> str:
    """Returns a text as Markdown without a limit on its length; single words are limited."""
    return " ".join(markdown(word) for word in text.split())


def _text(value: object) -> str:
    return "not set" if value is None else str(value)
