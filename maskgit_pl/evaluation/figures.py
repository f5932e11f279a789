"""Figures 2 and 8 of the paper.

Figure 2 shows the decoding of models step by step. The panels of Figure 8 are the mask ratio of each schedule, and the
FID of its model over the number of steps T. ``timing`` has Figure 4.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Figures 2 and 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from maskgit_pl import pipeline
from maskgit_pl.decoding import ParallelDecoder
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.devices import find_device
from maskgit_pl.evaluation.options import ReportOptions, check_runs
from maskgit_pl.evaluation.pages import (
    Page,
    code_cell,
    figure_to_png,
    heading,
    image_to_png,
    markdown_table,
    paragraph,
)
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.schedules import MaskSchedule
from maskgit_pl.text import markdown, plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
_REAL = "#3a7d44"
_POINTS = 513  # points of a curve of mask ratios


def figure_2(
    runs: Sequence[Path | str],
    options: ReportOptions | None = None,
    *,
    class_name: str | None = None,
    bars: Bars = no_bars,
) -> Page:
    """Makes Figure 2: the decoding of each model step by step, such as that of an autoregressive one and of MaskGIT.

    Args:
        runs: Run folders or pretrained folders, in the order of the figure.
        options: Seed of the image, device and folder of the results; None for the defaults.
        class_name: Name or index of the class of the image; None for the first class.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if a run does not exist.
        ValueError: if there is no run, or the class is unknown.
    """
    options = options or ReportOptions()
    check_runs("figure 2", runs)
    bar, recordings, rows = bars("figure 2: models", len(runs)), [], []
    for run in runs:
        pipe = pipeline.MaskGIT.from_pretrained(run).to(find_device(options.device))
        label = 0 if class_name is None else pipe.classes.parse(class_name)
        recording = pipe.record([label], seed=options.seed)
        model = "autoregressive" if pipe.decoding.is_autoregressive else "MaskGIT"
        recordings.append((model, recording))
        rows += [
            {"run": Path(run).name, "model": model, "class": recording.captions[0], "seed": options.seed,
             "step": number, "known": step.tokens.shape[1] - int(step.still_masked.sum())}
            for number, step in enumerate(recording.steps, start=1)
        ]  # fmt: skip
        bar(1)
    lines = [
        *heading("Figure 2: decoding step by step"),
        "![tokens and image of each step](figure-2.png)",
        "",
        *paragraph(
            "For each model, the rows show the masked tokens before a step in grey, the confidence of the codes, the",
            "tokens of the step in an orange frame, and the image that the tokenizer decodes from all tokens. MaskGIT",
            "predicts the masked ones, too; those of an autoregressive model are code 0.",
            f"Class {markdown(rows[0]['class'])}, seed {options.seed}.",
        ),
        "",
        *markdown_table(
            ["model", "run", "steps T"],
            [
                [model, code_cell(Path(run).name), str(len(recording.steps))]
                for run, (model, recording) in zip(runs, recordings, strict=True)
            ],
            left=2,
        ),
    ]
    picture = image_to_png(_stack([each.filmstrip(f"{name}, {len(each.steps)} steps") for name, each in recordings]))
    return Page("figure-2", lines, rows, {"figure-2.png": picture}, options.results)


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Returns pictures below each other."""
    sheet = Image.new("RGB", (max(image.width for image in pictures), sum(image.height for image in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def draw_figure_8(
    schedules: Mapping[str, MaskSchedule],
    curves: Mapping[str, Mapping[int, float]],
    *,
    num_tokens: int,
    network: str,
    num_images: int,
    floor: float,
    dataset: str,
) -> bytes:
    """Draws the mask schedules on the left, and the FID of the model of each over T on the right, as a PNG.

    Each line has a star at its best T. ``floor`` is the FID of as many real images as ``num_images``, the images of
    each point.
    """
    page = Figure(figsize=(13.4, 5.2), layout="constrained")
    left, right = page.subplots(1, 2)
    _plot_ratios(left, schedules, num_tokens)
    left.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=2)
    colours, values = _choose_colours(curves), [value for curve in curves.values() for value in curve.values()]
    right.set_xscale("log", base=2)
    if max(values) > 4 * min(values):
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
    # The legend is in the order of the line ends.
    for name, curve in sorted(curves.items(), key=lambda item: -item[1][max(item[1])]):
        best = min(curve, key=lambda steps: curve[steps])
        right.plot(list(curve), list(curve.values()), color=colours[name], marker="o", linewidth=1.5, markersize=3.5,
                   zorder=2, label=plain_label(f"{name}, best T = {best}"))  # fmt: skip
        right.plot([best], [curve[best]], color=colours[name], marker="*", markersize=14, markeredgecolor="white",
                   zorder=5)  # fmt: skip
    right.axhline(floor, color=_REAL, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1, label=f"real images: {floor:.2f}")
    steps = sorted({step for curve in curves.values() for step in curve})
    right.set_xticks(steps, [str(step) for step in steps])
    for axis in (right.xaxis, right.yaxis):
        axis.set_minor_locator(NullLocator())
    right.set_xlabel("decoding steps T")
    right.set_ylabel(f"{plain_label(f'FID ({network})')} of {num_images} images (lower is better)")
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    right.set_title(f"{plain_label(dataset)}: one model per schedule", fontsize=11, loc="left")
    return figure_to_png(page)


def draw_schedules(schedules: Mapping[str, MaskSchedule], *, num_tokens: int) -> bytes:
    """Draws the mask ratio of each schedule for N tokens over the progress, as a PNG. The names are the legend."""
    page = Figure(figsize=(6.4, 4.4), layout="constrained")
    _plot_ratios(page.subplots(), schedules, num_tokens)
    page.legend(loc="outside right center", frameon=False)
    return figure_to_png(page)


def count_known_tokens(schedule: MaskSchedule, *, num_tokens: int, num_steps: int) -> list[int]:
    """Counts the tokens of an image that are known after each of T decoding steps, T in [1, N].

    Raises:
        ValueError: if ``num_steps`` is out of range.
    """
    # The counts come from the decoder itself, so that the table shows what decoding does.
    decoder = ParallelDecoder(schedule, token_selectors.build("confidence"), num_steps=num_steps)
    return [num_tokens - step.after[0] for step in decoder.plan([num_tokens], num_tokens)]


def _plot_ratios(axes: Axes, schedules: Mapping[str, MaskSchedule], num_tokens: int) -> None:
    progress = torch.linspace(0, 1, _POINTS)
    ratios = {name: schedule(progress, num_tokens).clamp(0, 1) for name, schedule in schedules.items()}
    colours = _choose_colours(ratios)
    # The order of the legend is that of the curves from top to bottom.
    for number, name in enumerate(sorted(ratios, key=lambda name: -float(ratios[name].mean()))):
        style = ("solid", "dashed", "dashdot")[number // 10 % 3]  # colours repeat, styles tell the lines apart
        axes.plot(progress.numpy(), ratios[name].numpy(), color=colours[name], label=plain_label(name), linestyle=style,
                  linewidth=1.8)  # fmt: skip
    axes.set(xlabel="progress r = t / T", ylabel="mask ratio gamma(r)", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"mask schedules, N = {num_tokens} tokens", fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _choose_colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour per schedule; schedules that the paper does not have share a few colours."""
    names = list(names)
    others = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: _COLOURS.get(name) or next(others) for name in names}
