"""``evaluate_tokenizer``: measures a tokenizer without a transformer: reconstructions, codes, bits, speed and memory.

Importing this file does not import torch: wrong arguments are answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.options import TokenizerOptions, check_tokenizer_data
from maskgit_pl.evaluation.run_folders import find_tokenizer_folders
from maskgit_pl.files import check_writable
from maskgit_pl.progress import Bars, no_bars

if TYPE_CHECKING:
    from maskgit_pl.evaluation.tokenizer_report import TokenizerReport

__all__ = ["evaluate_tokenizer"]


def evaluate_tokenizer(
    folder: Path | str,
    *,
    data: Path | None = None,
    features: Sequence[str | dict[str, Any]] = ("classifier",),
    out: Path | None = None,
    options: TokenizerOptions | None = None,
    bars: Bars = no_bars,
) -> TokenizerReport:
    """Measures a tokenizer, and writes ``tokenizer.json``, ``tokenizer.md``, a picture and a ledger row.

    Args:
        folder: Run folder, pretrained folder, or the folder of a tokenizer.
        data: Data folder; None for the data that the run was trained on.
        features: Feature networks: names or mappings, see ``networks.features.parse_feature_network``.
        out: Path of the JSON file, beside which the others are written; None for ``RUN/tokenizer.json``.
        options: Number of images, tiles and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if there is no tokenizer, or no data.
        TypeError: if a feature network does not accept its arguments.
        ValueError: if the data do not fit the tokenizer, a network is unknown, or a number is out of range.
    """
    options = options or TokenizerOptions()
    folders = find_tokenizer_folders(folder, data=data, classifier=options.classifier)
    check_tokenizer_data(folders, options)
    file = out or folders.run / "tokenizer.json"
    check_writable("out", file)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluate-tokenizer must run in one process; start it without torchrun")
    ledger = Ledger(folders.evaluation / FILE_NAME)  # a damaged file is found before minutes of measurement
    check_writable("ledger", ledger.file)
    from maskgit_pl.evaluation.tokenizer_measurement import measure_tokenizer
    from maskgit_pl.evaluation.tokenizer_report import make_tokenizer_report

    measured = measure_tokenizer(folders, features, options, bars)
    report = make_tokenizer_report(folders, measured, options, file)
    report.save()
    ledger.add("tokenizer", report.row())
    return report
