"""The page of an ablation, made from ledger rows: results, differences from the base, training budgets and a figure.

The results are the mean and the range over the seeds. A difference counts only if it exceeds the spread of the seeds.
The figure has a panel per metric, with the mean, the range and the single seeds of each variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any, Literal

from maskgit_pl.errors import markdown, plain_label
from maskgit_pl.evaluation.ledger import Row, read_number
from maskgit_pl.evaluation.metrics import direction, find_metric, format_value, is_better, title
from maskgit_pl.evaluation.pages import Page, figure_to_png, heading, markdown_table, paragraph
from maskgit_pl.evaluation.reports.options import AblationProtocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Spread",
    "Summary",
    "ablation_markdown",
    "chance_of_separation",
    "make_ablation_page",
    "summarize",
]

# Metrics of tables and figures, in their order; those of a network come once per network.
_ORDER = ("rfid", "psnr_db", "ssim", "codebook_usage", "perplexity", "fid", "class_agreement", "diversity", "precision",
          "recall", "bits_per_token", "seconds_per_image")  # fmt: skip
_OF_FIRST = ("precision", "recall")  # shown only for the network that ranks the variants
_COLUMNS = ("variant", "seed", "run", "parameters", "max_steps", "global_batch", "seconds_per_step", "planned_seconds",
            "training_seconds", "kind", "device", "failure")  # fmt: skip
_TRAINING = {  # columns of the table of trainings
    "parameters": "parameters",
    "max_steps": "steps",
    "global_batch": "batch",
    "seconds_per_step": "pilot, s per step",
    "planned_seconds": "planned, s",
    "training_seconds": "measured, s",
}
_PANELS = 6
_FIGURE_COLUMNS = 3
_LABEL = 34  # characters of a label
_COLOURS = {"better": "#1b7837", "worse": "#b2182b", "unclear": "#555555", "reference": "#2166ac"}


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
    pictures = {f"{name}.png": _draw_ablation(summary)} if _choose_metrics(summary) else {}
    return Page(name, ablation_markdown(name, summary), [_flatten(row) for row in rows], pictures)


def ablation_markdown(name: str, summary: Summary) -> str:
    """Returns the text of the page; see ``make_ablation_page``."""
    lines = heading(f"Ablation: {markdown(name.removeprefix('ablation-'))}", summary.protocol.command)
    lines += [*_explain(summary), ""]
    if summary.spreads:
        lines += ["## Results", "", *_result_lines(summary), ""]
        lines += [f"![results]({name}.png)", ""] if _choose_metrics(summary) else []
        lines += [f"## Difference from {markdown(summary.protocol.reference)}", "", *_difference_lines(summary), ""]
    lines += ["## Training", "", *_training_lines(summary), ""]
    if summary.failures or summary.missing:
        lines += ["## Failed or missing", "", *_failure_lines(summary), ""]
    lines += paragraph(f"Measured on: {_long(summary.protocol.machine)}.")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Spread:
    """The values of a metric for all seeds of a variant.

    Args:
        values: Values by seed, at least one.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return sum(self.values.values()) / len(self.values)

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values.values())

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values.values())

    def compare(self, name: str, reference: Spread) -> Literal["better", "worse", "unclear"]:
        """Compares with a reference: better or worse only if the ranges of the seeds do not overlap.

        A single seed has no range, so that the verdict is always ``unclear``.

        Args:
            name: Name of the metric.
            reference: Values of the reference.
        """
        if min(len(self.values), len(reference.values)) < 2:
            return "unclear"
        if self.low <= reference.high and reference.low <= self.high:
            return "unclear"
        return "better" if is_better(name, self.mean, reference.mean) else "worse"


@dataclass(frozen=True)
class Summary:
    """The results of an ablation.

    Args:
        protocol: Settings that the variants share.
        rows: Rows of the ledger, sorted by variant and seed.
        metrics: Names of the metrics, in the order of tables and figures.
        spreads: Values by variant and metric; a variant without any result is missing.
        real: Values of real images by metric; empty if no images were generated.
    """

    protocol: AblationProtocol
    rows: Sequence[Row]
    metrics: tuple[str, ...]
    spreads: Mapping[str, Mapping[str, Spread]]
    real: Mapping[str, float]

    @property
    def failures(self) -> list[tuple[str, int, str]]:
        """The variant, seed and reason of each run that failed."""
        return [(str(row["variant"]), int(row["seed"]), str(row["failure"])) for row in self.rows if row.get("failure")]

    @property
    def missing(self) -> list[tuple[str, int]]:
        """The variant and seed of each run that has neither a result nor a reason."""
        found = {(row["variant"], row["seed"]) for row in self.rows}
        protocol = self.protocol
        return [(each, seed) for each in protocol.variants for seed in protocol.seeds if (each, seed) not in found]

    @property
    def compared(self) -> tuple[str, ...]:
        """The metrics in which variants are compared.

        Times of a machine with other work are not compared, and bits per token not for tokenizers: a collapsed codebook
        needs the fewest bits.
        """
        is_of_tokenizers = self.protocol.stage == "tokenizer"
        left_out = ("seconds_per_image", *(["bits_per_token"] if is_of_tokenizers else []))
        return tuple(name for name in self.metrics if name not in left_out)

    @property
    def ranking_metric(self) -> str:
        """The metric by which variants are ranked: the first one of the table."""
        return self.metrics[0]


def summarize(rows: Sequence[Row]) -> Summary:
    """Summarizes the rows of an ablation.

    Args:
        rows: Rows of ``select_rows``, at least one.

    Raises:
        ValueError: if a row is not one of an ablation.
    """
    protocol = AblationProtocol.from_row(rows[-1])
    names = {name for row in rows for name in row["numbers"]}
    shown = [name for name in names if _is_shown(name, protocol.first)]
    metrics = tuple(sorted(shown, key=lambda name: _place(name, protocol.first)))
    spreads: dict[str, dict[str, Spread]] = {}
    for label in protocol.variants:
        own = [row for row in rows if row["variant"] == label and not row["numbers"].keys().isdisjoint(metrics)]
        if own:
            spreads[label] = {
                name: Spread({row["seed"]: float(row["numbers"][name]) for row in own if name in row["numbers"]})
                for name in metrics
                if any(name in row["numbers"] for row in own)
            }
    real = rows[-1].get("real") or {}
    return Summary(protocol, rows, metrics, spreads, real)


def _is_shown(name: str, first: str) -> bool:
    metric, _, network = name.partition("/")
    return metric in _ORDER and (metric not in _OF_FIRST or network == first)


def _place(name: str, first: str) -> tuple[int, bool, str]:
    metric, _, network = name.partition("/")
    return _ORDER.index(metric), network != first, name


def chance_of_separation(seeds: int) -> float:
    """Returns the probability that the ranges of two equal variants are apart randomly.

    Formula: 2 n! n! / (2 n)! for n seeds each, since all orders of the 2 n values are equally likely.

    Args:
        seeds: Number n of seeds of each variant, >= 1.
    """
    return 2 / comb(2 * seeds, seeds)


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


def _draw_ablation(summary: Summary) -> bytes:
    """Draws up to 6 metrics, with one line per variant.

    The colour tells whether a variant differs from the reference by more than the spread of the seeds.

    Args:
        summary: Results, with at least one metric to draw.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    metrics = _choose_metrics(summary)
    labels = [label for label in summary.protocol.variants if label in summary.spreads]
    rows = -(-len(metrics) // _FIGURE_COLUMNS)
    columns = min(_FIGURE_COLUMNS, len(metrics))
    height = rows * (1.3 + 0.3 * len(labels)) + 0.6
    page = Figure(figsize=(4.0 * columns + 2.0, height), layout="constrained")
    panels = page.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, name in zip(panels.flat, metrics, strict=False):
        _draw_panel(axes, summary, name, labels)
    for axes in list(panels.flat)[len(metrics) :]:
        axes.set_visible(False)
    for row in panels:
        row[0].set_yticks(range(len(labels)), [_shorten(label) for label in labels], fontsize=9)
        row[0].set_ylim(len(labels) - 0.4, -0.6)  # the first variant on top
    protocol = summary.protocol
    seeds = f"seeds {', '.join(map(str, protocol.seeds))}"
    page.suptitle(plain_label(f"{protocol.dataset}, budget {protocol.budget}, {seeds}"), fontsize=11)
    words = {"reference": f"reference: {_shorten(protocol.reference)}", "better": "better", "worse": "worse",
             "unclear": "ranges overlap"}  # fmt: skip
    handles = [Line2D([], [], color=_COLOURS[key], marker="o", label=text) for key, text in words.items()]
    page.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure_to_png(page)


def _choose_metrics(summary: Summary) -> list[str]:
    """Returns the metrics of the panels: each kind once, in the first network."""
    chosen: dict[str, str] = {}
    for name in summary.compared:
        if any(name in found for found in summary.spreads.values()):
            chosen.setdefault(name.partition("/")[0], name)
    return list(chosen.values())[:_PANELS]


def _draw_panel(axes: Axes, summary: Summary, name: str, labels: list[str]) -> None:
    factor = find_metric(name).factor
    reference = summary.spreads.get(summary.protocol.reference, {}).get(name)
    if reference is not None:
        axes.axvline(reference.mean * factor, color=_COLOURS["reference"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if len(reference.values) > 1:
            axes.axvspan(reference.low * factor, reference.high * factor, color=_COLOURS["reference"], alpha=0.12)
    for place, label in enumerate(labels):
        spread = summary.spreads[label].get(name)
        if spread is not None:
            _draw_variant(axes, place, spread, factor, _colour(summary, label, name, spread, reference))
    axes.set_title(f"{plain_label(title(name))}\n{direction(name)}", fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)


def _draw_variant(axes: Axes, place: int, spread: Spread, factor: float, colour: str) -> None:
    axes.plot([spread.low * factor, spread.high * factor], [place, place], color=colour, linewidth=2, alpha=0.6)
    values = [value * factor for value in spread.values.values()]
    axes.plot(values, [place] * len(values), linestyle="", marker="|", markersize=9, color=colour, alpha=0.7)
    axes.plot([spread.mean * factor], [place], marker="o", markersize=6, color=colour, zorder=3)


def _colour(summary: Summary, label: str, name: str, spread: Spread, reference: Spread | None) -> str:
    if label == summary.protocol.reference:
        return _COLOURS["reference"]
    return _COLOURS["unclear" if reference is None else spread.compare(name, reference)]


def _shorten(label: str) -> str:
    plain = plain_label(label)
    return plain if len(plain) <= _LABEL else plain[: _LABEL - 3] + "..."
