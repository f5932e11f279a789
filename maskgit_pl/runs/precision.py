"""Chooses the precision of a run whose recipe has ``trainer.precision: auto``. Used by ``build`` and ``preflight``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskgit_pl.devices import default_device, has_bfloat16
from maskgit_pl.runs.layers import value_at
from maskgit_pl.runs.recipe_files import Stage
from maskgit_pl.safe_yaml import read_yaml
from maskgit_pl.training.checkpoint_files import newest_checkpoint
from maskgit_pl.training.strategies import PRECISIONS

__all__ = ["AUTO", "choose_precision"]

log = logging.getLogger(__name__)

AUTO = "auto"

# The smallest widths that gain from bf16-mixed (docs/speed.md): a step of stage 1 takes 0.75 of its time with 64 base
# channels and 0.98 with 32; a step of stage 2 takes 0.59 to 0.71 of its time with 256 dimensions.
_WIDE: dict[Stage, tuple[str, int]] = {"tokenizer": ("base_channels", 64), "transformer": ("embed_dim", 256)}


def choose_precision(config: Mapping[str, Any], stage: Stage, folder: Path, *, gpu: str | None = None) -> str:
    """Returns the precision of a run, which is that of its recipe unless it is ``auto``.

    1. A run that has a checkpoint keeps the precision of its last start, so that it continues as it began.
    2. A wide network trains on one device with ``bf16-mixed``, if the device has instructions for bfloat16.
    3. Any other run trains with ``32-true``: several ranks could choose differently.

    Args:
        config: Values of the run with all defaults; see ``resolve``.
        stage: Stage to train.
        folder: Stage folder.
        gpu: Name of a GPU that the run will use, a key of ``training.gpus.GPUS``; None for a device of this machine.
    """
    given, trainer = str(config["trainer"]["precision"]), config["trainer"]
    if given != AUTO:
        return given
    recorded = _recorded_precision(folder)  # 1.
    if recorded is not None:
        return recorded
    key, width = _WIDE[stage]
    own = config["model"]["network"].get(key)
    is_wide = isinstance(own, int) and own >= width  # the keys of plug-ins are theirs
    # All devices of GPUS have the instructions.
    is_fast = trainer["strategy"] == "auto" and (gpu is not None or has_bfloat16(_device(trainer["accelerator"])))
    return "bf16-mixed" if is_wide and is_fast else "32-true"  # 2. and 3.


def _recorded_precision(folder: Path) -> str | None:
    """Returns the precision of the last start of a run, or None if it has no checkpoint or no readable record."""
    if newest_checkpoint(folder / "checkpoints") is None:
        return None
    try:
        recorded = value_at(read_yaml(folder / "config.yaml"), "trainer.precision")
    except (OSError, ValueError) as error:
        log.warning("%s; trainer.precision is chosen again", error)
        return None
    return recorded if recorded in PRECISIONS else None


def _device(accelerator: str) -> str:
    return "cpu" if accelerator == "cpu" else default_device()
