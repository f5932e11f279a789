"""Public data sets that ``maskgit data fetch`` downloads, checks and opens as sources of samples.

A new one is a subclass of ``Dataset`` in a file of its own, listed in ``DATASETS``. Imports no torch.
"""

from pathlib import Path

from maskgit_pl.datasets.base import Dataset
from maskgit_pl.datasets.blue_marble import BlueMarble
from maskgit_pl.datasets.emoji import Emoji
from maskgit_pl.datasets.fashion_mnist import FashionMNIST

__all__ = ["DATASETS", "Dataset", "how_to_get"]

DATASETS: dict[str, Dataset] = {each.name: each for each in (FashionMNIST(), BlueMarble(), Emoji())}
"""The data sets by name."""


def how_to_get(name: str, folder: Path) -> str:
    """Returns the commands that make a data folder, for the error that it is missing.

    Args:
        name: Name of the data set of a run, one of ``DATASETS`` or another.
        folder: The data folder.
    """
    fetch = f"`maskgit data fetch {name} --out {folder}` or " if name in DATASETS else ""
    return f"make it with {fetch}`maskgit data make IMAGES --out {folder}`"
