"""Figure 2 of the paper: the decoding of models step by step.

Source: Chang et al., MaskGIT, CVPR 2022, arXiv:2202.04200, Figure 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from PIL import Image

from maskgit_pl import MaskGIT
from maskgit_pl.cli import run_script
from maskgit_pl.cli.flags import ReportFlags, Runs, write_page
from maskgit_pl.devices import find_device
from maskgit_pl.evaluation.pages import Page, code_cell, heading, image_to_png, markdown, markdown_table, paragraph


def figure_2(runs: Runs = (), *, class_name: str | None = None, report: ReportFlags = ReportFlags()) -> None:
    """Draws Figure 2: the decoding of each run step by step, such as that of an autoregressive one and of MaskGIT.

    The page is RESULTS/figure-2.md with .csv and .png.

    Example: python -m paper.figure_2 runs/fashion-mnist-adaln-autoregressive runs/fashion-mnist-adaln --class-name Bag

    Args:
        runs: Run folders (runs/NAME) or pretrained folders, in the order of the figure.
        class_name: Name or index of the class of the image (default: the first class).

    Raises:
        FileNotFoundError: if a run does not exist.
        ValueError: if there is no run, or the class is unknown.
    """
    if not runs:
        raise ValueError("runs must have at least one run, such as runs/fashion-mnist-adaln, got none")
    recordings, rows = [], []
    for run in runs:
        pipe = MaskGIT.from_pretrained(run).to(find_device(report.device))
        label = 0 if class_name is None else pipe.classes.parse(class_name)
        recording = pipe.record([label], seed=report.seed)
        model = "autoregressive" if pipe.decoding.is_autoregressive else "MaskGIT"
        recordings.append((model, recording))
        rows += [
            {"run": run.name, "model": model, "class": recording.captions[0], "seed": report.seed,
             "step": number, "known": step.tokens.shape[1] - int(step.still_masked.sum())}
            for number, step in enumerate(recording.steps, start=1)
        ]  # fmt: skip
    lines = [
        *heading("Figure 2: decoding step by step"),
        "![tokens and image of each step](figure-2.png)",
        "",
        *paragraph(
            "For each model, the rows show the masked tokens before a step in grey, the confidence of the codes, the",
            "tokens of the step in an orange frame, and the image that the tokenizer decodes from all tokens. MaskGIT",
            "predicts the masked ones, too; those of an autoregressive model are code 0.",
            f"Class {markdown(rows[0]['class'])}, seed {report.seed}.",
        ),
        "",
        *markdown_table(
            ["model", "run", "steps T"],
            [
                [model, code_cell(run.name), str(len(recording.steps))]
                for run, (model, recording) in zip(runs, recordings, strict=True)
            ],
            left=2,
        ),
    ]
    picture = image_to_png(_stack([each.filmstrip(f"{name}, {len(each.steps)} steps") for name, each in recordings]))
    write_page(Page("figure-2", lines, rows, {"figure-2.png": picture}, report.results))


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Returns pictures below each other."""
    sheet = Image.new("RGB", (max(image.width for image in pictures), sum(image.height for image in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


if __name__ == "__main__":
    sys.exit(run_script(figure_2, prog="python -m paper.figure_2"))
