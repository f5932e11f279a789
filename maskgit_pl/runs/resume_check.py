"""The settings of a run that must not change when it resumes.

A checkpoint carries all settings that affect the training result. A run that resumes compares them with its own before
it trains. Everything else may change: steps, logging, validation, devices, workers, micro-batch size, precision, and
the execution of blocks and optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["fixed_settings", "list_changes"]

_DATA = ("image_size", "in_channels", "augmentations", "crop", "global_batch", "seed", "shuffle_window")
_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm")
_FREE_MODEL = {  # all other keys of the model are fixed
    "model.activation_checkpointing",
    "model.compiled",
    "model.decoding",  # affects only pictures and exports
    "model.global_batch",  # data.global_batch
    "model.memory_format",
    "model.optimizer.adamw",
    "model.optimizer.learning_rate.decay",
    "model.optimizer.learning_rate.final_fraction",
    "model.optimizer.learning_rate.warmup_steps",
    "model.seed",  # data.seed
    "model.tokenizer",  # a path; the content of the folder is compared instead
}


def fixed_settings(config: Mapping[str, Any], *, data: str, tokenizer: str | None = None) -> dict[str, Any]:
    """Returns the settings that must not change, as plain values by dotted key.

    They include betas, weight decay and the peak of the learning rate: the optimizer state restores these, so a change
    would have no effect.

    Args:
        config: The resolved recipe: ``model``, ``data`` and ``trainer``.
        data: Fingerprint of the data folder.
        tokenizer: Fingerprint of the tokenizer, for stage 2.

    Returns:
        Mapping of dotted keys to values; a specification (``{name: ...}``) is a single value.
    """
    settings = {"data": data, **_flat(config["model"], "model")}
    settings |= {f"data.{key}": config["data"].get(key) for key in _DATA}
    settings |= {f"trainer.{key}": config["trainer"].get(key) for key in _TRAINER}
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer
    return settings


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists the changed settings as ``key: old -> new``, sorted by key; hashes are cut to 12 digits.

    Args:
        old: Settings of a checkpoint.
        new: Settings of the run.
    """
    pairs = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    return [f"{key}: {_short(key, was)} -> {_short(key, now)}" for key, was, now in pairs if was != now]


def _flat(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{path}.{name}"
        if key in _FREE_MODEL:
            continue
        # A specification {name: ...} is compared as a whole.
        if isinstance(value, Mapping) and "name" not in value:
            found |= _flat(value, key)
        else:
            found[key] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """Returns a value as JSON restores it, without the paths of weight files, which may move."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items() if name != "weights"}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _short(key: str, value: Any) -> Any:
    return str(value)[:12] if key in ("data", "tokenizer") else value
