"""``inspect_run``: reads the logs and the tokenizer of a run, and writes the page of ``maskgit inspect``.

1. Find the stages, and the tokenizer: exported, or exported now from the newest checkpoint.
2. Read the event files of both stages and the reports of training.
3. Encode and decode validation images with the tokenizer.
4. Judge both by the rules of the alarms, and write one HTML file.

Charts are inline SVG with a description. The page has no scripts and no network, is for light and dark
screens, and all text in it is escaped.
"""

from __future__ import annotations

import base64
import html
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import check_integer
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
from maskgit_pl.evaluation.classifier import open_images
from maskgit_pl.evaluation.opening import read_run_recipe
from maskgit_pl.evaluation.pages import image_to_png
from maskgit_pl.files import write_text
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.grids import image_grid, reconstruction_grid, to_pil
from maskgit_pl.pipeline.pretrained import load_tokenizer
from maskgit_pl.runs.fitting import export
from maskgit_pl.runs.layers import value_at
from maskgit_pl.training.health import Problem

__all__ = ["bar_chart", "inspect_run", "line_chart"]

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 12px; max-width: 1180px }
body { overflow-wrap: anywhere }
h1 { font-size: 1.35em } h2 { font-size: 1.15em; border-bottom: 1px solid #8886; padding-bottom: 4px }
section > div { display: flex; flex-wrap: wrap; gap: 14px }
figure { margin: 0; max-width: 100% } figure.chart { width: 360px }
figcaption { font-weight: 600; margin: 4px 0 } img { max-width: 100%; height: auto; image-rendering: pixelated }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: currentColor } .grid { stroke: #8885 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 13px }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 4px }
.problem { border-left: 4px solid #d97706; padding: 2px 10px; margin: 8px 0 }
.healthy { border-left: 4px solid #2e9e6b; padding: 2px 10px; margin: 8px 0 }
"""
# The browser loads nothing and runs nothing, even if a text were not escaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 8, 10, 24
_MAX_POINTS = 400  # of a line: more than the chart has pixels
_COLOURS = ("#3b82c4", "#d97706", "#2e9e6b", "#b0569d", "#8a8a2e", "#c2504d")  # readable on white and on black
_LOG_FROM = 50  # ratio of the largest to the smallest value of a logarithmic axis
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
        """Draws each metric: training and validation in one chart, and ranges such as mask ratios in one chart."""
        grouped: dict[str, dict[str, dict[int, float]]] = {}
        for name, values in sorted(self.logs.scalars.items()):
            split, _, rest = name.partition("/")
            metric, _, part = rest.partition("/")
            title = f"{metric} by part" if part else metric or split
            grouped.setdefault(title, {})[part or split] = values
        with_values_first = sorted(
            grouped, key=lambda title: not any(map(any, map(dict.values, grouped[title].values())))
        )
        return [line_chart(title, grouped[title]) for title in with_values_first[:_MAX_CHARTS]]

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


# HTML and charts


def quote(text: object) -> str:
    """Returns text as HTML that shows it on one line, without markup."""
    return html.escape(printable(text))


def line_chart(title: str, lines: Mapping[str, Mapping[int, float]], *, x_label: str = "step") -> str:
    """Draws values over steps. The vertical axis is logarithmic if positive values span more than a factor of 50.

    Args:
        title: Title of the chart.
        lines: Values by line and step. Non-finite values are left out.
        x_label: Name of the horizontal axis.

    Returns:
        A ``figure`` element; an empty string if there is no finite value.
    """
    points = {name: _thin({x: y for x, y in line.items() if math.isfinite(y)}) for name, line in lines.items()}
    points = {name: line for name, line in points.items() if line}
    if not points:
        return ""
    values = [y for line in points.values() for _, y in line]
    steps = [x for line in points.values() for x, _ in line]
    is_log = min(values) > 0 and max(values) > _LOG_FROM * min(values)
    scale_x, scale_y = _Scale(min(steps), max(steps)), _Scale(min(values), max(values), is_log=is_log)
    parts = [_axes(scale_x, scale_y, x_label)]
    legend = []
    for number, (name, line) in enumerate(points.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = " ".join(f"{_x(scale_x.place(x)):.1f},{_y(scale_y.place(y)):.1f}" for x, y in line)
        if len(line) == 1:
            x, y = places.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        shown = f"{quote(name)} <b>{line[-1][1]:.4g}</b>"
        legend.append(f'<span><i style="background:{colour}"></i>{shown}</span>')
    said = "; ".join(f"{printable(name)}: {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in points.items())
    return _figure(title, f"{title} over {x_label}s {min(steps)} to {max(steps)}. {said}", parts, legend)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, unit: str) -> str:
    """Draws horizontal bars with their names and values.

    Args:
        title: Title of the chart.
        bars: Name and value >= 0 of each bar, from top to bottom.
        unit: Unit of the values.

    Returns:
        A ``figure`` element; an empty string without bars.
    """
    if not bars:
        return ""
    largest = max(value for _, value in bars) or 1.0
    height, parts = 18 * len(bars) + 8, []
    for number, (name, value) in enumerate(bars):
        y, width = 4 + 18 * number, 190 * value / largest
        parts.append(
            f'<text x="112" y="{y + 11}" text-anchor="end">{quote(printable(name, limit=18))}</text>'
            f'<rect x="118" y="{y}" width="{width:.1f}" height="14" fill="{_COLOURS[0]}"/>'
            f'<text x="{122 + width:.1f}" y="{y + 11}">{value:.4g}</text>'
        )
    said = "; ".join(f"{printable(name)}: {value:.4g} {unit}" for name, value in bars)
    return _figure(f"{title} ({unit})", f"{title}. {said}", parts, [], height=height)


class _Scale:
    """A linear or logarithmic axis from ``low`` to ``high``."""

    def __init__(self, low: float, high: float, *, is_log: bool = False) -> None:
        self.low, self.high, self.is_log = low, high, is_log

    def place(self, value: float) -> float:
        """Returns the place of a value on the axis, 0 at ``low`` and 1 at ``high``."""
        low, high, value = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        return 0.5 if high == low else (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Returns the values that are written at the axis: both ends and the middle."""
        if self.high == self.low:
            return [self.low]
        middle = math.sqrt(self.low * self.high) if self.is_log else (self.low + self.high) / 2
        return [self.low, middle, self.high]


def _x(place: float) -> float:
    return _LEFT + place * (_WIDTH - _LEFT - _RIGHT)


def _y(place: float) -> float:
    return _HEIGHT - _BOTTOM - place * (_HEIGHT - _TOP - _BOTTOM)


def _axes(scale_x: _Scale, scale_y: _Scale, x_label: str) -> str:
    parts = []
    for value in scale_y.ticks():
        y = _y(scale_y.place(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value, anchor in zip((scale_x.low, scale_x.high), ("start", "end"), strict=True):
        x = _x(0 if anchor == "start" else 1)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{value:.0f}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{quote(x_label)}</text>')
    return "".join(parts)


def _thin(line: Mapping[int, float]) -> list[tuple[int, float]]:
    """Returns the points of a line by step, at most 400 evenly chosen ones with the first and the last."""
    points = sorted(line.items())
    if len(points) <= _MAX_POINTS:
        return points
    return [points[number * (len(points) - 1) // (_MAX_POINTS - 1)] for number in range(_MAX_POINTS)]


def _figure(title: str, description: str, parts: Sequence[str], legend: Sequence[str], *, height: int = _HEIGHT) -> str:
    label = html.escape(printable(description, limit=2000))
    return (
        f'<figure class="chart"><figcaption>{quote(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{label}">{"".join(parts)}</svg><div class="legend">{"".join(legend)}</div></figure>'
    )


def format_html(title: str, sections: Sequence[str]) -> str:
    """Returns a complete HTML document.

    Args:
        title: Title, as plain text.
        sections: Contents, as HTML; see ``make_section``.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{quote(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{quote(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def make_section(title: str, parts: Sequence[str], *, notes: Sequence[str] = ()) -> str:
    """Returns a section; an empty string if it has neither parts nor notes.

    Args:
        title: Title, as plain text.
        parts: Figures and paragraphs, as HTML.
        notes: Sentences below the title, as plain text.
    """
    shown = [part for part in parts if part]
    if not shown and not notes:
        return ""
    text = "".join(f"<p>{quote(note)}</p>" for note in notes)
    return f"<section><h2>{quote(title)}</h2>{text}<div>{''.join(shown)}</div></section>\n"


def embed_png(title: str, png: bytes, *, description: str) -> str:
    """Returns a figure with a PNG file inside of the page.

    Args:
        title: Title above the picture.
        png: The file; it must come from an own encoder, not from the run.
        description: Text for those who do not see the picture.
    """
    data = base64.b64encode(png).decode("ascii")
    return (
        f"<figure><figcaption>{quote(title)}</figcaption>"
        f'<img alt="{quote(description)}" src="data:image/png;base64,{data}"></figure>'
    )
