"""Public data sets that ``maskgit data fetch`` downloads, checks and opens as sources of samples.

A new one is a subclass of ``Dataset`` in a file of its own, with an object ``DATASET``, listed in ``_CONTRIB``. Imports
no torch.
"""

from functools import cache
from importlib import import_module
from pathlib import Path

from maskgit_pl.datasets.base import Dataset
from maskgit_pl.datasets.fashion_mnist import FashionMNIST

__all__ = ["Dataset", "how_to_get", "public_datasets"]

_CONTRIB = ("maskgit_pl.contrib.blue_marble", "maskgit_pl.contrib.emoji")  # modules with an object ``DATASET``


@cache
def public_datasets() -> dict[str, Dataset]:
    """Returns the data sets by name."""
    others = [import_module(each).DATASET for each in _CONTRIB]
    return {each.name: each for each in (FashionMNIST(), *others)}


def how_to_get(name: str, folder: Path) -> str:
    """Returns the commands that make a data folder, for the error that it is missing.

    Args:
        name: Name of the data set of a run, a public one or another.
        folder: The data folder.
    """
    fetch = f"`maskgit data fetch {name} --out {folder}` or " if name in public_datasets() else ""
    return f"make it with {fetch}`maskgit data make IMAGES --out {folder}`"
