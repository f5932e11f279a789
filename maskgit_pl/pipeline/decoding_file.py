"""``decoding.json`` of a pretrained folder, which replaces the transformer's own decoding configuration."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from maskgit_pl.checks import shorten
from maskgit_pl.data.folders import check_only_known, write_folder
from maskgit_pl.decoding import SETTINGS_FORMAT, DecodingConfig, read_settings_file
from maskgit_pl.files import read_json, sha256_of, write_text
from maskgit_pl.schedules import mask_schedules

__all__ = [
    "NETWORK_FILES",
    "copy_network",
    "load_decoding",
    "read_decoding",
    "read_negative_model",
    "remove_negative_model",
    "save_decoding",
    "save_negative_model",
    "validate_decoding",
]

WEIGHTS_FILE = "model.safetensors"
_DECODING = "decoding.json"
_NEGATIVE = "negative"
NETWORK_FILES = ("config.json", WEIGHTS_FILE)
_VERSION = 1
_log = logging.getLogger(__name__)


def save_decoding(
    folder: Path | str,
    decoding: DecodingConfig,
    *,
    tuned: Mapping[str, Any] | None = None,
    negative_model: Path | None = None,
) -> Path | None:
    """Writes ``decoding.json``, by which the images of this folder are decoded from then on.

    Args:
        folder: Folder such as ``runs/RUN/pretrained``.
        decoding: Configuration of decoding.
        tuned: Record of the search that found it, in plain values, for people.
        negative_model: Transformer folder from which guidance moves away; None for guidance by classes. It is recorded
            relative to ``folder``, with the SHA-256 of its weights.

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
    if negative_model is not None:
        place = Path(os.path.relpath(negative_model.resolve(), file.parent.resolve())).as_posix()
        content["negative_model"] = {"folder": place, "transformer": sha256_of(negative_model / WEIGHTS_FILE)}
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


def read_negative_model(file: Path) -> Path | None:
    """Returns the transformer folder from which guidance moves away; None if there is no file or it names none.

    A negative model with other weights than those of the search is used too, with a warning.

    Args:
        file: Path of a ``decoding.json``.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the file is not JSON, or its entry ``negative_model`` is wrong.
    """
    if not file.is_file():
        return None
    entry = read_json(file).get("negative_model")
    if entry is None:
        return None
    where = f"decoding {file}: negative_model"
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("folder", "transformer")):
        raise ValueError(f"{where} must be a mapping with the texts folder and transformer, got {shorten(entry)}")
    folder = file.parent / str(entry["folder"])
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(
            f"{where}: no transformer in {folder}; copy it there, name another with --negative-model, or delete the "
            "file to decode as the model was exported"
        )
    if sha256_of(weights) != entry["transformer"]:
        _log.warning("%s: %s has other weights than those of the search; run `maskgit tune` again", where, folder)
    return folder


def save_negative_model(folder: Path | str, source: Path | None) -> Path:
    """Copies a transformer folder to ``negative/`` in a pretrained folder, so that the pipeline can be shared.

    Args:
        folder: Pretrained folder.
        source: Transformer folder of the negative model; None if the model came from memory.

    Returns:
        The copy, which is complete: an older one is replaced as a whole.

    Raises:
        FileExistsError: if an older copy has other files.
        FileNotFoundError: if a file of ``source`` is missing.
        ValueError: if ``source`` is None.
    """
    if source is None:
        raise ValueError(
            "negative_model must be read from a folder to be saved with the pipeline, got a model from memory; save it "
            "with save_pretrained, and name that folder"
        )
    target = Path(folder) / _NEGATIVE
    if target.exists() and target.samefile(source):
        return target
    copy_network(source, target, check=partial(check_only_known, known=NETWORK_FILES))
    return target


def copy_network(source: Path, folder: Path, *, check: Callable[[Path], object]) -> None:
    """Copies the files of a network to a folder, which is replaced as a whole.

    Loaded pipelines map the file of the weights to memory, so that overwriting it would change them.

    Args:
        source: Pretrained folder of the network.
        folder: Folder to write.
        check: Raises an error if the content of an existing folder must stay.
    """
    with write_folder(folder, check=check) as fresh:
        for name in NETWORK_FILES:
            shutil.copyfile(source / name, fresh / name)


def remove_negative_model(folder: Path | str) -> None:
    """Removes the copy that ``save_negative_model`` wrote, if there is one. Other files there stay."""
    target = Path(folder) / _NEGATIVE
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        for name in NETWORK_FILES:
            (target / name).unlink(missing_ok=True)
        if not any(target.iterdir()):
            target.rmdir()


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
