"""The page of Figure 4: the decoding time per image over the number of tokens, with ratios to MaskGIT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from maskgit_pl.devices import check_device
from maskgit_pl.evaluation.drawing import LineEnd, figure_to_png, name_lines
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.pages import Page, heading, markdown_table, paragraph
from maskgit_pl.evaluation.reports.options import TimingOptions
from maskgit_pl.evaluation.reports.timing import METHODS, SIZES, Method, Timing, measure_timings, read_sizes
from maskgit_pl.progress import Bars, no_bars
from maskgit_pl.text import markdown, plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_timings", "make_timing_page", "measure_figure_4"]

_COLOURS = {"MaskGIT": "#0d7d6c", "autoregressive, KV cache": "#d98b1f", "autoregressive, no cache": "#c0392b"}
_TICKS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
_INK = "#444444"
_EXPLANATIONS = {  # by type of the device
    "cpu": "The paper reports ratios of 30 to 64 on a GPU, which computes all tokens of an image in about the time of "
    "one. On a CPU, as here, the time is proportional to the work, and a cache saves most of it.",
    "cuda": "The paper reports ratios of 30 to 64, also on a GPU. If the tokens of an image do not fill the GPU, a "
    "step for all tokens takes about as long as a step for one, and the ratio approaches N / T. With more tokens, the "
    "time is proportional to the work.",
}
_OTHER_DEVICE = "The paper reports ratios of 30 to 64 on a GPU."
_STRIP = 0.2  # height of the strip of ratios, as a fraction of the axes' height


def _group_by_method(timings: Sequence[Timing]) -> dict[Method, dict[int, Timing]]:
    return {method: {timing.num_tokens: timing for timing in timings if timing.method == method} for method in METHODS}


def measure_figure_4(folder: Path | None, options: TimingOptions, *, command: str, bars: Bars = no_bars) -> Page:
    """Measures Figure 4 with random weights; points in the ledger are not measured again.

    Args:
        folder: Folder of the transformer whose sizes are timed; None for sizes that suit a CPU.
        options: Numbers of tokens, sizes, folder and device.
        command: Command that produces the page.
        bars: Progress bars.

    Raises:
        ValueError: if a size is out of range, a number of tokens is not a square, or the device does not exist.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = replace(SIZES if folder is None else read_sizes(folder), **options.sizes)
    bar = bars("figure 4: points", len(METHODS) * len(options.num_tokens))
    timings = measure_timings(
        Ledger(options.results / FILE_NAME),
        sizes=sizes,
        num_tokens=options.num_tokens,
        device=check_device(device),
        on_point=lambda _: bar(1),
    )
    return make_timing_page(timings, command=command, folder=options.results)


def draw_timings(timings: Sequence[Timing]) -> bytes:
    """Draws the seconds per image over the number of tokens, with a line per method and its ratios to MaskGIT.

    Args:
        timings: See ``measure_timings``.

    Returns:
        A PNG.

    Source: paper, Figure 4.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(8.8, 5.4), layout="constrained")
    axes = page.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lines = _group_by_method(timings)
    for method, points in lines.items():
        axes.plot(
            list(points), [timing.seconds for timing in points.values()], color=_COLOURS[method],
            linewidth=3 if method == "MaskGIT" else 1.8, marker="o", markersize=6 if method == "MaskGIT" else 4.5,
            zorder=3 if method == "MaskGIT" else 2,
        )  # fmt: skip
    _format_axes(axes, timings)
    _write_ratios(axes, lines)
    ends: dict[str, LineEnd] = {method: _line_end(method, points) for method, points in lines.items()}
    name_lines(page, axes, ends, least=0.09)
    return figure_to_png(page)


def _line_end(method: Method, points: dict[int, Timing]) -> LineEnd:
    last = points[max(points)]
    steps = sorted({point.num_steps for point in points.values()})
    label, _, cache = method.partition(", ")
    note = cache or f"T = {' and '.join(map(str, steps))}"
    point = (last.num_tokens, last.seconds)
    return LineEnd(label, point, _COLOURS[method], bold=method == "MaskGIT", second_line=note)


def _write_ratios(axes: Axes, lines: dict[Method, dict[int, Timing]]) -> None:
    """Writes the ratios to MaskGIT of the other methods, as two rows of numbers below the lines."""
    low, high = axes.get_ylim()
    # On a logarithmic axis, a strip of a given fraction needs a power of the range.
    axes.set_ylim(low * (low / high) ** _STRIP, high)  # room for the rows
    place = axes.get_xaxis_transform()
    for method, height in zip(METHODS[1:], (0.02, 0.075), strict=True):
        for count, timing in lines[method].items():
            axes.text(
                count, height, f"{_format_ratio(timing, lines)} x", transform=place, color=_COLOURS[method],
                fontsize=10.5, fontweight="bold", ha="center", va="bottom",
            )  # fmt: skip
    axes.text(0.012, 0.15, "time relative to MaskGIT", transform=axes.transAxes, color=_INK, fontsize=9, va="center")


def _format_ratio(timing: Timing, lines: dict[Method, dict[int, Timing]]) -> str:
    """Returns the ratio of a time to MaskGIT's, with two digits."""
    factor = timing.seconds / lines["MaskGIT"][timing.num_tokens].seconds
    return f"{factor:.1f}" if factor < 9.95 else f"{factor:.0f}"


def _format_axes(axes: Axes, timings: Sequence[Timing]) -> None:
    counts = sorted({timing.num_tokens for timing in timings})
    seconds = [timing.seconds for timing in timings]
    axes.set_xticks(counts, [f"{count}\n{math.isqrt(count)} x {math.isqrt(count)}" for count in counts])
    shown = [tick for tick in _TICKS if min(seconds) / 2 <= tick <= max(seconds) * 2]
    axes.set_yticks(shown, [f"{tick:g} s" if tick >= 1 else f"{1000 * tick:g} ms" for tick in shown])
    axes.minorticks_off()
    axes.set_xlabel("tokens per image, N")
    axes.set_ylabel("transformer time per image")
    first = timings[0]
    axes.set_title("Figure 4: autoregressive decoding and MaskGIT", fontsize=12, loc="left", pad=36)
    axes.annotate(
        f"{plain_label(first.network)}; batch 1, {plain_label(first.dtype)}\n"
        f"{plain_label(first.device)}, torch {plain_label(first.torch)}", (0, 1), (0, 5),
        xycoords="axes fraction", textcoords="offset points", fontsize=9, color=_INK, va="bottom", linespacing=1.4,
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.06, y=0.1)


def make_timing_page(timings: Sequence[Timing], *, command: str, folder: Path = Path()) -> Page:
    """Returns the page: an explanation, the figure, and a table with the ratios.

    Args:
        timings: See ``measure_timings``.
        command: Command that produces the page.
        folder: Folder of the page.
    """
    first, lines = timings[0], _group_by_method(timings)
    counts = sorted({timing.num_tokens for timing in timings})
    text = [
        *heading("Figure 4: decoding time of autoregressive decoding and MaskGIT", command),
        "![time per image over the number of tokens](figure-4.png)",
        "",
        *paragraph(
            "Time of the transformer per image with batch size 1, without guidance and without the tokenizer. Each",
            "value is the median of n runs, in which the methods took turns. Both methods use the same network with",
            "random weights, autoregressive decoding with a causal attention mask. MaskGIT decodes with the cosine",
            "schedule,",
            "the most confident tokens first; its first step, of an all-masked image, is computed, too.",
            f"Network: {markdown(first.network)}, {markdown(first.dtype)}. Machine:",
            f"{markdown(first.device)}, torch {markdown(first.torch)}.",
        ),
        "",
    ]
    rows = []
    for count in counts:
        here = [lines[method][count] for method in METHODS]
        cells = [f"{_format_seconds(timing)} (n = {timing.runs})" for timing in here]
        ratios = [_format_ratio(timing, lines) for timing in here[1:]]
        rows.append([str(count), str(here[0].num_steps), *cells, *ratios])
    headings = ["N", "T of MaskGIT", *METHODS, "KV cache / MaskGIT", "no cache / MaskGIT"]
    text += markdown_table(headings, rows, left=0)
    largest = [_format_ratio(lines[method][counts[-1]], lines) for method in METHODS[1:]]
    conclusion = paragraph(
        f"At N = {counts[-1]}, autoregressive decoding takes {largest[0]} times as long as MaskGIT with a cache, and",
        f"{largest[1]} times without one. {_EXPLANATIONS.get(first.kind, _OTHER_DEVICE)}",
    )
    values = [asdict(timing) for timing in timings]
    return Page(
        "figure-4", "\n".join([*text, "", *conclusion, ""]), values, {"figure-4.png": draw_timings(timings)}, folder
    )


def _format_seconds(timing: Timing) -> str:
    return f"{timing.seconds:.3g} s" if timing.seconds >= 1 else f"{1000 * timing.seconds:.3g} ms"
