"""The small trained models that the package contains, by name: ``fashion-mnist-demo``. Imports no torch."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled_models"]

_FOLDER = Path(__file__).parents[1] / "models"


def bundled_models() -> dict[str, Path]:
    """Returns the pretrained folder of each model in the package by name, sorted by name."""
    return {config.parents[1].name: config.parents[1] for config in sorted(_FOLDER.glob("*/transformer/config.json"))}
