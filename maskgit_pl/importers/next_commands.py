"""The commands that follow the import of a tokenizer, for the reports of the importers."""

from __future__ import annotations

import shlex
from pathlib import Path

from maskgit_pl.networks.vqgan import VQGANConfig

__all__ = ["training_commands"]

_RECIPE, _CODES, _GRID = "paper-256", 1024, (16, 16)  # a recipe, and the sizes that it sets


def training_commands(config: VQGANConfig, folder: Path, image_size: int) -> tuple[str, str]:
    """Returns the commands that make the tokens of a data set and train a transformer on them.

    Args:
        config: Sizes of the tokenizer; those that the recipe sets otherwise become flags.
        folder: Tokenizer folder.
        image_size: Side of the images in pixels.
    """
    words = ["--dataset", "NAME", "--recipe", _RECIPE, "--tokenizer", str(folder)]
    rows, columns = config.grid(image_size)
    if config.codebook_size != _CODES:
        words += ["--model.network.codebook_size", str(config.codebook_size)]
    if (rows, columns) != _GRID:
        words += ["--model.network.grid", f"[{rows},{columns}]"]
    options = shlex.join(words)
    return f"maskgit tokenize {options}", f"maskgit train transformer {options}"
