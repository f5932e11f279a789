"""Settings of a recipe that must not change when a run resumes.

A checkpoint carries the settings that decide what is learned from what. A run that resumes compares them with its own
before it trains; everything else (steps, logging, validation, devices, workers, micro-batch, precision, how blocks and
optimizer are executed) may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["fixed_settings", "list_changes"]

_DATA = ("image_size", "in_channels", "crop", "global_batch", "seed", "shuffle_window")
_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm")
_FREE_MODEL = {  # all other keys of the model are fixed
    "model.activation_checkpointing",
    "model.compiled",
    "model.decoding",  # only pictures and exports
    "model.global_batch",  # data.global_batch
    "model.memory_format",
    "model.optimizer.adamw",
    "model.optimizer.learning_rate.decay",
    "model.optimizer.learning_rate.final_fraction",
    "model.optimizer.learning_rate.warmup_steps",
    "model.seed",  # data.seed
    "model.tokenizer",  # a folder; what lies in it counts
}


def fixed_settings(config: Mapping[str, Any], *, data: str, tokenizer: str | None = None) -> dict[str, Any]:
    """Returns the settings that a run keeps, as plain values under their dotted keys.

    Betas, decay and the peak of the learning rate are among them since the optimizer's state restores them: a changed
    one would have no effect.

    Args:
        config: The resolved recipe: ``model``, ``data`` and ``trainer``.
        data: Fingerprint of the data folder.
        tokenizer: Fingerprint of the tokenizer, for stage 2.

    Returns:
        Dotted key -> value; what is named by a spec (``{name: ...}``) is one value.
    """
    settings = {"data": data, **_flat(config["model"], "model")}
    settings |= {f"data.{key}": config["data"].get(key) for key in _DATA}
    settings |= {f"trainer.{key}": config["trainer"].get(key) for key in _TRAINER}
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer
    return settings


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Lists the settings that differ, as ``key: old -> new``, sorted by key; hashes by their first 12 digits.

    Args:
        old: Settings of a checkpoint.
        new: Settings of the run.
        defaults: Values of keys that the checkpoint does not have, since it is older than they are.
    """
    pairs = [(key, old.get(key, defaults.get(key)), new.get(key)) for key in sorted({*old, *new})]
    return [f"{key}: {_short(key, was)} -> {_short(key, now)}" for key, was, now in pairs if was != now]


def _flat(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{path}.{name}"
        if key in _FREE_MODEL:
            continue
        if isinstance(value, Mapping) and "name" not in value:
            found |= _flat(value, key)
        else:
            found[key] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A value as JSON restores it; without the paths of weight files, which may lie elsewhere."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items() if name != "weights"}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _short(key: str, value: Any) -> Any:
    return str(value)[:12] if key in ("data", "tokenizer") else value
