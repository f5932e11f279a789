"""``inspect_run``: reads the logs and the tokenizer of a run, and writes the page of ``maskgit inspect``.

1. Find the stages, and the tokenizer: exported, or exported now from the newest checkpoint.
2. Read the event files of both stages and the reports of training.
3. Encode and decode validation images with the tokenizer.
4. Judge both by the rules of the alarms, and write one HTML file.

All pictures are PNG files with a description. The page has no scripts and no network, and all text in it is escaped.
"""

from __future__ import annotations

import base64
import html
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import check_integer
from maskgit_pl.devices import find_device, parse_dtype
from maskgit_pl.evaluation.classifier import open_images
from maskgit_pl.evaluation.pages import figure_to_png, image_to_png
from maskgit_pl.evaluation.reconstruction import ReconstructionMeter, psnr
from maskgit_pl.evaluation.reference import iter_real_batches
from maskgit_pl.evaluation.run_folders import read_run_recipe
from maskgit_pl.files import open_regular, write_text
from maskgit_pl.grids import image_grid, reconstruction_grid
from maskgit_pl.pipeline.display import select_steps
from maskgit_pl.pretrained.networks import PretrainedTokenizer, load_tokenizer
from maskgit_pl.runs.exporting import export
from maskgit_pl.runs.recipe import value_at
from maskgit_pl.text import plain_label, printable
from maskgit_pl.training.health import Problem, find_problems, grace_steps

log = logging.getLogger(__name__)

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 12px; max-width: 1180px }
body { overflow-wrap: anywhere }
h1 { font-size: 1.35em } h2 { font-size: 1.15em; border-bottom: 1px solid #8886; padding-bottom: 4px }
section > div { display: flex; flex-wrap: wrap; gap: 14px }
figure { margin: 0; max-width: 100% } figcaption { font-weight: 600; margin: 4px 0 }
img { max-width: 100%; height: auto; image-rendering: pixelated } img.chart { width: 360px; image-rendering: auto }
.problem { border-left: 4px solid #d97706; padding: 2px 10px; margin: 8px 0 }
.healthy { border-left: 4px solid #2e9e6b; padding: 2px 10px; margin: 8px 0 }
"""
# The browser loads nothing and runs nothing, even if a text were not escaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LOG_FROM = 50  # ratio of the largest to the smallest value of a logarithmic axis
_MAX_CHARTS = 60
_MAX_POINTS = 10_000  # of a curve, evenly spaced over the steps
_SHOWN_PICTURES = 6  # of a name, evenly spaced over the steps
_SHOWN_CLASSES = 30
_MAX_CODES = 512
_COLUMNS = 16
_TILE = 20  # pixels
_MAP = 4  # rows and columns of the token map from which a code is drawn
_RISE = 1.05  # of the validation loss above its minimum
_FALL = 0.005  # of the validation loss in the second half of a run
_NORM_RISE = 10.0  # of the gradient norm above its median


def inspect_run(
    run: Path,
    *,
    data: Path | None = None,
    out: Path | None = None,
    num_images: int = 2000,
    device: str = "cpu",
    dtype: str | None = None,
) -> Path:
    """Writes one self-contained HTML page about a run, which may still be training, and logs what looks wrong.

    Args:
        run: Run folder, or a pretrained folder (then with ``data``).
        data: Data folder with validation images. Default: that of the run.
        out: File to write. Default: ``RUN/inspect.html``.
        num_images: Largest number of random validation images that are measured, >= 1.
        device: Device of the tokenizer.
        dtype: Arithmetic of the tokenizer, as ``distributed.parse_dtype`` reads it; None for that of its weights.

    Returns:
        The written file.
    """
    check_integer("num_images", num_images, "[1, inf)")
    device = find_device(device)
    folders = {stage: run / stage for stage in ("tokenizer", "transformer")}
    recipes = {stage: read_run_recipe(folder / "config.yaml") for stage, folder in folders.items()}
    logs = {stage: read_logs(folder) for stage, folder in folders.items()}
    with tempfile.TemporaryDirectory() as temporary:  # 1.
        folder, notes = _find_tokenizer(run, Path(temporary), data)
        if folder is None and not any(each.scalars for each in logs.values()):
            raise FileNotFoundError(
                f"run {run} has neither logs nor a tokenizer; name a run folder (runs/NAME) or a pretrained folder"
            )
        known = (value_at(recipe, "data.path") for recipe in recipes.values())
        data = data or next((Path(path) for path in known if path), None)
        measured, codes = None, ""
        if folder is not None and data is None:
            notes.append("The codes are not shown: the folder names no data; choose them with --data.")
        elif folder is not None and data is not None:
            tokenizer = load_tokenizer(folder)
            tokenizer.network.to(device, dtype=parse_dtype(dtype, device))
            images = open_images(data, tokenizer.image_size, tokenizer.channels)
            measured = ReconstructionMeter(tokenizer)
            for batch in iter_real_batches(images, "val", num_images=num_images):
                measured.add(batch)
            codes = _codes_section(measured, images.class_names)
    problems = find_in_tokenizer(logs["tokenizer"], recipes["tokenizer"], measured)
    problems += find_in_transformer(logs["transformer"])
    verdict = [f"{problem.text}. Try: {'; or '.join(problem.advice)}." for problem in problems]
    verdict = verdict or ["Nothing is outside of its healthy range."]
    log.info("%s", "\n".join(verdict))
    sections = [
        _verdict_section(verdict, "problem" if problems else "healthy"),
        _section("Stage 1: the tokenizer", logs["tokenizer"].charts(), notes=notes),
        codes,
        _section("Stage 2: the transformer", logs["transformer"].charts()),
        *(_section(f"Pictures during training: {stage}", logs[stage].draw_pictures()) for stage in folders),
    ]
    out = run / "inspect.html" if out is None else out
    write_text(out, _format_html(f"maskgit inspect: {printable(run.resolve().name)}", sections))
    return out


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


@dataclass
class Logs:
    """The logged values of a stage.

    Args:
        scalars: Values by name and step.
        pictures: PNG files by name and step.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def last(self, prefix: str) -> dict[str, float]:
        """Returns the last value of each scalar ``prefix/NAME`` by NAME."""
        return {
            name.removeprefix(f"{prefix}/"): values[max(values)]
            for name, values in self.scalars.items()
            if name.startswith(f"{prefix}/")
        }

    @property
    def last_step(self) -> int:
        """The last step with a value; 0 without values."""
        return max(map(max, self.scalars.values()), default=0)

    def charts(self) -> list[str]:
        """Draws each metric: training and validation in one chart, and ranges such as mask ratios in one chart."""
        grouped: dict[str, dict[str, dict[int, float]]] = {}
        for name, values in sorted(self.scalars.items()):
            split, _, rest = name.partition("/")
            metric, _, part = rest.partition("/")
            title = f"{metric} by part" if part else metric or split
            grouped.setdefault(title, {})[part or split] = values
        return [_line_chart(title, lines) for title, lines in list(grouped.items())[:_MAX_CHARTS]]

    def draw_pictures(self) -> list[str]:
        """Shows the pictures of the event files, evenly spaced over the steps."""
        figures = []
        for name, pictures in sorted(self.pictures.items()):
            steps = sorted(pictures)
            for step in (steps[number] for number in select_steps(len(steps), _SHOWN_PICTURES)):
                title = f"{name} at step {step}"
                figures.append(_embed(title, pictures[step], description=f"{title}, a grid of images"))
        return figures


def read_logs(folder: Path) -> Logs:
    """Reads the event files of a stage folder, which need not exist; of a step, the last value counts."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        IMAGES,
        SCALARS,
        EventAccumulator,
    )

    if not folder.is_dir():
        return Logs()
    for file in folder.glob("*tfevents*"):
        os.close(open_regular(file))  # tensorboard would wait for the writer of a FIFO
    try:
        events = EventAccumulator(str(folder), {SCALARS: _MAX_POINTS, IMAGES: 100 * _SHOWN_PICTURES}).Reload()
    except DecodeError as error:
        raise ValueError(f"event files of {folder} must hold events, got: {error}; remove the damaged file") from error
    tags = events.Tags()
    return Logs(
        {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags[SCALARS]},
        {tag: {event.step: event.encoded_image_string for event in events.Images(tag)} for tag in tags[IMAGES]},
    )


# The findings


def picture_codes(tokenizer: PretrainedTokenizer, codes: Tensor) -> Tensor:
    """Decodes a small token map that is filled with a code, for each code, and cuts out its middle.

    Args:
        tokenizer: The tokenizer.
        codes: (n,) int64 in [0, K).

    Returns:
        (n, C, S, S) uint8; S is twice the downsampling factor.
    """
    factor = tokenizer.token_size
    maps = codes.to(next(tokenizer.network.parameters()).device).unsqueeze(1).repeat(1, _MAP * _MAP)
    pictures = tokenizer.decode(maps, grid=(_MAP, _MAP))
    return pictures[..., factor : 3 * factor, factor : 3 * factor]


def find_in_tokenizer(logs: Logs, recipe: Mapping[str, Any], measured: ReconstructionMeter | None) -> list[Problem]:
    """Judges the codes on validation images, and the last measurements of stage 1.

    Args:
        logs: Logs of the stage.
        recipe: The recipe of the run; empty if there is none.
        measured: Measurements on validation images; None without them.
    """
    problems: list[Problem] = []
    if measured is not None:
        counts = measured.codes.counts
        num_tokens = float(counts.sum())
        problems += find_problems(measured.code_usage(), codebook_size=len(counts), num_tokens=num_tokens)
    if recipe and logs.last_step > grace_steps(value_at(recipe, "trainer.max_steps")):
        # The number of tokens is at least that of images since the last logging step.
        num_tokens = value_at(recipe, "trainer.log_every_n_steps") * value_at(recipe, "data.global_batch")
        size = value_at(recipe, "model.network.codebook_size")
        problems += find_problems(logs.last("train"), codebook_size=size, num_tokens=num_tokens)
    return list({problem.cause: problem for problem in reversed(problems)}.values())[::-1]  # the first of each cause


def find_in_transformer(logs: Logs) -> list[Problem]:
    """Judges the curves of stage 2: a validation loss that rises or stays level, and a gradient norm that grows."""
    problems = []
    losses = logs.scalars.get("val/loss", {})
    loss = _finite(losses)
    half = _finite({step: value for step, value in losses.items() if step <= max(losses) / 2})
    if len(loss) > 2 and loss[-1] > _RISE * min(loss):
        text = f"the validation loss has risen from {min(loss):.4g} to {loss[-1]:.4g}, so the transformer overfits"
        advice = ["stop earlier (trainer.max_steps)", "raise model.network.dropout", "use more training images"]
        problems.append(Problem("overfitting", loss[-1], text, advice))
    elif half and loss[-1] > (1 - _FALL) * half[-1]:
        text = f"the validation loss was {half[-1]:.4g} at half of the steps and is {loss[-1]:.4g} at the last"
        advice = ["use more training images", "augment them (data.augmentations)", "train a larger transformer"]
        problems.append(Problem("plateau", loss[-1], text, advice))
    norms = _finite(logs.scalars.get("train/gradient_norm", {}))
    if len(norms) > 5 and norms[-1] > _NORM_RISE * median(norms):
        text = f"the gradient norm has grown to {norms[-1]:.4g}, from a median of {median(norms):.4g}"
        advice = ["set trainer.gradient_clip_val", "lower model.optimizer.learning_rate.peak"]
        problems.append(Problem("gradient_norm", norms[-1], text, advice))
    return problems


def _finite(values: Mapping[int, float]) -> Sequence[float]:
    return [value for _, value in sorted(values.items()) if math.isfinite(value)]


# The page


def _verdict_section(verdict: Sequence[str], kind: str) -> str:
    parts = [f'<p class="{kind}">{_quote(line)}</p>' for line in verdict]
    return f"<section><h2>What looks wrong, and what to try</h2>{''.join(parts)}</section>\n"


def _codes_section(measured: ReconstructionMeter, class_names: tuple[str, ...]) -> str:
    counts, size = measured.codes.counts, len(measured.codes.counts)
    errors, labels, usage = measured.values()["error"], torch.cat(measured.labels), measured.code_usage()
    used = int((counts > 0).sum())
    note = (
        f"{len(labels)} validation images: {used} of {size} codes occur ({usage['codebook_usage']:.1%}), perplexity "
        f"{usage['perplexity']:.1f}."
    )
    shares = (counts / counts.sum() * size).sort(descending=True).values
    frequencies = {rank + 1: value for rank, value in enumerate(shares.tolist()) if value > 0}
    lines = {"frequency / uniform": frequencies, "uniform": {1: 1.0, size: 1.0}}
    order = counts.argsort(descending=True, stable=True)[:_MAX_CODES]
    tiles = picture_codes(measured.tokenizer, order)
    atlas = image_grid(tiles, columns=min(_COLUMNS, len(tiles)), scale=max(1, _TILE // tiles.shape[-1]))
    pairs = [(pair.original, pair.reconstruction) for pair in measured.worst]
    worst = reconstruction_grid(*map(torch.stack, zip(*pairs, strict=True)))
    psnr_of_class = {label: psnr(float(errors[labels == label].mean())) for label in set(labels.tolist())}
    by_psnr = sorted(psnr_of_class.items(), key=lambda pair: (pair[1], pair[0]))[:_SHOWN_CLASSES]
    listed = ", ".join(f"{class_names[label]} {value:.4g}" for label, value in by_psnr)
    parts = [
        _line_chart("Frequency of each code, sorted", lines, x_label="rank of the code"),
        _embed(
            f"Atlas of {len(order)} of {size} codes, the most used first (the first {used} occur)",
            image_to_png(atlas),
            description=f"{len(order)} small pictures, each of a token map that is filled with one code",
        ),
        _embed(
            f"The {len(measured.worst)} worst reconstructions: originals above",
            image_to_png(worst),
            description=f"{len(measured.worst)} images above their reconstructions",
        ),
    ]
    notes = [note, f"PSNR by class in dB, the lowest first: {listed}."]
    return _section("The codes on validation images", parts, notes=notes)


def _line_chart(title: str, lines: Mapping[str, Mapping[int, float]], *, x_label: str = "step") -> str:
    """Draws values by line and step. The axis is logarithmic if positive values span more than a factor of 50."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.4), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        steps = sorted(line)
        is_point = len(steps) == 1
        axes.plot(steps, [line[step] for step in steps], "." if is_point else "-", label=plain_label(name))
    values = [value for line in lines.values() for value in _finite(line)]
    if values and min(values) > 0 and max(values) > _LOG_FROM * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.4)
    axes.legend(fontsize="small")
    ends = "; ".join(f"{name}: {line[min(line)]:.4g} to {line[max(line)]:.4g}" for name, line in lines.items())
    return _embed(title, figure_to_png(figure), description=f"{title}. {ends}", is_chart=True)


def _quote(text: object) -> str:
    """Returns text as HTML that shows it on one line, without markup."""
    return html.escape(printable(text, limit=2000))


def _format_html(title: str, sections: Sequence[str]) -> str:
    """Returns a complete HTML document of a title in plain text and sections in HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_quote(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_quote(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def _section(title: str, figures: Sequence[str], *, notes: Sequence[str] = ()) -> str:
    """Returns a section of figures in HTML below notes in plain text; an empty string if it has neither."""
    if not figures and not notes:
        return ""
    text = "".join(f"<p>{_quote(note)}</p>" for note in notes)
    return f"<section><h2>{_quote(title)}</h2>{text}<div>{''.join(figures)}</div></section>\n"


def _embed(title: str, png: bytes, *, description: str, is_chart: bool = False) -> str:
    """Returns a figure with a PNG file inside of the page; the description is for those who do not see it."""
    kind = ' class="chart"' if is_chart else ""
    return (
        f'<figure><figcaption>{_quote(title)}</figcaption><img{kind} alt="{_quote(description)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}"></figure>'
    )
