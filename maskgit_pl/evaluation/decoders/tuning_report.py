"""What a search for a decoding says: a page, and the figure of quality against T for every mask schedule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgit_pl.evaluation.decoders.comparison import plain
from maskgit_pl.evaluation.decoders.tuning import Curves, Found, Trial, better, describe_decoding
from maskgit_pl.evaluation.drawing import LineEnd, name_lines, save_figure
from maskgit_pl.evaluation.metrics import Distances
from maskgit_pl.evaluation.protocol import METRICS

__all__ = ["Figure8", "as_markdown", "draw_curves"]

_SHOWN_TRIALS = 10
_MARKED, _TRAINED, _REAL = "#d1460f", "#14427a", "#3a7d44"
_OTHERS = ("#c58b3a", "#6d9a5c", "#a0709f", "#5aa0a3", "#b3605b", "#8a8a8a", "#9a8c4f", "#7f86c4")
_HEADINGS = {
    "class_agreement": "class agreement",
    "fid/classifier": "fid/classifier",
    "kid/classifier": "kid/classifier",
    "diversity": "diversity",
}


@dataclass(frozen=True)
class Figure8:
    """Quality against T for every mask schedule.

    Args:
        curves: By the schedule's name and T.
        trained: Name of the schedule of the training.
        decoding: In words: what all of them share.
        num_images: Images of a point.
    """

    curves: Curves
    trained: str
    decoding: str
    num_images: int

    def best(self, key: str) -> tuple[str, int, float]:
        """Schedule, T and value of the best point."""
        points = [(name, steps, numbers[key]) for name, line in self.curves.items() for steps, numbers in line.items()]
        found = points[0]
        for point in points[1:]:
            found = point if better(key, point[2], found[2]) else found
        return found


def direction(key: str) -> str:
    """``higher is better`` or ``lower is better``."""
    return "higher is better" if METRICS[key] else "lower is better"


def as_markdown(
    found: Found, *, key: str, command: str, floor: Distances, accuracy: float, num_images: int, figure: Figure8 | None
) -> str:
    """The search as a page.

    Args:
        found: What it found.
        key: The metric.
        command: What makes it again.
        floor: Distance of as many real images as ``found`` was confirmed with.
        accuracy: Of the classifier on real images.
        num_images: Images of a trial.
        figure: Where it was drawn.
    """
    lines = ["# A way to decode", "", f"    {command}", "", *_how(found, key, floor, accuracy, num_images), ""]
    lines += ["## Measured again", "", *_trial_lines(found.confirmed, found.winner, key), "", _verdict(found, key), ""]
    if found.winner.number:
        lines += ["```json", json.dumps(plain(found.winner.decoding), indent=2), "```", ""]
    best = sorted(found.trials, key=lambda trial: -trial.numbers[key] if METRICS[key] else trial.numbers[key])
    lines += [f"## The best of {len(found.trials)} trials, {num_images} images each", ""]
    lines += _trial_lines(best[:_SHOWN_TRIALS], None, key)
    if figure is not None:
        lines += ["", *_figure_lines(figure, key)]
    return "\n".join(lines) + "\n"


def _how(found: Found, key: str, floor: Distances, accuracy: float, num_images: int) -> list[str]:
    return [
        f"{len(found.trials)} trials of {num_images} images against {key} ({direction(key)}), all with the same noise;",
        f"trial 0 is the model's decoding as it was. Then the best {len(found.confirmed) - 1} and trial 0 were",
        f"measured again with fresh noise and {found.num_images} images; the best of these is the result.",
        "Distances are from the real val images in the features of the data set's own classifier, not of Inception,",
        f"which is right on {accuracy:.1%} of them; {floor.images} real training images in place of generated ones",
        f"have fid/classifier {floor.fid:.2f} and kid/classifier {floor.kid:.4f}.",
    ]


def _verdict(found: Found, key: str) -> str:
    before, after = found.before.numbers[key], found.winner.numbers[key]
    if found.winner.number == 0:
        return f"The model's decoding as it was is the best of them, {key} {before:.4g}: nothing is changed."
    return f"Trial {found.winner.number} wins: {key} {before:.4g} before, {after:.4g} now. It is the recipe below."


def _trial_lines(trials: Sequence[Trial], winner: Trial | None, key: str) -> list[str]:
    columns = [key, *(name for name in _HEADINGS if name != key)]
    lines = ["| trial | decoding | " + " | ".join(_HEADINGS[name] for name in columns) + " | ms an image |"]
    lines.append("|---:|---|" + "---:|" * (len(columns) + 1))
    for trial in trials:
        cells = [_number(name, trial.numbers[name]) for name in columns]
        cells.append(f"{1000 * trial.numbers['seconds_per_image']:.1f}")
        row = [str(trial.number), describe_decoding(trial.decoding), *cells]
        if winner is not None and trial.number == winner.number:
            row = [f"**{cell}**" for cell in row]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _number(key: str, value: float) -> str:
    return {"class_agreement": f"{value:.1%}", "diversity": f"{value:.2f}", "fid/classifier": f"{value:.3f}"}.get(
        key, f"{value:.4f}"
    )


def _figure_lines(figure: Figure8, key: str) -> list[str]:
    steps = sorted({number for line in figure.curves.values() for number in line})
    name, at, value = figure.best(key)
    lines = [
        "## Mask schedules",
        "",
        f"![{key} against the number of steps for each mask schedule](tuning.png)",
        "",
        f"{key} ({direction(key)}) of {figure.num_images} images a point, the same noise for all: one model, trained",
        f"with `{figure.trained}`, decoded by each schedule with: {figure.decoding}.",
        f"Best: {name} at T = {at}, {_number(key, value)}.",
        "",
        "| mask schedule | " + " | ".join(f"T = {number}" for number in steps) + " |",
        "|---|" + "---:|" * len(steps),
    ]
    for schedule, line in figure.curves.items():
        label = f"{schedule} (trained)" if schedule == figure.trained else schedule
        cells = [
            f"**{_number(key, line[number][key])}**"
            if (schedule, number) == (name, at)
            else _number(key, line[number][key])
            for number in steps
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def draw_curves(figure: Figure8, path: Path, *, key: str, floor: float | None) -> None:
    """Draws the figure: a line a schedule, its name at the end, the schedule of the training in front.

    Args:
        figure: What was measured.
        path: A PNG.
        key: The metric.
        floor: The value of real images; None for none.

    Source: paper, Figure 8, right.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = page.subplots()
    axes.set_xscale("log", base=2)
    values = [numbers[key] for line in figure.curves.values() for numbers in line.values()]
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
    for name, line in figure.curves.items():
        own = name == figure.trained
        axes.plot(
            list(line), [numbers[key] for numbers in line.values()],
            color=_colour(figure, name), linewidth=3 if own else 1.4, zorder=3 if own else 2,
            marker="o", markersize=5.5 if own else 3,
        )  # fmt: skip
    if floor is not None:
        axes.axhline(floor, color=_REAL, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        axes.text(0.01, floor, f"real images: {_number(key, floor)}", transform=axes.get_yaxis_transform(),
                  color=_REAL, fontsize=9, va="bottom")  # fmt: skip
    _finish(axes, figure, key)
    name_lines(page, axes, {name: _end(figure, name, key) for name in figure.curves})
    save_figure(page, path)


def _end(figure: Figure8, name: str, key: str) -> LineEnd:
    steps, numbers = list(figure.curves[name].items())[-1]
    own = name == figure.trained
    label = f"{name} (trained)" if own else name
    return LineEnd(label, (steps, numbers[key]), _colour(figure, name), bold=own)


def _colour(figure: Figure8, name: str) -> str:
    others = [other for other in figure.curves if other != figure.trained]
    return _TRAINED if name == figure.trained else _OTHERS[others.index(name) % len(_OTHERS)]


def _finish(axes: Any, figure: Figure8, key: str) -> None:
    steps = sorted({number for line in figure.curves.values() for number in line})
    name, at, value = figure.best(key)
    axes.plot([at], [value], marker="*", markersize=17, color=_MARKED, markeredgecolor="white", zorder=5)
    axes.annotate(
        f"best: {name}, T = {at}\n{_number(key, value)}", (at, value), (0, 14 if METRICS[key] else -14),
        textcoords="offset points", color=_MARKED, fontsize=9.5, ha="center",
        va="bottom" if METRICS[key] else "top", zorder=5,
    )  # fmt: skip
    axes.set_xticks(steps, [str(number) for number in steps])
    axes.minorticks_off()
    axes.set_xlabel("decoding steps T")
    axes.set_ylabel(f"{key} of {figure.num_images} images ({direction(key)})")
    axes.set_title(f"one model, trained with {figure.trained}, decoded by every mask schedule", fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.14)
