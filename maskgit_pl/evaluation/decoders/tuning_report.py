"""What a search for a decoding says, as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence

from maskgit_pl.evaluation.decoders.schedule_curves import Figure8
from maskgit_pl.evaluation.decoders.tuning import Found, Trial, direction, ranked, shown
from maskgit_pl.evaluation.decodings import describe_decoding, plain
from maskgit_pl.evaluation.metrics import Distances
from maskgit_pl.text import code_span, markdown, printable

__all__ = ["as_markdown"]

_SHOWN_TRIALS = 10
_HEADINGS = {
    "class_agreement": "class agreement",
    "fid/classifier": "fid/classifier",
    "kid/classifier": "kid/classifier",
    "diversity": "diversity",
}


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
    lines = [
        "# A way to decode",
        "",
        f"    {printable(command, limit=None)}",
        "",
        *_how(found, key, floor, accuracy, num_images),
        "",
    ]
    lines += ["## Measured again", "", *_trial_lines(found.confirmed, found.winner, key), "", _verdict(found, key), ""]
    if found.winner.number:
        lines += ["```json", json.dumps(plain(found.winner.decoding), indent=2), "```", ""]
    lines += [f"## The best of {len(found.trials)} trials, {num_images} images each", ""]
    lines += _trial_lines(ranked(found.trials, key)[:_SHOWN_TRIALS], None, key)
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
        cells = [shown(name, trial.numbers[name]) for name in columns]
        cells.append(f"{1000 * trial.numbers['seconds_per_image']:.1f}")
        row = [str(trial.number), markdown(describe_decoding(trial.decoding)), *cells]
        if winner is not None and trial.number == winner.number:
            row = [f"**{cell}**" for cell in row]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _figure_lines(figure: Figure8, key: str) -> list[str]:
    steps = sorted({number for line in figure.curves.values() for number in line})
    name, at, value = figure.best(key)
    lines = [
        "## Mask schedules",
        "",
        f"![{key} against the number of steps for each mask schedule](tuning.png)",
        "",
        f"{key} ({direction(key)}) of {figure.num_images} images a point, the same noise for all: one model, trained",
        f"with {code_span(figure.trained)}, decoded by each schedule with: {markdown(figure.decoding)}.",
        f"Best: {markdown(name)} at T = {at}, {shown(key, value)}.",
        "",
        "| mask schedule | " + " | ".join(f"T = {number}" for number in steps) + " |",
        "|---|" + "---:|" * len(steps),
    ]
    for schedule, line in figure.curves.items():
        label = f"{markdown(schedule)} (trained)" if schedule == figure.trained else markdown(schedule)
        cells = [
            f"**{shown(key, line[number][key])}**"
            if (schedule, number) == (name, at)
            else shown(key, line[number][key])
            for number in steps
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines
