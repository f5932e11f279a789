"""Reads the logs of a run and measures its tokenizer, and judges both by the rules of the alarms of training.

A record of a TensorBoard event file is its length (8 bytes, little endian), 4 bytes of checksum, the content,
and 4 bytes of checksum. The content is parsed as a protocol buffer, which executes nothing. A file may still
be written to, damaged, or hostile.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import build_dataclass
from maskgit_pl.data import Batch
from maskgit_pl.errors import printable
from maskgit_pl.evaluation.tokenizer import psnr
from maskgit_pl.files import parse_any_json, size_text
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.runs.layers import value_at
from maskgit_pl.training.health import FILE_NAME, HealthConfig, Problem, find_problems

__all__ = [
    "CodeUse",
    "Logs",
    "find_in_tokenizer",
    "find_in_transformer",
    "measure_codes",
    "picture_codes",
    "read_logs",
    "read_reports",
]

_NUM_WORST = 8
_MAP = 4  # rows and columns of the token map from which a code is drawn
_MAX_FILES = 1000
_MAX_BYTES = 2**30  # of a file; training writes about 100 bytes a value
_MAX_RECORD = 2**25  # of a record; a picture of samples has less than 1 MB
_MAX_TAGS = 500
_MAX_POINTS = 200_000  # of a scalar
_MAX_PICTURES = 400  # of a name
_MAX_REPORT_BYTES = 1_000_000  # of health.json; training writes at most one report per cause
_RISE = 1.05  # of the validation loss above its minimum
_NORM_RISE = 10.0  # of the gradient norm above its median


@dataclass
class Logs:
    """The logged values of a stage.

    Args:
        scalars: Values by name and step.
        pictures: Encoded images by name and step.
        notes: Sentences about what could not be read.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def last(self, prefix: str) -> dict[str, float]:
        """Returns the last value of each scalar ``prefix/NAME`` by NAME."""
        return {
            name.removeprefix(f"{prefix}/"): values[max(values)]
            for name, values in self.scalars.items()
            if name.startswith(f"{prefix}/") and values
        }

    @property
    def last_step(self) -> int:
        """The last step with a value; 0 without values."""
        return max((max(values) for values in self.scalars.values() if values), default=0)


def read_logs(folder: Path) -> Logs:
    """Reads all event files of a stage folder, the oldest first; later values of a step replace earlier ones.

    Args:
        folder: Folder of the stage; it need not exist.
    """
    logs = Logs()
    files = sorted(folder.glob("events.out.tfevents.*"))
    if len(files) > _MAX_FILES:
        logs.notes.append(f"only the last {_MAX_FILES} of {len(files)} event files are shown")
    for file in files[-_MAX_FILES:]:
        try:
            for record in _records(file):
                _add_record(logs, record)
        except (OSError, ValueError) as error:
            logs.notes.append(f"{printable(file.name)} is read only in part: {printable(error)}")
    return logs


def _records(file: Path) -> Iterator[bytes]:
    """Yields the complete records of an event file.

    Raises:
        ValueError: if the file or a record is too large, or a record is empty. The end of a file that is
            still written to is no error.
    """
    if not file.is_file():
        raise ValueError("it must be a regular file")
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"it must have at most {size_text(_MAX_BYTES)}, got {size_text(size)}")
    with file.open("rb") as stream:
        while len(head := stream.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            if length == 0:  # no event is empty: the rest of the file was never written, such as that of a sparse file
                raise ValueError("a record is damaged")
            if length > _MAX_RECORD:
                raise ValueError(f"a record must have at most {size_text(_MAX_RECORD)}, got {size_text(length)}")
            record = stream.read(length)
            if len(record) < length or len(stream.read(4)) < 4:
                return
            yield record


def _add_record(logs: Logs, record: bytes) -> None:
    """Adds the values of a record.

    Raises:
        ValueError: if the record is not an event.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no stubs
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]  # it has no stubs

    event = Event()
    try:
        event.ParseFromString(record)
    except DecodeError as error:
        raise ValueError("a record is damaged") from error
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            points = _series(logs.scalars, value.tag)
            if points is not None and len(points) < _MAX_POINTS:
                points[event.step] = value.simple_value
        elif kind == "image":
            pictures = _series(logs.pictures, value.tag)
            if pictures is not None and len(pictures) < _MAX_PICTURES:
                pictures[event.step] = value.image.encoded_image_string


def _series(series: dict[str, dict[int, float]] | dict[str, dict[int, bytes]], name: str) -> dict[int, object] | None:
    """Returns the values of a name, or None if there are too many names."""
    if name not in series and len(series) >= _MAX_TAGS:
        return None
    return series.setdefault(name, {})  # type: ignore[return-value]  # both kinds of values are set alike


@dataclass(frozen=True)
class CodeUse:
    """The results of encoding and decoding validation images.

    Args:
        counts: (K,) int64: number of tokens of each code.
        psnr_of_class: PSNR in dB by label.
        worst: (n, C, H, W) uint8: images with the largest error, the worst first.
        worst_reconstructions: (n, C, H, W) uint8: their reconstructions.
        num_images: Number of images.
    """

    counts: Tensor
    psnr_of_class: dict[int, float]
    worst: Tensor
    worst_reconstructions: Tensor
    num_images: int

    @property
    def usage(self) -> float:
        """The fraction of codes that occur."""
        return float((self.counts > 0).double().mean())

    @property
    def perplexity(self) -> float:
        """The perplexity of the code frequencies, in [1, K]."""
        shares = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.special.entr(shares).sum().exp())


def measure_codes(tokenizer: PretrainedTokenizer, batches: Iterable[Batch], *, max_images: int) -> CodeUse:
    """Encodes and decodes images.

    Args:
        tokenizer: The tokenizer, on its device.
        batches: Batches of uint8 images; rows that are not valid are ignored.
        max_images: Largest number of images, >= 1.

    Raises:
        ValueError: if there are no images.
    """
    counts = torch.zeros(tokenizer.network.config.codebook_size, dtype=torch.int64)
    errors, labels = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    worst = reconstructions = None
    worst_errors = torch.empty(0, dtype=torch.float64)
    for batch in batches:
        images = batch.content[batch.valid][: max_images - len(errors)]
        tokens = tokenizer.encode(images)
        decoded = tokenizer.decode(tokens)
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
        batch_errors = ((images.double() - decoded.double()) / 255).square().flatten(1).mean(1)  # (B,)
        errors = torch.cat([errors, batch_errors])
        labels = torch.cat([labels, batch.labels[batch.valid][: len(images)].cpu()])
        # Only the worst images are kept.
        worst_errors = torch.cat([worst_errors, batch_errors])
        worst = images if worst is None else torch.cat([worst, images])
        reconstructions = decoded if reconstructions is None else torch.cat([reconstructions, decoded])
        order = worst_errors.argsort(descending=True)[:_NUM_WORST]
        worst_errors, worst, reconstructions = worst_errors[order], worst[order], reconstructions[order]
        if len(errors) >= max_images:
            break
    if worst is None or reconstructions is None or not len(errors):
        raise ValueError("inspect: there must be at least one validation image, got none; choose others with --data")
    classes = {label: psnr(float(errors[labels == label].mean())) for label in sorted(set(labels.tolist()))}
    return CodeUse(counts, classes, worst, reconstructions, len(errors))


def picture_codes(tokenizer: PretrainedTokenizer, codes: Tensor) -> Tensor:
    """Decodes a small token map that is filled with a code, for each code, and cuts out its middle.

    Args:
        tokenizer: The tokenizer.
        codes: (n,) int64 in [0, K).

    Returns:
        (n, C, S, S) uint8; S is twice the downsampling factor.
    """
    factor = tokenizer.network.config.downsampling_factor
    maps = codes.to(next(tokenizer.network.parameters()).device).unsqueeze(1).repeat(1, _MAP * _MAP)
    pictures = tokenizer.decode(maps, grid=(_MAP, _MAP))
    return pictures[..., factor : 3 * factor, factor : 3 * factor]


def find_in_tokenizer(logs: Logs, recipe: Mapping[str, Any], measured: CodeUse | None) -> list[Problem]:
    """Judges the last measurements of stage 1, and the codes on validation images.

    Args:
        logs: Logs of the stage.
        recipe: The recipe of the run, unchecked; may be empty.
        measured: Measurements on validation images; None without them.
    """
    step, max_steps = logs.last_step, _number(value_at(recipe, "trainer.max_steps")) or 0
    problems: list[Problem] = []
    if measured is not None:
        metrics, size = {"codebook_usage": measured.usage, "perplexity": measured.perplexity}, len(measured.counts)
        num_tokens = float(measured.counts.sum())
        problems += find_problems(metrics, codebook_size=size, num_tokens=num_tokens)
    logged_size = int(_number(value_at(recipe, "model.network.codebook_size")) or 0)
    if logged_size >= 1 and step > _health_config(recipe).grace(int(max_steps)):
        # The number of tokens is at least that of images since the last logging step.
        every, batch = (
            _number(value_at(recipe, key)) or 1 for key in ("trainer.log_every_n_steps", "data.global_batch")
        )
        problems += find_problems(logs.last("train"), codebook_size=logged_size, num_tokens=every * batch)
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.cause, problem)
    return list(first.values())


def find_in_transformer(logs: Logs) -> list[Problem]:
    """Judges the curves of stage 2: a validation loss that rises, and a gradient norm that grows."""
    problems = []
    loss = _finite(logs.scalars.get("val/loss", {}))
    if len(loss) > 2 and loss[-1] > _RISE * min(loss):
        text = f"the validation loss has risen from {min(loss):.4g} to {loss[-1]:.4g}, so the transformer overfits"
        advice = ["stop earlier (trainer.max_steps)", "raise model.network.dropout", "use more training images"]
        problems.append(Problem("overfitting", loss[-1], text, advice))
    norms = _finite(logs.scalars.get("train/gradient_norm", {}))
    if len(norms) > 5 and norms[-1] > _NORM_RISE * median(norms):
        text = f"the gradient norm has grown to {norms[-1]:.4g}, from a median of {median(norms):.4g}"
        advice = ["set trainer.gradient_clip_val", "lower model.optimizer.learning_rate.peak"]
        problems.append(Problem("gradient_norm", norms[-1], text, advice))
    return problems


def read_reports(folder: Path) -> list[str]:
    """Returns the reports of training in ``health.json`` as sentences; damaged ones are left out."""
    file = folder / FILE_NAME
    try:
        if not file.is_file() or file.stat().st_size > _MAX_REPORT_BYTES:
            return []
        reports = parse_any_json(file.read_bytes(), str(file))
    except (OSError, ValueError):
        return [f"{FILE_NAME} cannot be read"]
    sentences = []
    for report in reports if isinstance(reports, list) else ():
        if isinstance(report, Mapping):
            sentences.append(f"Reported in training at step {report.get('step')}: {report.get('text')}.")
    return sentences


def _health_config(recipe: Mapping[str, Any]) -> HealthConfig:
    values = recipe.get("health")
    try:
        return build_dataclass(HealthConfig, values, "health") if isinstance(values, Mapping) else HealthConfig()
    except ValueError:
        return HealthConfig()


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None  # type: ignore[return-value]  # the line above narrows it


def _finite(values: Mapping[int, float]) -> Sequence[float]:
    return [value for _, value in sorted(values.items()) if math.isfinite(value)]
