"""Token selectors beside one another: every one at several numbers of steps, with the same noise for all.

Used by ``maskgit compare``. What was measured is kept in ``comparison.json``, written after each row, so that a command
that was stopped goes on where it was; the tables and the sheet of images are made from that file.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from maskgit_pl.checks import build_dataclass, check_integer, check_keys, check_number, shorten
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import Remasking, token_selectors
from maskgit_pl.evaluation.decodings import Spec, plain, same_decoding
from maskgit_pl.evaluation.digests import differing
from maskgit_pl.files import read_json, write_atomically
from maskgit_pl.imaging import image_grid
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.registry import describe
from maskgit_pl.text import markdown, printable

__all__ = [
    "Contender",
    "Rows",
    "as_csv",
    "as_markdown",
    "as_table",
    "contenders",
    "every_selector",
    "in_two_lines",
    "selector_sheet",
    "sheet_steps",
]

_FORMAT, _VERSION = "maskgit_pl.comparison", 1
_MAX_BYTES = 16_000_000
_VARIANTS: dict[str, list[dict[str, Any]]] = {"remdm": [{"strategy": name} for name in get_args(Remasking)]}
_SHOWN_CLASSES, _SHEET_STEPS = 10, 8
_COLUMNS = {  # key of a row -> heading, factor, digits
    "class_agreement": ("agreement %", 100, 1),
    "fid/classifier": ("fid/classifier", 1, 2),
    "kid/classifier": ("kid/classifier", 1, 4),
    "diversity": ("diversity", 1, 2),
    "steps_taken": ("steps taken", 1, 1),
    "milliseconds_per_image": ("ms an image", 1, 1),
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """A token selector under the name that tables show.

    Args:
        label: Its name, and what makes it different.
        token_selector: Name or mapping.
    """

    label: str
    token_selector: Spec


def contenders(wanted: Sequence[Spec] | None, own: Spec) -> list[Contender]:
    """The selectors that are compared.

    A selector given by its name alone takes the choice temperature of the model's own selector, where both have one;
    a mapping is taken as it is.

    Args:
        wanted: Names and mappings; None is every registered one that needs no argument, ``remdm`` with each strategy.
        own: The model's own.

    Raises:
        TypeError: A selector does not take its arguments.
        ValueError: An unknown name, a number out of range, or the same selector twice.
    """
    temperature = getattr(token_selectors.build(own), "choice_temperature", None)
    specs = every_selector() if wanted is None else [(describe(spec), spec) for spec in wanted]
    found: dict[str, Contender] = {}
    for label, spec in specs:
        if label in found:
            raise ValueError(f"token selector {label}: once is enough, got it twice")
        named = isinstance(spec, str) or wanted is None
        has_one = hasattr(token_selectors.build(spec), "choice_temperature")
        if named and has_one and temperature is not None:
            spec = {**({"name": spec} if isinstance(spec, str) else spec), "choice_temperature": temperature}
        found[label] = Contender(label, spec)
    return list(found.values())


def every_selector() -> list[tuple[str, Spec]]:
    """Labels and specs of every registered selector that needs no argument, ``remdm`` with each strategy."""
    specs: list[tuple[str, Spec]] = []
    for name in token_selectors.build_all():
        for arguments in _VARIANTS.get(name, [{}]):
            spec: Spec = {"name": name, **arguments} if arguments else name
            specs.append((" ".join([name, *map(str, arguments.values())]), spec))
    return specs


class Rows:
    """What was measured so far, and the file that keeps it.

    Args:
        file: ``comparison.json``.
        protocol: What decides the numbers beside the decoding, in plain values. A file with another one, or one that
            does not say all of it, is kept as ``comparison.json.old``, ``.old2`` and so on, and begun anew.
        context: What else the file tells: the numbers of real images, the environment.

    Raises:
        ValueError: if the file is not one of this format, or a row of it is none.
    """

    def __init__(self, file: Path, protocol: Mapping[str, Any], context: Mapping[str, Any]) -> None:
        self.file = file
        self.content = {
            "format": _FORMAT,
            "version": _VERSION,
            "protocol": json.loads(json.dumps(protocol)),
            **context,
            "rows": [],
        }
        if not file.exists():
            return
        before = _read(file)
        changed = differing(before["protocol"], self.content["protocol"])
        if not changed:
            for place, row in enumerate(before["rows"]):
                _check_row(f"comparison {file}: rows[{place}]", row)
            self.content["rows"] = before["rows"]
            return
        old = _free_name(file)
        file.replace(old)
        _log.info("%s: measured under another protocol (%s), kept as %s", file, ", ".join(changed), old.name)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Each row: selector, num_steps, what was measured, decoding, and the commit of the code."""
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def find(self, decoding: DecodingConfig) -> dict[str, Any] | None:
        """The row of a decoding, if it was measured."""
        return next((row for row in self.rows if same_decoding(row["decoding"], decoding)), None)

    def add(self, label: str, decoding: DecodingConfig, numbers: Mapping[str, Any], *, commit: str | None) -> None:
        """Keeps a row, in the file too."""
        numbers = dict(numbers)
        row = {
            "selector": label,
            "num_steps": decoding.num_steps,
            "milliseconds_per_image": 1000 * numbers.pop("seconds_per_image"),
            **numbers,
            "decoding": plain(decoding),
            "commit": commit,
        }
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Writes the file, under a temporary name first."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.file) as stream:
            stream.write((json.dumps(self.content, indent=2) + "\n").encode())


def _free_name(file: Path) -> Path:
    """Returns the first of ``NAME.old``, ``NAME.old2`` ... that is not there."""
    names = (file.with_name(f"{file.name}.old{number if number > 1 else ''}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file, max_bytes=_MAX_BYTES)
        if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"{file} must be of the format {_FORMAT} {_VERSION}")
        if not isinstance(content.get("protocol"), dict) or not isinstance(content.get("rows"), list):
            raise ValueError(f"{file} must have a mapping 'protocol' and a list 'rows'")
    except ValueError as error:
        raise ValueError(f"comparison {error}; move it away, or name another folder with --out") from error
    return content


def _check_row(where: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a mapping, got {shorten(row)}")
    required = ("selector", "num_steps", "decoding", *_COLUMNS)
    check_keys(where, row, known=[*row, *required], required=required)
    if not isinstance(row["selector"], str):
        raise ValueError(f"{where}.selector must be a string, got {shorten(row['selector'])}")
    check_integer(f"{where}.num_steps", row["num_steps"], "[1, inf)")
    for name in _COLUMNS:
        check_number(f"{where}.{name}", row[name], "(-inf, inf)")
    build_dataclass(DecodingConfig, row["decoding"], f"{where}.decoding")


def sheet_steps(rows: Sequence[Mapping[str, Any]]) -> int:
    """The number of steps that the sheet of images shows: 8, or the nearest that was measured."""
    numbers: list[int] = [row["num_steps"] for row in rows]
    return min(numbers, key=lambda steps: (abs(steps - _SHEET_STEPS), steps))


def _ordered(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By number of steps, the nearest to real images first."""
    return sorted(rows, key=lambda row: (row["num_steps"], row["fid/classifier"]))


def _best(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any], key: str) -> bool:
    """Whether a row has the least distance of its number of steps; of other numbers more is not always better."""
    values = [other[key] for other in rows if other["num_steps"] == row["num_steps"]]
    return bool(key in ("fid/classifier", "kid/classifier") and row[key] == min(values))


def _real_cells(content: Mapping[str, Any]) -> list[str]:
    floor = content["real"]["real_against_real"]
    values = {"class_agreement": content["real"]["accuracy"], "diversity": 1.0, **floor}
    return [
        f"{values[key] * factor:.{digits}f}" if key in values else "" for key, (_, factor, digits) in _COLUMNS.items()
    ]


def in_two_lines(heading: str) -> str:
    """A heading that leaves room for others in a terminal of 80 columns."""
    return heading.replace("/", "/\n") if "/" in heading else "\n".join(heading.rsplit(" ", 1))


def as_table(content: Mapping[str, Any]) -> Table:
    """The rows for a terminal: the best of each number of steps in bold."""
    protocol, rows = content["protocol"], _ordered(content["rows"])
    title = f"{protocol['num_images']} images each, seed {protocol['seed']}, the same noise for all"
    table = Table(title=title, box=SIMPLE, padding=0)
    table.add_column("T", justify="right")
    table.add_column("token\nselector")
    for heading, _, _ in _COLUMNS.values():
        table.add_column(in_two_lines(heading), justify="right")
    for number, row in enumerate(rows):
        cells = [
            f"[bold]{row[key] * factor:.{digits}f}[/]" if _best(rows, row, key) else f"{row[key] * factor:.{digits}f}"
            for key, (_, factor, digits) in _COLUMNS.items()
        ]
        last = number + 1 == len(rows) or rows[number + 1]["num_steps"] != row["num_steps"]
        table.add_row(str(row["num_steps"]), escape(printable(row["selector"])), *cells, end_section=last)
    table.add_row("", "real images", *_real_cells(content))
    return table


def as_markdown(content: Mapping[str, Any], *, command: str) -> str:
    """The rows as a page: how they were made, a table of the distances, and a table of everything.

    Args:
        content: What ``comparison.json`` holds.
        command: What makes it again.
    """
    lines = ["# Token selectors", "", f"    {printable(command, limit=None)}", "", *_how(content), ""]
    steps = sheet_steps(content["rows"])
    lines += ["![one row a selector, one column a class](selectors.png)", ""]
    lines += [f"`selectors.png`: T = {steps}, a row a selector, a column a class, the same noise in each column.", ""]
    lines += ["## fid/classifier by number of steps T (lower is better)", "", *_distance_lines(content), ""]
    lines += ["## Everything", "", *_lines(content)]
    return "\n".join(lines) + "\n"


def _how(content: Mapping[str, Any]) -> list[str]:
    """What a reader must know to read the numbers."""
    protocol, real = content["protocol"], content["real"]
    count, floor = protocol["num_images"], real["real_against_real"]
    schedule, device = markdown(protocol["mask_schedule"]), markdown(protocol["device"])
    return [
        f"{count} images a row, spread evenly over the classes, seed {protocol['seed']}: image i of every row has the",
        "same noise. The judge is the data set's own classifier, which is right on",
        f"{real['accuracy']:.1%} of the real val images. fid/classifier and kid/classifier are Frechet and kernel",
        f"distance from all {real['images']} real val images in that classifier's features, not in those of Inception;",
        f"they compare with one another at {count} images alone. In the last line {floor['images']} real training",
        "images take the place of generated ones. Least distance of each T in bold. A class agreement above that of",
        "real images says that images are more typical than real ones, which low diversity goes with. Mask schedule",
        f"as trained: {schedule}. Decoding of each row, commits and environment: `comparison.json`.",
        *_weights(protocol),
        f"Times are wall clock on one machine ({content['environment']['cpus']} cores, device {device}).",
    ]


def _weights(protocol: Mapping[str, Any]) -> list[str]:
    """Returns the first digits of what was measured and of what judged; files of older versions do not say all."""
    digests = [
        f"{name} {markdown(str(protocol[name])[:8])}"
        for name in ("tokenizer", "transformer", "judge")
        if name in protocol
    ]
    return [f"First digits of the weights' sha256: {', '.join(digests)}."] if digests else []


def _distance_lines(content: Mapping[str, Any]) -> list[str]:
    rows, floor = content["rows"], content["real"]["real_against_real"]
    numbers = sorted({row["num_steps"] for row in rows})
    lines = ["| token selector | " + " | ".join(f"T = {number}" for number in numbers) + " |"]
    lines.append("|---|" + "---:|" * len(numbers))
    for label in dict.fromkeys(row["selector"] for row in rows):
        own = {row["num_steps"]: row for row in rows if row["selector"] == label}
        cells = [_bold(own[number], rows, "fid/classifier") if number in own else "" for number in numbers]
        lines.append(f"| {markdown(label)} | " + " | ".join(cells) + " |")
    cells = [f"{floor['fid/classifier']:.2f}"] * len(numbers)
    return [*lines, f"| real images, {floor['images']} | " + " | ".join(cells) + " |"]


def _lines(content: Mapping[str, Any]) -> list[str]:
    rows = _ordered(content["rows"])
    lines = ["| T | token selector | " + " | ".join(heading for heading, _, _ in _COLUMNS.values()) + " |"]
    lines.append("|---:|---|" + "---:|" * len(_COLUMNS))
    for row in rows:
        cells = " | ".join(_bold(row, rows, key) for key in _COLUMNS)
        lines.append(f"| {row['num_steps']} | {markdown(row['selector'])} | {cells} |")
    return [*lines, "| | real images | " + " | ".join(_real_cells(content)) + " |"]


def _bold(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], key: str) -> str:
    _, factor, digits = _COLUMNS[key]
    text = f"{row[key] * factor:.{digits}f}"
    return f"**{text}**" if _best(rows, row, key) else text


def as_csv(content: Mapping[str, Any]) -> str:
    """The rows for a spreadsheet, unrounded; the decoding as JSON."""
    stream = io.StringIO()
    names = ["selector", "num_steps", *_COLUMNS, "decoding"]
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in _ordered(content["rows"]):
        writer.writerow({**row, "decoding": json.dumps(row["decoding"])})
    return stream.getvalue()


def selector_sheet(
    pipe: MaskGIT,
    decodings: Mapping[str, DecodingConfig],
    *,
    seed: int,
    on_row: Callable[[], object] = lambda: None,
) -> Image.Image:
    """One row a selector, one column a class; images of a column have the same seed, so the same noise.

    Args:
        pipe: The model.
        decodings: By the caption of the row.
        seed: Of the first column; column i has seed + i.
        on_row: Called after each row.
    """
    names = pipe.class_names
    shown = min(len(names), _SHOWN_CLASSES)
    classes = [number * len(names) // shown for number in range(shown)]
    images = []
    for decoding in decodings.values():
        images.append(pipe.generate(classes, decoding=decoding, seed=seed, output_type="pt"))
        on_row()
    return image_grid(
        torch.cat(images),
        columns=shown,
        row_captions=list(decodings),
        column_captions=[names[label] for label in classes],
    )
