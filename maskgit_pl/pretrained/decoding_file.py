"""``decoding.json`` of a pretrained folder, which replaces the transformer's own decoding configuration."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskgit_pl.decoding import SETTINGS_FORMAT, DecodingConfig, read_settings_file
from maskgit_pl.files import sha256_of, write_text
from maskgit_pl.schedules import mask_schedules

__all__ = ["load_decoding", "read_decoding", "save_decoding", "validate_decoding"]

WEIGHTS_FILE = "model.safetensors"
_DECODING = "decoding.json"
_VERSION = 1
_log = logging.getLogger(__name__)


def save_decoding(
    folder: Path | str, decoding: DecodingConfig, *, tuned: Mapping[str, Any] | None = None
) -> Path | None:
    """Writes ``decoding.json``, by which the images of this folder are decoded from then on.

    Args:
        folder: Folder such as ``runs/RUN/pretrained``.
        decoding: Configuration of decoding.
        tuned: Record of the search that found it, in plain values, for people.

    Returns:
        The copy of an older ``decoding.json``; None if there was none.

    Raises:
        FileNotFoundError: if the folder has no transformer.
    """
    file = Path(folder) / _DECODING
    content = {
        "format": SETTINGS_FORMAT,
        "version": _VERSION,
        "decoding": asdict(decoding),
        "transformer": sha256_of(file.parent / "transformer" / WEIGHTS_FILE),
        "tuned": dict(tuned or {}),
    }
    old = file.with_name(f"{_DECODING}.old") if file.is_file() else None
    if old is not None:
        shutil.copyfile(file, old)  # a copy: the folder is never without one
    write_text(file, json.dumps(content, indent=2) + "\n")
    return old


def read_decoding(folder: Path | str) -> DecodingConfig | None:
    """Reads ``decoding.json``; returns None if there is none.

    A file that was tuned for other weights is used too, with a warning.

    Args:
        folder: Folder such as ``runs/RUN/pretrained``.

    Raises:
        ValueError: if it is not JSON, has another format or version or unknown keys, or its values are wrong.
    """
    file = Path(folder) / _DECODING
    if not file.is_file():
        return None
    try:
        content, decoding = _decoding_file(file)
    except ValueError as error:
        raise ValueError(f"{error}; delete the file to decode as the model was exported") from error
    # Tuned settings fit one set of weights; after more training they may not be the best.
    weights = sha256_of(file.parent / "transformer" / WEIGHTS_FILE)
    if content.get("transformer") != weights:
        _log.warning(
            "decoding %s: tuned for a transformer with fingerprint %s, used with one with %s; run "
            "`maskgit tune` for this one, or delete the file to use the model's own decoding",
            file,
            str(content.get("transformer"))[:12],
            weights[:12],
        )
    return decoding


def load_decoding(file: Path | str) -> DecodingConfig:
    """Reads a file in the format of ``decoding.json``, from any place and tuned for any weights.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: see ``read_decoding``.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"decoding {file}: no such file; `maskgit tune` writes RUN/pretrained/{_DECODING}")
    return _decoding_file(Path(file))[1]


def _decoding_file(file: Path) -> tuple[dict[str, Any], DecodingConfig]:
    """Returns the content of a file, and the configuration in it."""
    decoding, content = read_settings_file(file)
    return content, validate_decoding(decoding, f"decoding {file}: decoding")


def validate_decoding(decoding: DecodingConfig, where: str) -> DecodingConfig:
    """Returns ``decoding`` after building a decoder from it, which checks its names and numbers.

    Raises:
        ValueError: if a name is unknown or a number is wrong. The message begins with ``where``.
    """
    try:
        if decoding.is_autoregressive:
            decoding.build_autoregressive_decoder(decoding.num_steps)
        else:
            # Any schedule serves: this checks names and numbers.
            decoding.build_decoder(mask_schedules.build("cosine"))
        decoding.scales()
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error
    return decoding
