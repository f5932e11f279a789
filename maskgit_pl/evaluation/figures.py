"""Figures 2 and 8 of the paper, and the curves of mask schedules.

Figure 2 shows the decoding of models step by step. The panels of Figure 8 are the mask ratio of each schedule, and the
FID of its model over the number of steps T. ``timing`` has Figure 4. Loads no Lightning to draw schedules.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Figures 2 and 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from maskgit_pl import pipeline
from maskgit_pl.decoding import ParallelDecoder
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.distributed import find_device
from maskgit_pl.errors import markdown, plain_label
from maskgit_pl.evaluation.options import ReportOptions
from maskgit_pl.evaluation.pages import (
    LineEnd,
    Page,
    code_cell,
    command_line,
    figure_to_png,
    heading,
    image_to_png,
    markdown_table,
    name_lines,
    paragraph,
    plot_by_steps,
    plot_floor,
)
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.schedules import MaskSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

    from maskgit_pl.pipeline.display import Recording

__all__ = ["count_known_tokens", "draw_figure_8", "draw_schedules", "figure_2"]

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
_COLUMNS = 8  # steps of each model in Figure 2, as in the paper


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
    if not runs:
        raise ValueError(
            "figure 2 must have at least one run, such as runs/fashion-mnist-autoregressive runs/fashion-mnist-adaln, "
            "got none"
        )
    bar, recordings, rows = bars("figure 2: models", len(runs)), [], []
    for run in runs:
        pipe = pipeline.MaskGIT.from_pretrained(run).to(find_device(options.device))
        label = 0 if class_name is None else pipe.outline.parse_class(class_name)
        recording = pipe.record([label], seed=options.seed)
        model = "autoregressive" if pipe.transformer.mask_schedule is None else "MaskGIT"
        recordings.append((model, recording))
        rows += [
            {"run": Path(run).name, "model": model, "class": recording.captions[0], "seed": options.seed,
             "step": number, "known": step.tokens.shape[1] - int(step.still_masked.sum())}
            for number, step in enumerate(recording.steps, start=1)
        ]  # fmt: skip
        bar(1)
    flags = {"class_name": class_name, "seed": options.seed or None, "device": options.device}
    lines = [
        *heading("Figure 2: decoding step by step", command_line(["maskgit figure 2", *runs], flags)),
        "![tokens and image of each step](figure-2.png)",
        "",
        *paragraph(
            "For each model, the upper row shows the tokens after a step: masked ones are grey, and those of this step",
            "have an orange frame. The lower row shows the image that the tokenizer decodes from all tokens of the",
            "step. MaskGIT predicts the masked ones, too; those of an autoregressive model are code 0.",
            f"Class {markdown(rows[0]['class'])}, seed {options.seed}.",
        ),
        "",
        *markdown_table(
            ["model", "run", "steps T", "tokens known after the steps shown"],
            [
                [model, code_cell(Path(run).name), str(len(recording.steps)), ", ".join(_known_tokens(recording))]
                for run, (model, recording) in zip(runs, recordings, strict=True)
            ],
            left=2,
        ),
    ]
    picture = image_to_png(draw_figure_2(recordings))
    return Page("figure-2", "\n".join([*lines, ""]), rows, {"figure-2.png": picture}, options.results)


def draw_figure_2(recordings: Sequence[tuple[str, Recording]]) -> Image.Image:
    """Draws two rows for each model: the tokens after a step, and the image of all tokens of the step.

    Args:
        recordings: Name of each model, and its decoding of one image.

    Source: paper, Figure 2.
    """
    from PIL import Image

    from maskgit_pl.pipeline import decoding_figures, grids  # which import Pillow, too

    parts = []
    for model, recording in recordings:
        shown = _choose_steps(len(recording.steps))
        images = [recording.images_at(number)[0] for number in shown]
        tokens = [
            decoding_figures.token_panel(recording.steps[number], 0, image, recording.token_pixels)
            for number, image in zip(shown, images, strict=True)
        ]
        scale = grids.panel_scale(images[0], grids.PANEL_SIZE)
        page = grids.lay_out(
            [*tokens, *(grids.enlarge(image, scale) for image in images)],
            rows=2,
            columns=len(shown),
            row_captions=["tokens", "image"],
            column_captions=[f"step {number + 1}" for number in shown],
        )
        parts.append(grids.add_title(page, f"{model}, {len(recording.steps)} steps"))
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), grids.PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    legend = [
        (grids.swatch(fill=grids.MASKED), "masked tokens"),
        (grids.swatch(frame=grids.NEW), "tokens of this step"),
    ]
    return grids.add_legend(sheet, legend)


def _choose_steps(count: int) -> list[int]:
    """Returns at most 8 steps of range(count), evenly spread with the first and the last."""
    shown = min(count, _COLUMNS)
    return [round(place * (count - 1) / max(1, shown - 1)) for place in range(shown)]


def _known_tokens(recording: Recording) -> list[str]:
    steps = [recording.steps[number] for number in _choose_steps(len(recording.steps))]
    return [str(int(step.still_masked.logical_not().sum())) for step in steps]


def draw_figure_8(
    schedules: Mapping[str, MaskSchedule],
    curves: Mapping[str, Mapping[int, float]],
    *,
    num_tokens: int,
    metric: str,
    num_images: int,
    floor: float | None,
    dataset: str,
) -> bytes:
    """Draws the mask schedules on the left, and the FID of the model of each over T on the right.

    Args:
        schedules: Schedules by name.
        curves: FID by name and T; the lowest one of each schedule has a star.
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
    _plot_ratios(left, schedules, num_tokens)
    left.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=2)
    colours = _choose_colours(schedules)
    best = {name: min(curve, key=lambda steps: curve[steps]) for name, curve in curves.items()}
    _plot_quality(right, curves, best, colours)
    if floor is not None:
        plot_floor(right, floor, f"real images: {floor:.2f}")
    right.set_ylabel(f"{metric} of {num_images} images (lower is better)")
    right.set_title(f"{plain_label(dataset)}: one model per schedule, star at the best T", fontsize=11, loc="left")
    ends = {
        name: LineEnd(f"{name}, best T = {best[name]}", (max(curve), curve[max(curve)]), colours[name])
        for name, curve in curves.items()
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


def _plot_quality(
    axes: Axes, curves: Mapping[str, Mapping[int, float]], best: Mapping[str, int], colours: Mapping[str, str]
) -> None:
    plot_by_steps(axes, curves, colours)
    values = [value for curve in curves.values() for value in curve.values()]
    # The default ticks of a logarithmic axis are powers of ten, which are too few here.
    if axes.get_yscale() == "log":
        ticks = [tick for tick in _TICKS if min(values) / 1.3 <= tick <= max(values) * 1.3]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    for name, steps in best.items():
        axes.plot([steps], [curves[name][steps]], color=colours[name], marker="*", markersize=14,
                  markeredgecolor="white", zorder=5)  # fmt: skip


def _choose_colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour per schedule; schedules that the paper does not have share a few colours."""
    names = list(names)
    others = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: _COLOURS.get(name) or next(others) for name in names}
