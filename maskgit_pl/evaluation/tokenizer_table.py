"""The page that sets tokenizers side by side: measures those that the ledger lacks. ``tables`` uses it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskgit_pl.errors import markdown
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.metrics import format_value, title
from maskgit_pl.evaluation.opening import RunFolders, data_name, describe_held_out
from maskgit_pl.evaluation.options import ReportOptions, TokenizerOptions
from maskgit_pl.evaluation.pages import Page, code_cell, heading, markdown_table, paragraph
from maskgit_pl.evaluation.tokenizer import measure_tokenizer, open_tokenizer
from maskgit_pl.processes import Bars

__all__ = ["measure_tokenizers"]

_NOT_SHOWN = ("images_per_second", "peak_memory_mb")  # of one machine; the CSV has them


def measure_tokenizers(folders: Sequence[RunFolders], options: ReportOptions, command: str, bars: Bars) -> Page:
    """Measures tokenizers on the same val images, and returns their page.

    Args:
        folders: Folders of each tokenizer, with the same data.
        options: Number of images, networks, folder of the ledger and other options.
        command: Command that produces the page.
        bars: Progress bars.

    Raises:
        ValueError: if the data do not fit a tokenizer, or a network is unknown.
    """
    ledger, rows = Ledger(options.results / FILE_NAME), []
    own = TokenizerOptions(
        batch_size=options.batch_size,
        device=options.device,
        num_workers=options.num_workers,
        classifier=options.classifier,
        num_images=options.num_images,
    )
    tokenizers = [open_tokenizer(each, options.features, own, bars) for each in folders]
    for opened in tokenizers:
        row = ledger.find("tokenizer", opened.key)
        if row is None:
            row = ledger.add("tokenizer", measure_tokenizer(opened, options.results / "tokenizer.json", bars).row())
        rows.append({**row, "run": opened.folders.run.name})
    data = tokenizers[0].data
    text = describe_held_out(folders[0].data, data.summary)["text"]
    return _make_page(rows, command, text, options.results / data_name(folders[0].data))


def _make_page(rows: Sequence[Row], command: str, held_out: str, folder: Path) -> Page:
    """Returns the page of tokenizers, one row for each; ``held_out`` is a sentence about the images."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row["numbers"]) if name not in _NOT_SHOWN]
    lines = [
        *heading("Tokenizers", command),
        *paragraph(
            held_out,
            f"{rows[0]['num_images']} of them were measured. FID and KID of real halves compare one half of these real",
            "images with the other. Values are comparable only for the same data, network and number of images.",
        ),
        "",
        *markdown_table(
            ["tokenizer", "codes", "quantizer", "parameters", *map(title, names)],
            [
                [
                    code_cell(row["run"]),
                    markdown(row["codes"]),
                    markdown(row["quantizer"]),
                    f"{row['parameters'] / 1e6:.2f}M",
                    *(_cell(row["numbers"], name) for name in names),
                ]
                for row in rows
            ],
            left=3,
        ),
    ]
    flat = [{**{key: value for key, value in row.items() if key != "numbers"}, **row["numbers"]} for row in rows]
    settings = [{**row, "settings": json.dumps(row["settings"], sort_keys=True)} for row in flat]
    return Page("tokenizers", "\n".join([*lines, ""]), settings, folder=folder)


def _cell(numbers: Mapping[str, Any], name: str) -> str:
    return format_value(name, numbers[name]) if name in numbers else ""
