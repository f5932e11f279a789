"""``decoding.json``: how the images of a pretrained folder are decoded, in place of the transformer's own way."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskgit_pl.decoding import RECIPE_FORMAT, DecodingConfig, read_recipe
from maskgit_pl.files import sha256_of, write_text
from maskgit_pl.schedules import mask_schedules

__all__ = ["checked_decoding", "load_decoding", "read_decoding", "save_decoding"]

WEIGHTS_FILE = "model.safetensors"
_DECODING = "decoding.json"
_VERSION = 1
_log = logging.getLogger(__name__)


def save_decoding(
    folder: Path | str, decoding: DecodingConfig, *, tuned: Mapping[str, Any] | None = None
) -> Path | None:
    """Writes ``decoding.json``: how this folder's images are decoded from now on.

    Args:
        folder: E.g. ``runs/RUN/pretrained``.
        decoding: The way of decoding.
        tuned: Record of how it was found, in plain values; kept beside it for people.

    Returns:
        The file that keeps an older ``decoding.json``; None if there was none.

    Raises:
        FileNotFoundError: if the folder has no transformer.
    """
    file = Path(folder) / _DECODING
    content = {
        "format": RECIPE_FORMAT,
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
    """Reads ``decoding.json``; None if there is none.

    One that was tuned for other weights is used all the same, and a warning says so.

    Args:
        folder: E.g. ``runs/RUN/pretrained``.

    Raises:
        ValueError: if it is not JSON, has another format or version or unknown keys, or values that no decoder takes.
    """
    file = Path(folder) / _DECODING
    if not file.is_file():
        return None
    try:
        content, decoding = _decoding_file(file)
    except ValueError as error:
        raise ValueError(f"{error}; delete the file to decode as the model was exported") from error
    weights = sha256_of(file.parent / "transformer" / WEIGHTS_FILE)
    if content.get("transformer") != weights:
        _log.warning(
            "decoding %s: tuned for a transformer with fingerprint %s, used with one with %s; "
            "`maskgit tune` finds what suits it, deleting the file gives the model's own decoding",
            file,
            str(content.get("transformer"))[:12],
            weights[:12],
        )
    return decoding


def load_decoding(file: Path | str) -> DecodingConfig:
    """Reads a file in the form of ``decoding.json``, of any place and tuned for any weights.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as ``read_decoding``.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"decoding {file}: no such file; `maskgit tune` writes RUN/pretrained/{_DECODING}")
    return _decoding_file(Path(file))[1]


def _decoding_file(file: Path) -> tuple[dict[str, Any], DecodingConfig]:
    """Returns the content of the file, and the way of decoding."""
    decoding, content = read_recipe(file)
    return content, checked_decoding(decoding, f"decoding {file}: decoding")


def checked_decoding(decoding: DecodingConfig, where: str) -> DecodingConfig:
    """Returns ``decoding`` after a decoder was built of it, which refuses unknown names and wrong numbers.

    Raises:
        ValueError: if it is refused. The message begins with ``where``.
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
