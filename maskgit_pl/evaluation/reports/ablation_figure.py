"""The figure of an ablation: a panel per metric, with the mean, the range and the single seeds of each variant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.evaluation.drawing import figure_to_png
from maskgit_pl.evaluation.metric_names import direction, find_metric, title
from maskgit_pl.evaluation.reports.ablation_summary import Spread, Summary
from maskgit_pl.text import plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["choose_metrics", "draw_ablation"]

_PANELS = 6
_COLUMNS = 3
_LABEL = 34  # characters of a label
_COLOURS = {"better": "#1b7837", "worse": "#b2182b", "unclear": "#555555", "reference": "#2166ac"}


def draw_ablation(summary: Summary) -> bytes:
    """Draws up to 6 metrics, with one line per variant.

    The colour tells whether a variant differs from the reference by more than the spread of the seeds.

    Args:
        summary: Results, with at least one metric to draw.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    metrics = choose_metrics(summary)
    labels = [label for label in summary.protocol.variants if label in summary.spreads]
    rows = -(-len(metrics) // _COLUMNS)
    columns = min(_COLUMNS, len(metrics))
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


def choose_metrics(summary: Summary) -> list[str]:
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
