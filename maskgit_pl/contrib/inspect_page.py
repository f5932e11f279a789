"""``inspect_run``: reads the logs and the tokenizer of a run, and writes the page of ``maskgit inspect``.

1. Find the stages, and the tokenizer: exported, or exported now from the newest checkpoint.
2. Read the event files of both stages and the reports of training.
3. Encode and decode validation images with the tokenizer.
4. Judge both by the rules of the alarms, and write one HTML file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import check_integer
from maskgit_pl.contrib.inspect_charts import bar_chart, embed_png, format_html, line_chart, make_section, quote
from maskgit_pl.contrib.inspect_findings import (
    CodeUse,
    Logs,
    find_in_tokenizer,
    find_in_transformer,
    measure_codes,
    picture_codes,
    read_logs,
    read_reports,
)
from maskgit_pl.data.images import decode_image
from maskgit_pl.distributed import find_device, parse_dtype
from maskgit_pl.errors import printable
from maskgit_pl.evaluation.opening import open_images, read_run_recipe
from maskgit_pl.evaluation.pages import image_to_png
from maskgit_pl.files import write_text
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.grids import image_grid, reconstruction_grid, to_pil
from maskgit_pl.pipeline.pretrained import load_tokenizer
from maskgit_pl.runs.fitting import export
from maskgit_pl.runs.layers import value_at
from maskgit_pl.training.health import Problem

__all__ = ["inspect_run"]

_MAX_CHARTS = 60
_SHOWN_PICTURES = 6  # of a name, evenly spaced over the steps
_SHOWN_CLASSES = 30
_MAX_CODES = 512
_COLUMNS = 16
_TILE = 20  # pixels
_MAX_BYTES = 8_000_000  # of a picture in an event file


def inspect_run(
    run: Path,
    *,
    data: Path | None = None,
    out: Path | None = None,
    num_images: int = 2000,
    device: str = "cpu",
    dtype: str | None = None,
) -> Path:
    """Writes one self-contained HTML page about a run, which may still be training.

    Args:
        run: Run folder, or a pretrained folder (then with ``data``).
        data: Data folder with validation images. Default: that of the run.
        out: File to write. Default: ``RUN/inspect.html``.
        num_images: Largest number of validation images that are measured, >= 1.
        device: Device of the tokenizer.
        dtype: Arithmetic of the tokenizer, as ``distributed.parse_dtype`` reads it; None for that of its weights.

    Returns:
        The written file.

    Raises:
        FileNotFoundError: if the folder holds no stage, or the data do not exist.
        ValueError: if a recipe or a pretrained folder is invalid, a number is out of range, or there is no such device.
    """
    check_integer("num_images", num_images, "[1, inf)")
    device = find_device(device)
    if not run.is_dir():
        raise FileNotFoundError(f"run {run}: no such folder; name a run folder, such as runs/NAME")
    recipes = {stage: read_run_recipe(run / stage / "config.yaml") for stage in ("tokenizer", "transformer")}
    logs = {stage: read_logs(run / stage) for stage in recipes}
    with tempfile.TemporaryDirectory() as temporary:  # 1.
        tokenizer, notes = _find_tokenizer(run, Path(temporary), data)
        if tokenizer is None and not any(each.scalars for each in logs.values()):
            raise FileNotFoundError(
                f"run {run} has neither logs nor a tokenizer; name a run folder (runs/NAME) or a pretrained folder"
            )
        measured, codes = None, ""
        if tokenizer is not None:
            path = _find_data(recipes, data, notes)
            if path is not None:
                measured, codes = _inspect_codes(tokenizer, path, num_images, device, parse_dtype(dtype, device))
    stage_1 = _Stage(run / "tokenizer", logs["tokenizer"], recipes["tokenizer"])
    stage_2 = _Stage(run / "transformer", logs["transformer"], recipes["transformer"])
    problems = find_in_tokenizer(stage_1.logs, stage_1.recipe, measured)
    problems += find_in_transformer(stage_2.logs)
    sections = [
        _problems_section(problems, stage_1.folder),
        make_section("Stage 1: the tokenizer", stage_1.charts(), notes=[*notes, *stage_1.logs.notes]),
    ]
    sections.append(codes)
    sections.append(make_section("Stage 2: the transformer", stage_2.charts(), notes=stage_2.logs.notes))
    for stage in (stage_1, stage_2):
        sections.append(make_section(f"Pictures during training: {stage.folder.name}", stage.pictures()))
    out = run / "inspect.html" if out is None else out
    write_text(out, format_html(f"maskgit inspect: {printable(run.resolve().name)}", sections))
    return out


def _problems_section(problems: Sequence[Problem], folder: Path) -> str:
    parts = []
    for problem in problems:
        advice = "; or ".join(problem.advice)
        parts.append(f'<p class="problem"><b>{quote(problem.text)}.</b> Try: {quote(advice)}.</p>')
    if not parts:
        parts.append('<p class="healthy">Nothing is outside of its healthy range.</p>')
    for text in read_reports(folder):
        parts.append(f'<p class="problem">{quote(text)}</p>')
    return f"<section><h2>What looks wrong, and what to try</h2>{''.join(parts)}</section>\n"


@dataclass(frozen=True)
class _Stage:
    """The folder, the logs and the recipe of a stage."""

    folder: Path
    logs: Logs
    recipe: Mapping[str, Any]

    def charts(self) -> list[str]:
        """Draws each metric: training and validation in one chart, and ranges such as mask ratios in one chart.

        Metrics that are always 0, such as the number of unreadable images, are listed in a sentence.
        """
        always_zero: list[str] = []
        grouped: dict[str, dict[str, dict[int, float]]] = {}
        for name, values in sorted(self.logs.scalars.items()):
            if not any(values.values()):
                always_zero.append(name)
                continue
            split, _, rest = name.partition("/")
            metric, _, part = rest.partition("/")
            title = f"{metric} by part" if part else metric or split
            grouped.setdefault(title, {})[part or split] = values
        charts = [line_chart(title, lines) for title, lines in grouped.items()][:_MAX_CHARTS]
        sentence = f"<p>Always 0: {quote(', '.join(always_zero[:_MAX_CHARTS]))}.</p>"
        return [*charts, sentence] if always_zero else charts

    def pictures(self) -> list[str]:
        """Shows the pictures of the event files, evenly spaced over the steps."""
        shown = []
        for name, pictures in sorted(self.logs.pictures.items())[:4]:
            steps = sorted(pictures)
            count = min(len(steps), _SHOWN_PICTURES)
            chosen = sorted({steps[number * (len(steps) - 1) // max(1, count - 1)] for number in range(count)})
            for step in chosen:
                png = _safe_png(pictures[step])
                title = f"{printable(name)} at step {step}"
                if png is not None:
                    shown.append(embed_png(title, png, description=f"{title}, a grid of images"))
        return shown


def _codes_section(tokenizer: PretrainedTokenizer, measured: CodeUse, class_names: tuple[str, ...]) -> str:
    names = {label: class_names[label] if label < len(class_names) else str(label) for label in measured.psnr_of_class}
    by_psnr = sorted(measured.psnr_of_class.items(), key=lambda pair: pair[1])[:_SHOWN_CLASSES]
    bars = [(names[label], value) for label, value in by_psnr if value < 1000]
    size = len(measured.counts)
    note = (
        f"{measured.num_images} validation images: {(measured.counts > 0).sum()} of {size} codes occur "
        f"({measured.usage:.1%}), perplexity {measured.perplexity:.1f}."
    )
    parts = [
        _draw_histogram(measured.counts),
        _draw_atlas(tokenizer, measured.counts),
        bar_chart("PSNR by class, the lowest first", bars, unit="dB"),
        _draw_worst(measured.worst, measured.worst_reconstructions),
    ]
    return make_section("The codes on validation images", parts, notes=[note])


def _find_tokenizer(run: Path, temporary: Path, data: Path | None) -> tuple[Path | None, list[str]]:
    """Returns the pretrained tokenizer folder of a run, and notes about where it comes from."""
    for folder in (run / "pretrained" / "tokenizer", run / "tokenizer", run):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder, []
    if not (run / "tokenizer" / "checkpoints").is_dir():
        return None, []
    try:
        export(run, stage="tokenizer", data=data, out=temporary / "pretrained")
    except FileNotFoundError as error:
        return None, [f"The codes are not shown: {printable(error)}"]
    return temporary / "pretrained" / "tokenizer", ["The codes are those of the newest checkpoint."]


def _find_data(recipes: Mapping[str, Mapping[str, Any]], data: Path | None, notes: list[str]) -> Path | None:
    """Returns the data folder; None and a note if the run names none."""
    known = (value_at(recipe, "data.path") for recipe in recipes.values())
    path = data or next((Path(each) for each in known if isinstance(each, str)), None)
    if path is None:
        notes.append("The codes are not shown: the folder names no data; choose them with --data.")
    return path


def _inspect_codes(
    folder: Path, data: Path, num_images: int, device: str, dtype: torch.dtype | None
) -> tuple[CodeUse, str]:
    """Returns the measurements of a tokenizer, and their section."""
    tokenizer = load_tokenizer(folder)
    tokenizer.network.to(device, dtype=dtype)
    images = open_images(data, tokenizer.image_size, tokenizer.network.config.in_channels)
    measured = measure_codes(tokenizer, images.val_dataloader(), max_images=num_images)
    return measured, _codes_section(tokenizer, measured, images.class_names)


def _draw_histogram(counts: Tensor) -> str:
    """Draws the frequencies of codes, sorted, beside uniform use.

    Args:
        counts: (K,) int64: number of tokens of each code.
    """
    shares = (counts.double() / counts.sum().clamp(min=1) * len(counts)).sort(descending=True).values
    frequencies = {rank + 1: value for rank, value in enumerate(shares.tolist()) if value > 0}
    uniform = {1: 1.0, len(counts): 1.0}
    lines = {"frequency / uniform": frequencies, "uniform": uniform}
    return line_chart("Frequency of each code, sorted", lines, x_label="rank of the code")


def _draw_atlas(tokenizer: PretrainedTokenizer, counts: Tensor) -> str:
    """Draws one small picture per code, sorted by use, at most 512.

    Args:
        tokenizer: The tokenizer.
        counts: (K,) int64: number of tokens of each code.
    """
    order = counts.argsort(descending=True, stable=True)[:_MAX_CODES]
    tiles = picture_codes(tokenizer, order)
    columns = min(_COLUMNS, len(tiles))
    picture = image_grid(tiles, columns=columns, scale=max(1, _TILE // tiles.shape[-1]))
    used = int((counts > 0).sum())
    title = f"Atlas of {len(order)} of {len(counts)} codes, the most used first (the first {used} occur)"
    description = f"{len(order)} small pictures, each of a token map that is filled with one code"
    return embed_png(title, image_to_png(picture), description=description)


def _draw_worst(images: Tensor, reconstructions: Tensor) -> str:
    """Draws images (n, C, H, W) uint8 above their reconstructions."""
    picture = reconstruction_grid(images, reconstructions)
    title = f"The {len(images)} worst reconstructions: originals above"
    return embed_png(title, image_to_png(picture), description=f"{len(images)} images above their reconstructions")


def _safe_png(data: bytes) -> bytes | None:
    """Decodes a picture from a file and encodes it again; None if it is damaged or too large."""
    if len(data) > _MAX_BYTES:
        return None
    try:
        pixels: Tensor = decode_image(data, channels=3, name="picture")
    except ValueError:
        return None
    return image_to_png(to_pil(pixels.to(torch.uint8)))
